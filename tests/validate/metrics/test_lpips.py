"""LPIPS: its two weights files, its distances, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from surgery.errors import InputError
from surgery.validate.metrics.lpips import Lpips

CONVOLUTIONS = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
CLASSIFIER = [f"classifier.{layer}.{part}" for layer in (1, 4, 6) for part in ("weight", "bias")]
# What lpips 0.1.4 gives for `picture(96, 64)` and `picture(96, 64, seed=1)` with `random_weights()`.
LPIPS_PACKAGE_DISTANCE = 0.93080586


def random_weights():
    """(AlexNet, heads): state dicts like the published ones."""
    generator = torch.Generator().manual_seed(0)
    alexnet = {}
    for place, (outputs, inputs, side) in CONVOLUTIONS.items():
        weight = torch.randn(outputs, inputs, side, side, generator=generator)
        alexnet[f"features.{place}.weight"] = weight * (2 / (inputs * side * side)) ** 0.5
        alexnet[f"features.{place}.bias"] = 0.1 * torch.randn(outputs, generator=generator)
    alexnet |= {name: torch.zeros(1) for name in CLASSIFIER}  # in the file, and not used
    sizes = [outputs for outputs, _, _ in CONVOLUTIONS.values()]
    heads = {f"lin{i}.model.1.weight": torch.rand(1, size, 1, 1, generator=generator) for i, size in enumerate(sizes)}
    return alexnet, heads


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lpips")
    alexnet, heads = random_weights()
    torch.save(alexnet, folder / "alexnet.pth")
    torch.save(heads, folder / "alex.pth", _use_new_zipfile_serialization=False)  # as it is published
    return {"alexnet": folder / "alexnet.pth", "heads": folder / "alex.pth"}


@pytest.fixture(scope="module")
def metric(files):
    return Lpips(files, "cpu")


def test_distances_are_those_of_the_lpips_package(metric):
    distances = metric.compare([picture(96, 64)], [picture(96, 64, seed=1)])
    assert distances.dtype == np.float64
    np.testing.assert_allclose(distances, [LPIPS_PACKAGE_DISTANCE], rtol=1e-5)


def test_an_image_is_at_no_distance_from_itself_and_nearer_to_a_like_one(metric):
    one, other = picture(64, 64), picture(64, 64, seed=1)
    same, near, far = metric.compare([one, one, one], [one, Image.blend(one, other, 0.1), other])
    assert same == 0 < near < far


def test_pairs_may_be_of_different_sizes_and_go_both_ways(metric):
    ones = [picture(40, 64), picture(31, 31)]
    others = [picture(40, 64, seed=1), picture(31, 31, seed=1)]
    np.testing.assert_allclose(metric.compare(ones, others), metric.compare(others, ones), rtol=1e-6)


def test_a_pair_of_two_sizes_or_too_small_is_named(metric):
    with pytest.raises(InputError, match="in pair 1 the patched image is 40x64 and the base's 64x40"):
        metric.compare([picture(64, 64), picture(40, 64)], [picture(64, 64), picture(64, 40)])
    with pytest.raises(InputError, match="pair 0 is 64x30, and each side must have at least 31 pixels"):
        metric.compare([picture(64, 30)], [picture(64, 30)])


def test_the_heads_of_another_network_are_refused(files, tmp_path):
    vgg = {f"lin{i}.model.1.weight": torch.zeros(1, size, 1, 1) for i, size in enumerate((64, 128, 256, 512, 512))}
    torch.save(vgg, tmp_path / "vgg.pth")
    with pytest.raises(InputError, match=r"vgg\.pth is not the linear heads.*lin1\.model\.1\.weight \[1, 128, 1, 1\]"):
        Lpips(files | {"heads": tmp_path / "vgg.pth"}, "cpu")


def test_alexnet_and_the_heads_in_each_others_place_are_refused(files):
    with pytest.raises(InputError, match=r"missing: features\.0\.bias.*unexpected: lin0"):
        Lpips({"alexnet": files["heads"], "heads": files["alexnet"]}, "cpu")


@pytest.mark.parametrize("part", ["alexnet", "heads"])
def test_a_file_that_is_cut_short_is_named(files, tmp_path, part):
    (tmp_path / "cut.pth").write_bytes(files[part].read_bytes()[:-600])
    with pytest.raises(InputError, match=r"cut\.pth"):
        Lpips(files | {part: tmp_path / "cut.pth"}, "cpu")
