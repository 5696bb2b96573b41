"""PickScore: the model card's formula on known and on random weights, and files that do not fit."""

import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery.errors import InputError
from surgery.validate.metrics import metric_class
from surgery.validate.metrics.clip_scores import PickScore

from . import tiny_clip
from .tiny_clip import EMBEDDING, MEAN, PROMPTS, SIZE, STD, pictures, prompts


def write(folder, tensors):
    """The two folders, each with the files that the metric lists for it and no other."""
    files = {"model": folder / "model", "processor": folder / "processor"}
    tiny_clip.write_config(files["model"], "gelu")
    tiny_clip.write_weights(files["model"], tensors)
    tiny_clip.write_processor(files["processor"])
    for part, path in files.items():
        assert {file.name for file in path.iterdir()} <= set(PickScore.info.checkpoints[part].files)
    return files


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write(tmp_path_factory.mktemp("pick"), tiny_clip.open_clip_tensors())


def test_the_score_is_the_scaled_cosine_of_clips_own_arithmetic(files):
    images = pictures([(SIZE, SIZE)] * len(PROMPTS))
    pixels = [(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - MEAN) / STD for image in images]
    expected = math.exp(3) * tiny_clip.cosines(tiny_clip.open_clip_tensors(), pixels, PROMPTS, "gelu").numpy()
    scores = PickScore(files).score(images, prompts(PROMPTS))
    assert scores.dtype == np.float64
    assert expected.min() < 0  # which it keeps
    np.testing.assert_allclose(scores, expected, atol=5e-5)


def test_a_known_angle_and_scale_give_a_known_score(tmp_path):
    tensors = tiny_clip.open_clip_tensors() | {"logit_scale": torch.tensor(math.log(100))}
    rest = (0.0,) * (EMBEDDING - 2)
    files = write(tmp_path, tiny_clip.constant_features(tensors, (3.0, 4.0, *rest), (5.0, 0.0, *rest)))
    scores = PickScore(files).score(pictures([(40, 30), (30, 40)]), prompts(["a cat", "a dog"]))
    np.testing.assert_allclose(scores, [60, 60], atol=1e-4)


def test_a_score_depends_on_its_own_image_and_prompt_alone(files):
    metric = PickScore(files)
    images = pictures([(64, 64)] * 18)  # more than a batch
    texts = prompts([f"picture {index}" for index in range(18)])
    scores = metric.score(images, texts)
    assert len(set(scores)) == 18
    np.testing.assert_allclose(metric.score(images[::-1], texts[::-1]), scores[::-1], atol=1e-5)
    np.testing.assert_allclose(metric.score(images[17:], texts[17:]), scores[17:], atol=1e-5)


def test_it_is_found_by_name():
    assert metric_class("pick_score") is PickScore


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("logit_scale"), "missing: logit_scale"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "unexpected: extra"),
    ],
)
def test_weights_that_do_not_fit_are_named(files, tmp_path, change, message):
    shutil.copytree(files["model"], tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=message):
        PickScore(files | {"model": tmp_path / "model"})


def test_another_models_tokenizer_is_refused(files, tmp_path):
    shutil.copytree(files["processor"], tmp_path / "processor")
    (tmp_path / "processor" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="the tokenizer has 2 tokens, the CLIP model 514"):
        PickScore(files | {"processor": tmp_path / "processor"})
