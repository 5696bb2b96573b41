"""`guidance` of a recipe, from its line in the file to the picture, the plan, the manifest and the card."""

import base64
import io
import json
import re
import threading

import pytest
import yaml
from PIL import Image

import surgery
from surgery.artifact import read_manifest
from surgery.errors import RecipeError
from surgery.export.serve.replica import BatchRunner
from surgery.export.serve.request import BatchKey
from surgery.recipe.plan import make_plan
from surgery.runtime.draw import generate
from surgery.runtime.load import describe
from surgery.runtime.worker import ImageRequest, WorkerConfig
from surgery.validate.jobs import environment, identity_of

from ..conftest import PROMPTS, SHAPES


def recipe(folder, guidance, **sampling):
    path = folder / "guided.yaml"
    sampling = {"steps": 2, "guidance_scale": 4.0, "height": 64, "width": 64, **sampling}
    content = {
        "schema": 1,
        "name": "guided",
        "base": {"pipeline": str(SHAPES)},
        "operations": [{"replace": "cross-attention", "with": {"operator": "pladis"}}],
        "sampling": sampling,
    }
    path.write_text(yaml.safe_dump(content if guidance is None else {**content, "guidance": guidance}))
    return path


def test_an_artifact_is_drawn_with_its_guidance_and_says_so(tmp_path, run):
    plain = surgery.apply(recipe(tmp_path, None), tmp_path / "plain").folder
    folder = surgery.apply(recipe(tmp_path, {"method": "seg", "layers": "all"}), tmp_path / "seg").folder
    sampling = read_manifest(folder).sampling
    assert sampling["guidance"] == {"method": "seg", "scale": 3.0, "blur": 1e30, "layers": ["all"]}
    assert "guidance" not in read_manifest(plain).sampling
    card = (folder / "README.md").read_text()
    assert "Guided by seg (scale 3, blur infinite, layers all)" in card
    assert "surgery.guide(pipe, \"seg\", scale=3.0, blur=1e+30, layers=['all'])" in card
    pipelines = [surgery.load(one, quiet=True) for one in (plain, folder)]
    images = [
        generate(pipeline, PROMPTS[:1], [0], read_manifest(one).sampling)[PROMPTS[0], 0]
        for pipeline, one in zip(pipelines, (plain, folder), strict=True)
    ]
    assert images[0].tobytes() != images[1].tobytes()
    told = describe(pipelines[1], read_manifest(folder), folder, False)
    assert f"surgery.guide(pipe, {sampling['guidance']})" in told
    by_hand = surgery.guide(pipelines[0], sampling["guidance"])
    again = generate(by_hand, PROMPTS[:1], [0], read_manifest(plain).sampling)[PROMPTS[0], 0]
    assert again.tobytes() == images[1].tobytes()
    out = tmp_path / "drawn.png"
    done = run("generate", plain, PROMPTS[0], "--images", "1", "--out", out, "--guidance", "seg", "--json", check=0)
    assert json.loads(done.stdout)["sampling"]["guidance"]["method"] == "seg"
    wrong = ["--out", tmp_path / "y.png", "--guidance", "{method: seg, scal: 1.0}"]
    refused = run("generate", plain, PROMPTS[0], *wrong, check=2)
    assert "scal: extra inputs are not permitted" in refused.stderr


def test_a_plan_counts_the_evaluations_of_a_step_and_a_recipe_without_guidance_keeps_its_hashes(tmp_path, run):
    plain = make_plan(recipe(tmp_path, None)).plan
    assert plain.evaluations == 2 and plain.guidance is None
    assert make_plan(recipe(tmp_path, None, guidance_scale=1.0)).plan.evaluations == 1
    assert make_plan(recipe(tmp_path, "apg")).plan.evaluations == 2
    assert make_plan(recipe(tmp_path, "nag", guidance_scale=0.0)).plan.evaluations == 1
    weak = make_plan(recipe(tmp_path, {"method": "oseg", "fraction": [0.0, 0.5]})).plan
    assert weak.evaluations == 3 and weak.hash != plain.hash and weak.recipe_hash != plain.recipe_hash
    shown = run("plan", recipe(tmp_path, "pag"), check=0).stdout
    assert "sampling: 3 evaluations of the unet a step for each image, guided by pag (scale 3, layers mid)" in shown


@pytest.mark.parametrize(
    ("guidance", "says"),
    [
        ({"method": "segg"}, 'guidance.method.*did you mean "seg"'),
        ({"method": "seg", "scal": 2.0}, 'guidance.scal.*did you mean "scale"'),
        ({"method": "cfg", "scale": 2.0}, "guidance.scale"),
        ({"method": "seg", "fraction": [0.5, 0.2]}, "guidance.fraction.*must rise"),
        ({"method": "tsg", "noise": "much"}, "guidance.noise"),
        ({}, "guidance.method"),
    ],
)
def test_what_is_wrong_is_said_at_its_line(tmp_path, guidance, says):
    with pytest.raises(RecipeError) as caught:
        make_plan(recipe(tmp_path, guidance))
    assert re.search(says, str(caught.value)), str(caught.value)


def test_validation_draws_both_sides_with_the_guidance_and_keeps_their_images_apart_from_others(tmp_path):
    identities = []
    for name, guidance in (("plain", None), ("seg", "seg"), ("weak", {"method": "seg", "scale": 1.0})):
        folder = surgery.apply(recipe(tmp_path, guidance), tmp_path / name).folder
        identities.append(identity_of(read_manifest(folder), folder, environment("cpu", None)))
    plain, seg, weak = identities
    assert "guidance_code" not in plain and len(seg["guidance_code"]) == 12
    assert seg["sampling"] != weak["sampling"] and seg["base"] == weak["base"] == plain["base"]


def test_a_served_model_is_drawn_with_the_guidance_of_its_manifest(tmp_path):
    folder = surgery.apply(recipe(tmp_path, {"method": "seg", "layers": "all"}), tmp_path / "seg").folder
    key = BatchKey(steps=2, guidance_scale=4.0, width=64, height=64)
    manifest = read_manifest(folder)
    config = WorkerConfig(str(folder), None, manifest.hash, manifest.sampling, device="cpu", threads=1)
    served = BatchRunner(config, key, 2)
    (drawn,) = served.draw(key, [ImageRequest(PROMPTS[0], 0)], threading.Event())
    pipeline = surgery.load(folder, quiet=True)
    sampling = manifest.sampling
    expected, plain = (
        generate(pipeline, PROMPTS[:1], [0], {**sampling, "guidance": guidance})[PROMPTS[0], 0]
        for guidance in (sampling["guidance"], None)
    )
    image = Image.open(io.BytesIO(base64.b64decode(drawn.image)))
    assert image.tobytes() == expected.tobytes() != plain.tobytes()
