"""Diversity by its formulas, on DINOv2's architecture with random weights, and paired over prompts."""

import json
import math

import numpy as np
import pytest
import torch

from surgery.errors import InputError
from surgery.validate.jobs import ImagePair, PairedImages, Side, jobs_of
from surgery.validate.metrics import metric_class
from surgery.validate.prompts import Prompt, PromptSet
from surgery.validate.scoring import check_metrics, prepare_scorers, score
from surgery.validate.session import Settings

from .tiny_clip import pictures

NAMES = ("dino_diversity", "vendi_score")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a tiny DINOv2."""
    from transformers import Dinov2Config, Dinov2Model

    path = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(path)
    processor = {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 28, "width": 28},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "do_center_crop": True,
        "resample": 3,
    }
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return path


def test_features_are_the_class_token_at_length_one(folder):
    from transformers import AutoModel

    (image,) = pictures([(32, 32)])
    found = metric_class("dino_diversity")({"dino": folder}).features([image])
    pixels = torch.from_numpy(np.asarray(image)[2:30, 2:30].copy()).permute(2, 0, 1).double() / 255
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=torch.float64)[:, :, None, None]
    model = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        token = model(((pixels - mean) / std)[None].float()).last_hidden_state[0, 0].double()
    assert found[0] == pytest.approx((token / token.norm()).numpy(), abs=1e-5)


def test_the_values_of_a_prompts_images(folder):
    unlike = np.eye(3)
    alike = np.ones((3, 1))
    random = np.random.default_rng(0).normal(size=(5, 8))
    random /= np.linalg.norm(random, axis=1, keepdims=True)
    distances, vendi = (metric_class(name).of_prompt for name in NAMES)
    assert distances(unlike) == pytest.approx([100] * 3) and distances(alike) == pytest.approx([0] * 3)
    assert vendi(unlike) == pytest.approx([3] * 3) and vendi(alike) == pytest.approx([1] * 3)
    pairs = [1 - random[a] @ random[b] for a in range(5) for b in range(a)]
    assert distances(random).mean() == pytest.approx(100 * np.mean(pairs))
    eigenvalues = np.linalg.svd(random / math.sqrt(5), compute_uv=False) ** 2
    assert vendi(random) == pytest.approx([math.exp(-(eigenvalues * np.log(eigenvalues)).sum())] * 5)


def test_it_is_paired_over_prompts_and_needs_two_images_of_each(folder, tmp_path):
    prompts = PromptSet("two", (Prompt("a red circle"), Prompt("a star")))
    with pytest.raises(InputError, match="--images-per-prompt 2"):
        check_metrics(Settings(prompts, 1, 0, NAMES, NAMES, None), {})
    check_metrics(Settings(prompts, 2, 0, NAMES, NAMES, None), {})
    pairs = []
    for at, job in enumerate(jobs_of(prompts, 3)):
        files = [tmp_path / f"{side}-{at}.png" for side in ("base", "patched")]
        for file, seed in zip(files, (at, at // 2), strict=True):  # of the patched ones some are alike
            pictures([(40, 40)], seed)[0].save(file)
        pairs.append(ImagePair(job, *files))
    images = PairedImages(Side("base", None, {}), Side("patched", [], {}), tuple(pairs))
    scorers = prepare_scorers(NAMES, "cpu", {f"{name}.dino": folder for name in NAMES})
    distance, vendi = (score(scorer, tmp_path, images).metric for scorer in scorers)
    assert (distance.kind, distance.n, distance.groups) == ("diversity", 6, 2)
    assert distance.base > 0 and distance.difference == pytest.approx(distance.patched - distance.base)
    assert distance.difference < 0 and 1 < vendi.base < 3 and vendi.interval[0] <= vendi.difference <= vendi.interval[1]
    assert distance.verdict.startswith("cannot tell with 2 prompts")
