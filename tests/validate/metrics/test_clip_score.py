"""CLIPScore: the definition's arithmetic, known angles, and every way in which a checkpoint can be wrong."""

import json
import shutil
from fnmatch import fnmatch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery.errors import InputError
from surgery.validate.metrics import metric_class
from surgery.validate.metrics.clip_scores import ClipScore

from . import tiny_clip
from .tiny_clip import EMBEDDING, MEAN, PROMPTS, SIZE, STD, pictures, prompts


@pytest.fixture(scope="module")
def tensors():
    return tiny_clip.open_clip_tensors()


@pytest.fixture(scope="module")
def folder(tensors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    write(folder, tensors)
    return folder


@pytest.fixture(scope="module")
def metric(folder):
    return ClipScore({"model": folder})


def write(folder, tensors):
    tiny_clip.write_config(folder, "quick_gelu")
    tiny_clip.write_processor(folder)
    tiny_clip.write_weights(folder, tensors)


def pixels_of(image):
    """Shorter side to SIZE, then the middle, as CLIP's preprocessing is described."""
    shorter = min(image.size)
    width, height = (SIZE * image.width // shorter, SIZE * image.height // shorter)
    image = image.resize((width, height), 3)
    left, top = (width - SIZE) // 2, (height - SIZE) // 2
    image = image.crop((left, top, left + SIZE, top + SIZE))
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - MEAN) / STD


def test_the_score_is_a_hundred_times_the_cosine_of_clips_own_arithmetic(metric, tensors):
    images = pictures([(64, 64), (96, 64), (50, 71), (28, 28)])
    expected = tiny_clip.cosines(tensors, [pixels_of(image) for image in images], PROMPTS, "quick_gelu")
    scores = metric.score(images, prompts(PROMPTS))
    assert scores.dtype == np.float64
    assert expected.std() > 0.04
    np.testing.assert_allclose(scores, 100 * expected.clamp(min=0).numpy(), atol=1e-4)
    assert (scores > 0).any()


@pytest.mark.parametrize(
    ("image_feature", "text_feature", "score"),
    [((3.0, 4.0), (6.0, 8.0), 100), ((3.0, 4.0), (2.0, 0.0), 60), ((1.0, 0.0), (-1.0, 0.0), 0)],
)
def test_features_at_a_known_angle_give_a_known_score(tensors, tmp_path, image_feature, text_feature, score):
    rest = (0.0,) * (EMBEDDING - 2)
    write(tmp_path, tiny_clip.constant_features(tensors, (*image_feature, *rest), (*text_feature, *rest)))
    scores = ClipScore({"model": tmp_path}).score(pictures([(40, 30), (30, 40)]), prompts(["a cat", "a dog"]))
    np.testing.assert_allclose(scores, [score, score], atol=1e-4)


def test_a_score_depends_on_its_own_image_and_prompt_alone(metric):
    images = pictures([(64, 64)] * 19)  # more than a batch
    texts = prompts([f"picture {index}" for index in range(19)])
    scores = metric.score(images, texts)
    assert len(set(scores)) > 9
    order = [(5 * index) % 19 for index in range(19)]
    shuffled = metric.score([images[index] for index in order], [texts[index] for index in order])
    np.testing.assert_allclose(shuffled, scores[order], atol=1e-4)
    alone = [metric.score([image], [text])[0] for image, text in zip(images, texts, strict=True)]
    np.testing.assert_allclose(alone, scores, atol=1e-4)
    assert metric.score([], []).shape == (0,)


def test_images_and_prompts_must_be_as_many(metric):
    with pytest.raises(ValueError, match="2 images, but 1 prompts"):
        metric.score(pictures([(28, 28)] * 2), prompts(["a cat"]))


def test_a_prompt_counts_up_to_77_tokens_and_no_further(metric):
    whole = "x " * 74 + "y"  # 75 tokens, and the start and the end
    score, longer, other = metric.score(pictures([(64, 64)]) * 3, prompts([whole, whole + " z z", "x " * 74 + "z"]))
    assert longer == pytest.approx(score, abs=1e-4)
    assert other != pytest.approx(score, abs=1e-2)


def test_it_is_found_by_name_and_reads_the_files_that_it_lists_alone(folder, metric, tmp_path):
    assert metric_class("clip_score") is ClipScore
    listed = ClipScore.info.checkpoints["model"].files
    for path in folder.iterdir():
        if any(fnmatch(path.name, pattern) for pattern in listed):
            shutil.copy(path, tmp_path)
    arguments = pictures([(64, 64)]), prompts(["a cat"])
    assert ClipScore({"model": tmp_path}).score(*arguments) == pytest.approx(metric.score(*arguments))


def test_the_tokenizers_two_published_forms_are_the_same_to_it(folder, metric, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    saved = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    (tmp_path / "model" / "tokenizer.json").unlink()
    (tmp_path / "model" / "vocab.json").write_text(json.dumps(saved["model"]["vocab"]))
    (tmp_path / "model" / "merges.txt").write_text("#version: 0.2\n")
    images, texts = pictures([(64, 64)] * 4), prompts(PROMPTS)
    np.testing.assert_allclose(
        ClipScore({"model": tmp_path / "model"}).score(images, texts), metric.score(images, texts)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("visual_projection.weight"), "missing: visual_projection.weight"),
        (lambda tensors: tensors.update({"text_model.extra": torch.zeros(1)}), "unexpected: text_model.extra"),
        (
            lambda tensors: tensors.update({"text_projection.weight": torch.zeros(EMBEDDING, 7)}),
            r"shapes: text_projection.weight \(24, 7\) instead of \(24, 32\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(folder, tmp_path, change, message):
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(InputError, match=message) as error:
        ClipScore({"model": tmp_path / "model"})
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", b"\x10\0\0\0\0\0\0\0 not a checkpoint", "cannot be read as a checkpoint"),
        ("model.safetensors", None, "there is no such file"),
        ("config.json", b"{", "no CLIPConfig can be read"),
        ("config.json", None, "config.json: there is no such file"),
        ("preprocessor_config.json", None, "preprocessor_config.json: there is no such file"),
        ("tokenizer.json", None, "the tokenizer has 2 tokens, the CLIP model 514"),
        ("tokenizer.json", b"{", "no CLIPTokenizer can be read"),
    ],
)
def test_a_damaged_or_absent_file_is_named(folder, tmp_path, name, content, message):
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        ClipScore({"model": tmp_path / "model"})
    assert "fetch" in str(error.value)
