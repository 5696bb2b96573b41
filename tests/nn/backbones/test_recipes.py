"""Recipes of the other backbones: blocks, weights of a transformer, sampling that only some of them have."""

import json

import pytest

import surgery
from surgery.errors import RecipeError
from surgery.recipe.plan import make_plan
from surgery.runtime.draw import calling_back, draw

from ...conftest import SHAPES
from .cross import pixart
from .flux import flux
from .two_streams import qwen_image
from .video import ltx


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with the tiny FLUX.1."""
    folder = tmp_path_factory.mktemp("flux")
    flux()[0].save_pretrained(folder / "base")
    return folder


def plan(folder, operation=None, **more):
    """The Plan of a recipe with one operation on the base in `folder`."""
    operation = {"replace": "joint-attention", "with": {"operator": "pladis"}, **(operation or {})}
    base = {"pipeline": "./base", **more.pop("base", {})}
    recipe = {"schema": 1, "name": "tiny", "base": base, "operations": [operation], **more}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return make_plan(folder / "recipe.yaml").plan


def test_blocks_restrict_an_operation_and_a_recipe_that_does_not_name_them_keeps_its_hash(base):
    paths = {blocks: plan(base, {"blocks": blocks}).operations[0]["layers"] for blocks in ("all", "double", "single")}
    assert paths["double"] and all(path.startswith("transformer_blocks.") for path in paths["double"])
    assert paths["single"] and all(path.startswith("single_transformer_blocks.") for path in paths["single"])
    assert sorted(paths["double"] + paths["single"]) == sorted(paths["all"])
    assert plan(base).recipe_hash == plan(base, {"blocks": "all"}).recipe_hash
    assert plan(base).recipe_hash != plan(base, {"blocks": "single"}).recipe_hash
    assert plan(base, {"layers": "single"}).operations == plan(base, {"blocks": "single"}).operations


@pytest.mark.parametrize(
    ("pipeline", "operation", "more", "says"),
    [
        (str(SHAPES), {"blocks": "single"}, {}, "has no joint attention in single blocks"),
        (str(SHAPES), {}, {}, "has no joint attention"),
        ("./base", {"blocks": "triple"}, {}, "blocks"),
        ("./base", {}, {"components": {"unet": {"file": "u.safetensors"}}}, "the base's denoiser is its transformer"),
    ],
)
def test_what_a_recipe_cannot_have_there_is_said_at_its_key(base, pipeline, operation, more, says):
    with pytest.raises(RecipeError, match=says):
        plan(base, operation, base={"pipeline": pipeline, **more})


def test_a_transformers_weights_can_be_another_files(base):
    weights = "base/transformer/diffusion_pytorch_model.safetensors"
    (file,) = [f for f in plan(base, base={"components": {"transformer": {"file": weights}}}).files if f.weights][:1]
    wanted = plan(base, base={"components": {"transformer": {"file": weights}}})
    origins = {f.path: f.origin.kind for f in wanted.files if f.weights and f.path.startswith("transformer/")}
    assert set(origins.values()) == {"component"} and file.size


def test_true_guidance_and_a_negative_prompt_of_a_recipe_reach_the_pipeline():
    pipeline, arguments = qwen_image()
    size = {"height": 32, "width": 32, "steps": 2, "max_sequence_length": arguments["max_sequence_length"]}
    guided = {**size, "true_cfg_scale": 4.0, "negative_prompt": "bad"}
    surgery.patch(pipeline)
    images = [draw(pipeline, [("a cat", 0), ("a dog", 1)], sampling) for sampling in (size, guided)]
    assert len(images[0]) == 2 and images[0][0].tobytes() != images[1][0].tobytes()


def test_pixarts_older_callback_is_called_after_each_step_too():
    pipeline, arguments = pixart()
    pipeline.set_progress_bar_config(disable=True)
    steps = []

    def on_step(given, step, timestep, tensors):
        steps.append((given is pipeline, step, int(timestep), tuple(tensors)))
        return tensors

    pipeline(**{**arguments, "output_type": "latent"}, **calling_back(pipeline, on_step))
    timesteps = pipeline.scheduler.timesteps.tolist()
    assert steps == [(True, step, timesteps[step], ("latents",)) for step in (0, 1)]
    assert calling_back(ltx()[0], on_step) == {"callback_on_step_end": on_step}
