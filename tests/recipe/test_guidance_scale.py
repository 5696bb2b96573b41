"""`sampling.guidance_scale` as a range: drawn for each image from its seed, from the recipe to the scores."""

import base64
import csv
import io
import json
import threading

import numpy as np
import pytest
from PIL import Image

import surgery
from surgery.artifact import read_manifest
from surgery.errors import RecipeError
from surgery.export.serve.replica import BatchRunner
from surgery.export.serve.request import BatchKey
from surgery.models.patching import denoiser
from surgery.recipe.guidance_scale import scale_of
from surgery.recipe.plan import make_plan
from surgery.runtime.draw import draw
from surgery.runtime.worker import ImageRequest, WorkerConfig
from surgery.validate.validating import validate

from ..conftest import PROMPTS
from ..nn.backbones.flux import flux

RANGE = {"uniform": [2.0, 6.0]}
DRAWN = {"steps": 2, "height": 64, "width": 64}
JOBS = [(PROMPTS[0], 0), (PROMPTS[1], 3), ("a star", 7)]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """The folder of an artifact whose recipe names a range."""
    overrides = ["sampling.steps=2", "sampling.guidance_scale={uniform: [2, 6]}"]
    return surgery.apply("shapes", tmp_path_factory.mktemp("range") / "shapes", overrides=overrides).folder


def far(images, others):
    """The largest difference of two lists of images, of 255."""
    return max(np.abs(np.asarray(a, int) - np.asarray(b, int)).max() for a, b in zip(images, others, strict=True))


def test_scales_are_even_over_the_range_and_follow_from_the_seed_alone():
    scales = np.array([scale_of({"guidance_scale": RANGE}, seed) for seed in range(4000)])
    assert scales.min() >= 2.0 and scales.max() < 6.0 and len(set(scales)) == 4000
    counts = np.histogram(scales, 8, (2.0, 6.0))[0]
    assert (np.abs(counts - 500) < 5 * np.sqrt(500 * 7 / 8)).all()  # five standard deviations
    assert scale_of({"guidance_scale": RANGE}, 11) == scales[11]


@pytest.mark.parametrize("guidance", [None, "apg", {"method": "oseg", "layers": "all"}, "cfg-zero"])
def test_images_of_one_batch_have_each_their_own_scale(pipeline, guidance):
    sampling = {**DRAWN, "guidance": guidance}
    together = draw(pipeline, JOBS, {**sampling, "guidance_scale": RANGE})
    scales = [scale_of({"guidance_scale": RANGE}, seed) for _, seed in JOBS]
    by_hand = [
        draw(pipeline, [job], {**sampling, "guidance_scale": scale})[0] for job, scale in zip(JOBS, scales, strict=True)
    ]
    assert far(together, by_hand) <= 1
    assert far(draw(pipeline, JOBS[1:], {**sampling, "guidance_scale": RANGE}), by_hand[1:]) <= 1
    assert far(draw(pipeline, JOBS, {**sampling, "guidance_scale": scales[0]}), by_hand) > 5


def test_where_a_scale_is_at_most_1_there_is_no_guidance(pipeline):
    sampling = {**DRAWN, "guidance_scale": {"uniform": [0.5, 4.5]}}
    scales = [scale_of(sampling, seed) for _, seed in JOBS]
    assert min(scales) < 1 < max(scales)
    expected = [draw(pipeline, [job], {**DRAWN, "guidance_scale": s})[0] for job, s in zip(JOBS, scales, strict=True)]
    assert far(draw(pipeline, JOBS, sampling), expected) <= 1


def test_where_the_model_takes_the_scale_itself_images_are_drawn_singly():
    pipeline, _ = flux()
    jobs, steps, batches = [("a cat", 0), ("a dog", 1)], [], []
    sampling = {"steps": 2, "height": 16, "width": 16, "guidance_scale": RANGE}
    handle = denoiser(pipeline).register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    images = draw(pipeline, jobs, sampling, lambda: steps.append(1))
    handle.remove()
    assert batches == [1] * 4 and len(steps) == 2  # a step of the batch is told once
    for job, image in zip(jobs, images, strict=True):
        own = {**sampling, "guidance_scale": scale_of(sampling, job[1])}
        assert far([image], draw(pipeline, [job], own)) == 0


def test_validation_draws_both_sides_alike_and_records_each_scale(artifact, tmp_path):
    prompts = tmp_path / "three.txt"
    prompts.write_text("\n".join(prompt for prompt, _ in JOBS))
    done = validate(artifact, prompts=prompts, metrics=["ssim"], out=tmp_path / "out")
    assert done.scores.sampling["guidance_scale"] == RANGE
    with open(done.report.parent / "pairs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    pipeline = surgery.load(artifact, quiet=True)
    for row in rows:
        scale = float(row["guidance_scale"])
        assert scale == scale_of({"guidance_scale": RANGE}, int(row["seed"]))
        files = [Image.open(done.report.parent / row[side]) for side in ("base", "patched")]
        assert [json.loads(file.info["surgery"])["guidance_scale"] for file in files] == [scale, scale]
    jobs = [(row["prompt"], int(row["seed"])) for row in rows]
    patched = [Image.open(done.report.parent / row["patched"]).convert("RGB") for row in rows]
    own = [
        draw(pipeline, [job], {**DRAWN, "guidance_scale": float(row["guidance_scale"])})[0]
        for job, row in zip(jobs, rows, strict=True)
    ]
    assert far(patched, own) <= 1 and len({row["guidance_scale"] for row in rows}) == 3
    card = (artifact / "README.md").read_text()
    assert "another for each image, drawn evenly from 2 to 6 by its seed" in card and "guidance_scale={'" not in card


def test_generate_and_a_served_model_draw_and_tell_each_images_scale(artifact, run, tmp_path):
    out = tmp_path / "out.png"
    told = json.loads(run("generate", artifact, PROMPTS[0], "--images", "2", "--out", out, "--json", check=0).stdout)
    expected = {str(seed): scale_of({"guidance_scale": RANGE}, seed) for seed in (0, 1)}
    assert told["guidance_scales"] == expected and told["sampling"]["guidance_scale"] == RANGE
    manifest = read_manifest(artifact)
    key = BatchKey(steps=2, guidance_scale=(2.0, 6.0), width=64, height=64)
    config = WorkerConfig(str(artifact), None, manifest.hash, manifest.sampling, device="cpu", threads=1)
    served = BatchRunner(config, key, 1).draw(key, [ImageRequest(*job) for job in JOBS], threading.Event())
    images = [Image.open(io.BytesIO(base64.b64decode(one.image))) for one in served]
    assert far(images, draw(surgery.load(artifact, quiet=True), JOBS, manifest.sampling)) <= 1


def test_what_is_wrong_is_said_at_its_key_and_a_plan_counts_cfg_where_a_scale_is_above_1():
    for value, says in (
        ("{uniform: [5, 3]}", "sampling.guidance_scale.uniform.*must rise"),
        ("{uniform: [5]}", "sampling.guidance_scale.uniform"),
        ("{unifrom: [3, 5]}", 'sampling.guidance_scale.unifrom.*did you mean "uniform"'),
        ("much", "sampling.guidance_scale.*valid number"),
    ):
        with pytest.raises(RecipeError, match=says):
            make_plan("shapes", [f"sampling.guidance_scale={value}"])
    plans = [make_plan("shapes", [f"sampling.guidance_scale={value}"]).plan for value in ("{uniform: [0, 3]}", "3.0")]
    assert [plan.evaluations for plan in plans] == [2, 2] and plans[0].recipe_hash != plans[1].recipe_hash
    assert make_plan("shapes", ["sampling.guidance_scale={uniform: [0, 1]}"]).plan.evaluations == 1
