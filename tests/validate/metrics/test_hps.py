"""HPS v2 and v2.1: open_clip's arithmetic from its own key names, the reference's preprocessing, wrong files."""

import numpy as np
import pytest
import torch

from surgery.errors import InputError
from surgery.validate.metrics import metric_class
from surgery.validate.metrics.clip import padded_pixels
from surgery.validate.metrics.hps import HpsV2, HpsV21

from . import tiny_clip
from .tiny_clip import EMBEDDING, MEAN, PROMPTS, SIZE, STD, pictures, prompts

WEIGHT_FILES = {HpsV2: "HPS_v2_compressed.pt", HpsV21: "HPS_v2.1_compressed.pt"}


def write(folder, checkpoint, metric=HpsV2):
    """The two folders, with a checkpoint as torch.save writes it."""
    files = {"weights": folder / "weights", "processor": folder / "processor"}
    files["weights"].mkdir(parents=True)
    torch.save(checkpoint, files["weights"] / WEIGHT_FILES[metric])
    tiny_clip.write_processor(files["processor"])
    tiny_clip.write_config(files["processor"], "gelu")
    (files["processor"] / "preprocessor_config.json").unlink()
    for part, path in files.items():
        assert {file.name for file in path.iterdir()} <= set(metric.info.checkpoints[part].files)
    return files


def halves(tensors):
    """The published checkpoints' layout: float16 under state_dict."""
    return {"state_dict": {name: tensor.half() for name, tensor in tensors.items()}}


@pytest.fixture(scope="module")
def tensors():
    return tiny_clip.open_clip_tensors()


@pytest.fixture(scope="module")
def metric(tensors, tmp_path_factory):
    return HpsV2(write(tmp_path_factory.mktemp("hps"), halves(tensors)))


def test_the_score_is_the_cosine_of_open_clips_own_arithmetic(metric, tensors):
    images = pictures([(SIZE, SIZE)] * len(PROMPTS))
    pixels = [(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - MEAN) / STD for image in images]
    expected = tiny_clip.cosines(tensors, pixels, PROMPTS, "gelu").numpy()
    scores = metric.score(images, prompts(PROMPTS))
    assert scores.dtype == np.float64
    assert expected.std() > 0.04
    np.testing.assert_allclose(scores, expected, atol=2e-6)


def test_features_at_a_known_angle_give_their_cosine(tensors, tmp_path):
    rest = (0.0,) * (EMBEDDING - 2)
    features = tiny_clip.constant_features(tensors, (3.0, 4.0, *rest), (5.0, 0.0, *rest))
    scores = HpsV2(write(tmp_path, halves(features))).score(pictures([(40, 30)]), prompts(["a cat"]))
    np.testing.assert_allclose(scores, [0.6], atol=1e-6)


def test_each_version_reads_its_own_weights(metric, tmp_path):
    assert metric_class("hps_v2") is HpsV2
    assert metric_class("hps_v2.1") is HpsV21
    assert HpsV2.info.title == "HPSv2"
    assert HpsV21.info.title == "HPSv2.1"
    other = HpsV21(write(tmp_path, halves(tiny_clip.open_clip_tensors(seed=1)), HpsV21))
    arguments = pictures([(SIZE, SIZE)]), prompts(["a cat"])
    assert abs(other.score(*arguments) - metric.score(*arguments)) > 1e-3


def test_a_score_depends_on_its_own_image_and_prompt_alone(metric):
    images = pictures([(64, 40)] * 18)  # more than a batch
    texts = prompts([f"picture {index}" for index in range(18)])
    scores = metric.score(images, texts)
    assert len(set(scores)) == 18
    np.testing.assert_allclose(metric.score(images[::-1], texts[::-1]), scores[::-1], atol=1e-6)
    np.testing.assert_allclose(metric.score(images[17:], texts[17:]), scores[17:], atol=1e-6)


def test_a_prompt_is_cleaned_and_cut_to_77_tokens(metric):
    image = pictures([(64, 64)])
    same = [
        ('it\'s a "cat" & <b>', "It\u2019s  a \u201ccat\u201d &amp;amp; &lt;b&gt; "),
        ("x " * 74 + "y", "x " * 74 + "y z z"),
    ]
    for plain, other in same:
        first, second = metric.score(image * 2, prompts([plain, other]))
        assert first == pytest.approx(second, abs=1e-6)
    first, second = metric.score(image * 2, prompts(["x " * 74 + "y", "x " * 74 + "z"]))
    assert first != pytest.approx(second, abs=1e-4)


@pytest.mark.parametrize(
    ("size", "height", "width"), [((300, 200), 149, 224), ((100, 400), 224, 56), ((9, 9), 224, 224)]
)
def test_an_image_keeps_its_shape_within_black_borders(size, height, width):
    from PIL import Image

    pixels = padded_pixels([Image.new("RGB", size, (255, 0, 51))], 224)[0] * STD + MEAN
    top, left = (224 - height) // 2, (224 - width) // 2
    expected = torch.zeros(3, 224, 224)
    expected[:, top : top + height, left : left + width] = torch.tensor([1, 0, 0.2])[:, None, None]
    assert torch.allclose(pixels, expected, atol=1e-6)


def test_resizing_averages_over_what_it_drops_and_is_not_clamped():
    from PIL import Image

    stripes = np.zeros((896, 896, 3), dtype=np.uint8)
    stripes[:, 1::4] = stripes[:, 2::4] = 255  # two of each four columns, which become one
    pixels = padded_pixels([Image.fromarray(stripes)], 224)[0] * STD + MEAN
    assert torch.allclose(pixels[:, :, 5:-5], torch.tensor(0.5), atol=0.05)  # 1.19 without antialiasing
    edge = np.zeros((448, 448, 3), dtype=np.uint8)
    edge[:, 224:] = 255
    pixels = padded_pixels([Image.fromarray(edge)], 224)[0] * STD + MEAN
    assert pixels.min() < -0.01
    assert pixels.max() > 1.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop("transformer.resblocks.1.attn.in_proj_bias"),
            "missing: transformer.resblocks.1.attn.in_proj_bias",
        ),
        (lambda tensors: tensors.update(attn_mask=torch.zeros(77, 77)), "unexpected: attn_mask"),
        (
            lambda tensors: tensors.update({"visual.proj": torch.zeros(31, EMBEDDING)}),
            "shapes: visual_projection.weight",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(tensors, tmp_path, change, message):
    changed = dict(tensors)
    change(changed)
    files = write(tmp_path, halves(changed))
    with pytest.raises(InputError, match=message) as error:
        HpsV2(files)
    assert str(files["weights"] / "HPS_v2_compressed.pt") in str(error.value)


def test_a_damaged_or_absent_file_is_named(tensors, tmp_path):
    files = write(tmp_path, halves(tensors))
    path = files["weights"] / "HPS_v2_compressed.pt"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"<html>not found</html>", b""):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"HPS_v2_compressed\.pt .*(cannot be read|could run code)"):
            HpsV2(files)
    path.unlink()
    with pytest.raises(InputError, match="HPS_v2_compressed.pt: there is no such file"):
        HpsV2(files)


class Runs:
    """What a pickle could be made to call."""

    def __reduce__(self):
        return (print, ("code of the checkpoint ran",))


def test_code_in_a_checkpoint_is_never_run(tmp_path, capsys):
    files = write(tmp_path, {"state_dict": Runs()})
    with pytest.raises(InputError, match="could run code"):
        HpsV2(files)
    assert "ran" not in capsys.readouterr().out
