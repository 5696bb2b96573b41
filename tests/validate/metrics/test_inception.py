"""The FID Inception network: its weights file, its features, and what is refused."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from surgery.errors import InputError
from surgery.validate.metrics import inception
from surgery.validate.metrics.distances import Fid, Kid
from surgery.validate.metrics.inception import FidInception, inception_features, load_inception

# Of the names and shapes of pytorch-fid 0.3.0's fid_inception_v3().state_dict().
NAMES_SHA256 = "8cdd2faeb41211e17f0fb47e66168d0cb1f981aa773b5f44e5b9cc93857fe492"
# Of the 2048 features that pytorch-fid 0.3.0 has for `picture(700, 120)` with `random_weights()`: four, and the mean.
PYTORCH_FID_FEATURES = [2.818321, 0.0, 0.238187, 1.785554]
PYTORCH_FID_MEAN = 1.04040623


def shapes():
    """{name: shape} of every tensor of the published file."""
    with torch.device("meta"):
        network = FidInception()
    named = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    return named | {"fc.weight": (1008, 2048), "fc.bias": (1008,)}


def random_weights():
    """A state dict like the published one, whose activations neither vanish nor grow from layer to layer."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in sorted(shapes().items()):
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(7)
        elif len(shape) > 1:
            weights[name] = torch.randn(shape, generator=generator) * (2 / np.prod(shape[1:])) ** 0.5
        else:
            center = 1.0 if name.endswith(("bn.weight", "running_var")) else 0.0
            weights[name] = center + 0.2 * torch.rand(shape, generator=generator)
    return weights


def empty_weights(named):
    """The same without content: each tensor one number, spread over its shape, so that the file is small."""
    return {name: torch.zeros(()).expand(shape) for name, shape in named.items()}


def picture(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(random_weights(), path, _use_new_zipfile_serialization=False)  # the format of 2018
    yield path
    path.unlink()  # 95 MB


@pytest.fixture(scope="module")
def network(weights_file):
    return load_inception(weights_file, "cpu")


def test_the_network_has_the_published_files_names_and_shapes():
    listed = "\n".join(f"{name} {list(shape)}" for name, shape in sorted(shapes().items()))
    assert hashlib.sha256(listed.encode()).hexdigest() == NAMES_SHA256
    assert len(shapes()) == 566


def test_features_are_those_of_pytorch_fid(network):
    features = inception_features(network, [picture(700, 120)])
    assert features.shape == (1, 2048) and features.dtype == np.float32
    np.testing.assert_allclose(features[0, :4], PYTORCH_FID_FEATURES, rtol=1e-4)
    assert features.mean() == pytest.approx(PYTORCH_FID_MEAN, rel=1e-5)


def test_images_of_any_size_and_number_have_the_features_they_have_alone(network, monkeypatch):
    monkeypatch.setattr(inception, "_BATCH", 2)
    images = [picture(299, 299), picture(64, 96, seed=1), picture(400, 300, seed=2)]
    together = inception_features(network, iter(images))
    alone = [inception_features(network, [images[index]])[0] for index in (1, 2)]
    assert together.shape == (3, 2048)
    np.testing.assert_allclose(together[1:], alone, rtol=1e-4, atol=1e-5)


def test_fid_and_kid_have_these_features(weights_file, network):
    images = [picture(32, 32)]
    features = inception_features(network, images)
    for metric in (Fid, Kid):
        assert np.array_equal(metric({"inception": weights_file}, "cpu").features(images), features)


def test_loading_leaves_the_callers_random_numbers_as_they_were(weights_file):
    before = torch.get_rng_state()
    load_inception(weights_file, "cpu")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def convolutions():
    """torch's settings for cuDNN's convolutions, put back afterwards."""
    settings = torch.backends.cudnn.conv
    before = settings.fp32_precision
    yield settings
    settings.fp32_precision = before


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_features_are_computed_in_whole_float32_and_the_callers_precision_is_put_back(convolutions, precision):
    convolutions.fp32_precision = precision
    inside = []
    watching = torch.nn.Linear(1, 2048)
    watching.forward = lambda x: inside.append(convolutions.fp32_precision) or torch.ones(len(x), 2048)
    inception_features(watching, [picture(16, 16)])
    assert (inside, convolutions.fp32_precision) == (["ieee"], precision)


def test_a_file_without_batch_counts_is_taken(tmp_path):
    named = {name: shape for name, shape in shapes().items() if not name.endswith("num_batches_tracked")}
    torch.save(empty_weights(named), tmp_path / "weights.pth")
    assert not load_inception(tmp_path / "weights.pth", "cpu").training


def test_torchvisions_own_network_is_refused(tmp_path):
    named = shapes() | {"fc.weight": (1000, 2048), "fc.bias": (1000,), "AuxLogits.fc.bias": (1000,)}
    torch.save(empty_weights(named), tmp_path / "inception_v3_google-0cc3c7bd.pth")
    with pytest.raises(
        InputError, match=r"unexpected: AuxLogits\.fc\.bias; of another shape: fc\.weight \[1000, 2048\]"
    ):
        load_inception(tmp_path / "inception_v3_google-0cc3c7bd.pth", "cpu")


def test_a_missing_weight_is_named(tmp_path):
    named = shapes()
    del named["Mixed_7a.branch3x3_1.conv.weight"]
    torch.save(empty_weights(named), tmp_path / "weights.pth")
    with pytest.raises(InputError, match=r"weights\.pth.*missing: Mixed_7a\.branch3x3_1\.conv\.weight"):
        load_inception(tmp_path / "weights.pth", "cpu")


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", None])
def test_a_file_that_is_cut_short_or_something_else_is_named(tmp_path, content):
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000] if content is None else content)
    with pytest.raises(InputError, match=r"weights\.pth"):
        load_inception(path, "cpu")


def test_a_file_that_would_run_code_is_refused(tmp_path):
    torch.save({"a": print}, tmp_path / "weights.pth")
    with pytest.raises(InputError, match=r"weights\.pth holds more than tensors"):
        load_inception(tmp_path / "weights.pth", "cpu")


def test_features_that_are_not_finite_are_refused():
    broken = torch.nn.Linear(1, 2048)
    broken.forward = lambda images: torch.full((len(images), 2048), torch.nan)
    with pytest.raises(InputError, match="not finite"):
        inception_features(broken, [picture(16, 16)])


def test_no_images_are_refused(network):
    with pytest.raises(InputError, match="no images"):
        inception_features(network, [])
