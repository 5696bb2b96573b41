"""AutoGuidance with another checkpoint: its formula, what it records, and what is refused."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import surgery
from surgery.artifact import read_manifest
from surgery.errors import BaseError, InputError, PublishError, RecipeError
from surgery.export.publish import push
from surgery.guidance.attaching import driver_of
from surgery.recipe.plan import make_plan
from surgery.runtime.draw import generate
from surgery.validate.jobs import environment, identity_of

from ..conftest import PROMPTS, SHAPES, load_shapes
from ..loopback_hub import hub_server
from ..publish.conftest import use_hub  # noqa: F401 a fixture
from .oracles import calls_of_first_step, sampled

CALL = {"prompt": PROMPTS, "num_inference_steps": 1, "guidance_scale": 4.0, "height": 64, "width": 64}
CALL |= {"output_type": "latent"}


@pytest.fixture(scope="module")
def worse(tmp_path_factory):
    """A folder with another UNet of the shapes pipeline's kind: its weights with noise on them."""
    folder = tmp_path_factory.mktemp("weak") / "worse"
    unet = load_shapes().unet
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter += 0.05 * parameter.std(correction=0) * torch.randn_like(parameter)
    unet.save_pretrained(folder / "unet")
    shutil.copytree(SHAPES / "scheduler", folder / "scheduler")
    return folder


def altered(worse, folder, **config):
    """A copy of that folder with other entries in the UNet's config."""
    shutil.copytree(worse, folder)
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return {"pipeline": str(folder)}


def recipe(folder, weak, **settings):
    path = folder / "weak.yaml"
    content = {
        "schema": 1,
        "name": "weak",
        "base": {"pipeline": str(SHAPES)},
        "operations": [{"replace": "cross-attention", "with": {"operator": "pladis"}}],
        "sampling": {"steps": 1, "guidance_scale": 4.0, "height": 64, "width": 64},
        "guidance": {"method": "autoguidance", "weak": weak, **settings},
    }
    path.write_text(yaml.safe_dump(content))
    return path


def test_it_leads_away_from_the_other_checkpoints_output_for_the_prompt(pipeline, worse):
    call = {**calls_of_first_step(pipeline, CALL)[0], "return_dict": False}
    weak = type(pipeline.unet).from_pretrained(worse, subfolder="unet")
    with torch.no_grad():
        uncond, cond = pipeline.unet(**call)[0].double().chunk(2)
        bad = weak(**call)[0].double().chunk(2)[1]
    expected = uncond + 4.0 * (cond - uncond) + 1.5 * (cond - bad)
    settings = {"scale": 1.5, "weak": {"pipeline": str(worse)}}
    surgery.guide(pipeline, "autoguidance", **settings)
    found = sampled(pipeline, CALL)[1][0]
    assert torch.allclose(found.double(), expected, atol=1e-4)
    assert driver_of(pipeline).evaluations == driver_of(pipeline).method.evaluations(True) * 2 == 6
    alone = sampled(pipeline, {**CALL, "guidance_scale": 1.0})[1][0]  # W + (1 + scale) (C - W), the paper's
    assert torch.allclose(alone.double(), bad + 2.5 * (cond - bad), atol=1e-4)
    surgery.unguide(pipeline)
    plain = sampled(pipeline, CALL)[1][0]
    assert torch.allclose(plain.double(), uncond + 4.0 * (cond - uncond), atol=1e-4)
    surgery.patch(pipeline)  # the other one stays as it is
    surgery.guide(pipeline, "autoguidance", **settings)
    with torch.no_grad():
        patched = pipeline.unet(**call)[0].double().chunk(2)
    expected = patched[0] + 4.0 * (patched[1] - patched[0]) + 1.5 * (patched[1] - bad)
    assert torch.allclose(sampled(pipeline, CALL)[1][0].double(), expected, atol=1e-4)


def test_it_is_in_the_models_dtype_and_loaded_once_for_all_batches(pipeline, worse):
    seen = []
    pipeline.to(torch.float64)
    for _ in range(2):
        driver = driver_of(surgery.guide(pipeline, "autoguidance", weak={"pipeline": str(worse)}))
        output_of = driver.output_of
        driver.output_of = lambda call, model=None, output_of=output_of: seen.append(model) or output_of(call, model)
        sampled(pipeline, CALL)
        surgery.unguide(pipeline)
    assert {parameter.dtype for parameter in seen[0].parameters()} == {torch.float64} and seen[0] is seen[1]


def test_a_recipe_pins_it_and_its_artifact_draws_with_it(worse, tmp_path, run):
    shutil.copytree(worse, tmp_path / "worse")
    path = recipe(tmp_path, {"pipeline": "./worse"}, scale=1.5)  # from the recipe's folder on
    planned = make_plan(path).plan
    weak = planned.guidance["weak"]
    assert weak["pipeline"] == str(tmp_path / "worse") and weak["subfolder"] == "unet" and len(weak["sha256"]) == 64
    assert planned.guidance == {"method": "autoguidance", "scale": 1.5, "weak": weak} and planned.evaluations == 3
    assert "weak " + weak["pipeline"] in run("plan", path, check=0).stdout
    folder = surgery.apply(path, tmp_path / "out").folder
    manifest = read_manifest(folder)
    assert manifest.sampling["guidance"] == planned.guidance
    pipeline = surgery.load(folder, quiet=True)
    drawn, plain = (
        generate(pipeline, PROMPTS[:1], [0], {**manifest.sampling, "guidance": guidance})[PROMPTS[0], 0].tobytes()
        for guidance in (manifest.sampling["guidance"], None)
    )
    assert drawn != plain
    with pytest.raises(PublishError, match="which nobody else has"):
        push(folder, "me/weak")
    before = identity_of(manifest, folder, environment("cpu", None))
    weights = tmp_path / "worse" / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(BaseError, match="was altered since"):
        generate(surgery.load(folder, quiet=True), PROMPTS[:1], [0], manifest.sampling)
    again = read_manifest(surgery.apply(path, tmp_path / "again").folder)
    assert identity_of(again, folder, environment("cpu", None))["sampling"] != before["sampling"]


def test_a_repository_is_pinned_to_its_commit(pipeline, worse, tmp_path, use_hub):  # noqa: F811
    with hub_server() as server:
        server.create("me/worse", worse)
        commit = server.commits("me/worse")[0]
        use_hub(server)
        weak = make_plan(recipe(tmp_path, {"pipeline": "me/worse"})).plan.guidance["weak"]
        assert weak == {"pipeline": "me/worse", "revision": getattr(commit, "oid", commit), "subfolder": "unet"}
        server.commit_as_other("me/worse", {"unet/config.json": b"{}"})  # what is drawn stays as it was
        surgery.guide(pipeline, "autoguidance", weak=weak)
        from_hub = sampled(pipeline, CALL)[0]
        surgery.unguide(pipeline)
        (file,) = (tmp_path / "home" / "hub").rglob("diffusion_pytorch_model.safetensors")
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.resolve().write_bytes(data)
        with pytest.raises(BaseError, match="is not what the Hub lists"):
            surgery.guide(load_shapes(), "autoguidance", weak=weak)
    surgery.guide(pipeline, "autoguidance", weak={"pipeline": str(worse)})
    assert torch.equal(sampled(pipeline, CALL)[0], from_hub)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"in_channels": 9}, "has in_channels 9, and the model has 4"),
        ({"cross_attention_dim": 8}, r"worse.*unet/config.json has cross_attention_dim 8, and the model has \d+"),
        ({"_class_name": "SD3Transformer2DModel"}, "is a SD3Transformer2DModel, the model a UNet2DConditionModel"),
    ],
)
def test_one_that_does_not_fit_is_refused_with_what_both_have(pipeline, worse, tmp_path, config, says):
    weak = altered(worse, tmp_path / "worse", **config)
    with pytest.raises(InputError, match=says):
        surgery.guide(pipeline, "autoguidance", weak=weak)
    with pytest.raises(RecipeError, match=f"guidance.weak.*{says}"):
        make_plan(recipe(tmp_path, weak))


def test_what_else_is_wrong_is_said(pipeline, worse, tmp_path):
    weak = {"pipeline": str(worse)}
    for settings, says in (
        ({"weak": {"pipeline": str(worse), "subfolder": "vae"}}, "has no vae/config.json"),
        ({"weak": {"pipeline": str(worse), "revision": "main"}}, "has no revision"),
        ({"weak": {**weak, "pipline": "x"}}, "guidance.weak.pipline: extra"),
        ({"weak": weak, "dropout": 0.5}, "dropout is of the stand-in"),
    ):
        with pytest.raises(InputError, match=says):
            surgery.guide(pipeline, "autoguidance", **settings)
    with pytest.raises(RecipeError, match='guidance.weak.pipline.*did you mean "pipeline"'):
        make_plan(recipe(tmp_path, {"pipline": str(worse)}))
    other = altered(worse, tmp_path / "other")
    path = tmp_path / "other" / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "prediction_type": "sample"}))
    with pytest.raises(InputError, match="predicts sample, and the model"):
        surgery.guide(pipeline, "autoguidance", weak=other)
    fewer = altered(worse, tmp_path / "fewer")
    path = tmp_path / "fewer" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if name != "conv_out.bias"}, path)
    with pytest.raises(BaseError, match="lacks 1 weights that its config asks for, such as conv_out.bias"):
        surgery.guide(pipeline, "autoguidance", weak=fewer)
