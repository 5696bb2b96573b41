"""Negative prompts in attention on live pipelines: by the pipeline's own encoders, for each image, with CFG, undone."""

import json

import pytest
import torch

import surgery
from surgery.models.patching import operate
from surgery.nn.additions import WORD
from surgery.recipe.reading import shipped_recipes

from ..conftest import load_shapes
from ..nn.backbones.video import wan


@pytest.fixture(scope="module")
def shapes():
    pipeline = load_shapes()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline(shapes):
    """The shapes pipeline; whatever a test patches is taken out again."""
    own = type(shapes)
    yield shapes
    operate(shapes, None)
    assert type(shapes) is own


def draw(pipeline, prompt="a circle", seeds=(0,), scale=1.0, **more):
    seeds = [torch.Generator().manual_seed(seed) for seed in seeds]
    prompt = [prompt] * len(seeds) if isinstance(prompt, str) else prompt
    size = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent", "guidance_scale": scale}
    return pipeline(prompt, generator=seeds, **size, **more).images


@pytest.mark.parametrize("operator", ["nag", "vsf"])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_an_empty_negative_prompt_changes_no_bit_and_another_does(pipeline, operator, scale):
    surgery.patch(pipeline, scale=0.0)
    base = draw(pipeline, scale=scale)
    surgery.unpatch(pipeline)
    surgery.patch(pipeline, operator=operator)
    assert torch.equal(draw(pipeline, scale=scale), base)
    surgery.negative(pipeline, "")
    assert torch.equal(draw(pipeline, scale=scale), base)
    surgery.negative(pipeline, "red")
    changed = draw(pipeline, scale=scale)
    assert (changed - base).abs().max() > 0.01
    surgery.negative(pipeline, None)
    assert torch.equal(draw(pipeline, scale=scale), base)
    if scale == 1.0:  # with CFG the argument is CFG's too
        assert torch.equal(draw(pipeline, negative_prompt="red"), changed)


def test_nag_from_the_prompt_itself_is_nothing(pipeline):
    base = draw(pipeline, scale=4.0)
    surgery.patch(pipeline, operator="nag", phi=20.0, blend=1.0)
    surgery.negative(pipeline, "a circle")
    assert (draw(pipeline, scale=4.0) - base).abs().max() < 1e-4


def test_each_image_of_a_batch_has_its_own(pipeline):
    surgery.patch(pipeline, operator="nag")
    together = draw(pipeline, ["a circle", "a star", "a circle"], (0, 1, 2), negative_prompt=["red", "", "blue"])
    for index, (prompt, negative) in enumerate([("a circle", "red"), ("a star", ""), ("a circle", "blue")]):
        alone = draw(pipeline, prompt, (index,), negative_prompt=negative)
        assert (together[index] - alone[0]).abs().max() < 1e-3
    twice = draw(pipeline, "a circle", (0,), negative_prompt="red")
    both = pipeline(
        "a circle",
        negative_prompt="red",
        num_images_per_prompt=2,
        generator=[torch.Generator().manual_seed(seed) for seed in (0, 5)],
        height=64,
        width=64,
        num_inference_steps=2,
        output_type="latent",
        guidance_scale=1.0,
    ).images
    assert (both[0] - twice[0]).abs().max() < 1e-3
    with pytest.raises(surgery.InputError, match="2 negative prompts for 1"):
        surgery.negative(pipeline, ["red", "blue"])
        draw(pipeline)


def test_modules_without_the_addition_are_not_shown_the_negative_prompt(pipeline):
    surgery.patch(pipeline, operator="nag", layers="up", blend=0.0)
    base = draw(pipeline, scale=4.0)
    surgery.negative(pipeline, "red")
    assert (draw(pipeline, scale=4.0) - base).abs().max() < 1e-5
    surgery.tune(pipeline, blend=0.5)
    assert (draw(pipeline, scale=4.0) - base).abs().max() > 0.01


def test_it_stands_on_pladis_where_a_module_has_both(pipeline):
    surgery.patch(pipeline, scale=1.0, layers="up")
    pladis = draw(pipeline)
    surgery.patch(pipeline, operator="nag", layers=["mid", "up"])
    found = [(one["operator"], one.get("scale"), len(one["layers"])) for one in pipeline.unet.pladis_operations()]
    assert found == [("pladis", 1.0, 4), ("nag", None, 5), ("pladis", 0.0, 1)]
    assert (draw(pipeline) - pladis).abs().max() < 1e-4
    with pytest.raises(surgery.InputError, match="second time"):
        surgery.patch(pipeline, operator="vsf", layers="up")
    assert len(pipeline.unet.pladis_operations()) == 3  # nothing is lost


def test_guidance_goes_with_it_in_any_order(pipeline):
    surgery.patch(pipeline, operator="nag")
    surgery.guide(pipeline, "pag", scale=1.0)
    surgery.negative(pipeline, "red")
    changed = draw(pipeline, scale=4.0)
    surgery.negative(pipeline, "")
    assert (draw(pipeline, scale=4.0) - changed).abs().max() > 0.01
    surgery.unpatch(pipeline)
    draw(pipeline, scale=4.0)
    surgery.unguide(pipeline)


def test_its_schedule_is_carried_out(pipeline):
    surgery.patch(pipeline, operator="nag", schedule={"steps": [0, 1]})
    surgery.negative(pipeline, "red")
    always = draw(pipeline)
    with pipeline.unet.scheduled(pipeline, 2) as callback:
        assert (draw(pipeline, callback_on_step_end=callback) - always).abs().max() > 1e-3


@pytest.mark.slow
def test_another_prompt_needs_no_graph(pipeline):
    surgery.patch(pipeline, operator="nag")
    surgery.negative(pipeline, "red")
    always = draw(pipeline)
    compiled = torch.compile(pipeline.unet, fullgraph=True, backend="eager")
    eager, pipeline.unet = pipeline.unet, compiled
    try:
        found = draw(pipeline)
        surgery.negative(pipeline, "blue")
        with torch.compiler.set_stance("fail_on_recompile"):
            blue = draw(pipeline)
    finally:
        pipeline.unet = eager
    assert (found - always).abs().max() < 1e-3 < (blue - found).abs().max()


def test_cfgs_own_call_without_the_prompt_has_words_alone():
    pipeline, arguments = wan()
    pipeline.set_progress_bar_config(disable=True)
    surgery.patch(pipeline, operator="words")
    seen = []
    module = next(module for module in pipeline.transformer.modules() if hasattr(module, "pladis_teller"))
    module.register_forward_hook(lambda module, args, output: seen.append(module.pladis_teller.told.kinds))
    pipeline(**{**arguments, "guidance_scale": 3.0})
    assert len(seen) == 4 and (seen[0] != WORD).any() and (seen[1] == WORD).all()


@pytest.mark.parametrize("operator", ["words", "shares"])
def test_words_and_padding_are_told_apart_by_the_tokenizer(pipeline, operator):
    surgery.patch(pipeline, scale=1.0)
    base = draw(pipeline, scale=4.0)
    surgery.patch(pipeline, operator=operator)
    changed = draw(pipeline, scale=4.0)
    assert changed.isfinite().all() and (changed - base).abs().max() > 0.01
    embeds = pipeline.encode_prompt("a circle", "cpu", 1, False)[0]
    with pytest.raises(surgery.InputError, match="not prompt_embeds"):
        pipeline(prompt_embeds=embeds, num_inference_steps=1, guidance_scale=1.0, height=64, width=64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe: surgery.negative(pipe, "red"), 'surgery.patch\\(pipe, operator="nag"\\)'),
        (lambda pipe: surgery.negative(surgery.patch(pipe, operator="nag"), 3), "must be text"),
        (lambda pipe: surgery.patch(pipe, operator="nag", scale=1.0), "nag has no scale; it has phi, tau, blend"),
        (lambda pipe: surgery.patch(pipe, operator="nag", tau=0.0), "tau must be above 0"),
        (lambda pipe: surgery.patch(pipe, operator="taca"), "taca is for joint attention"),
        (lambda pipe: surgery.patch(surgery.patch(pipe, operator="anderson_history"), operator="nag"), "keeps one"),
    ],
)
def test_what_does_not_fit_says_what_to_do(pipeline, call, message):
    with pytest.raises(surgery.InputError, match=message):
        call(pipeline)


def test_a_recipe_becomes_an_artifact_that_has_it(tmp_path, pipeline):
    recipe = {
        "schema": 1,
        "name": "nag",
        "base": {"pipeline": str(shipped_recipes()["shapes"].parent / "shapes")},
        "operations": [
            {"replace": "cross-attention", "with": {"operator": "pladis", "scale": 0.5}, "layers": "up"},
            {"replace": "cross-attention", "with": {"operator": "nag", "phi": 4.0}, "schedule": {"fraction": [0, 0.5]}},
        ],
        "sampling": {"steps": 2, "guidance_scale": 1.0, "negative_prompt": "red"},
    }
    (tmp_path / "nag.yaml").write_text(json.dumps(recipe))
    artifact = surgery.apply(tmp_path / "nag.yaml", tmp_path / "out")
    loaded = surgery.load(artifact.folder, quiet=True)
    loaded.set_progress_bar_config(disable=True)
    found = loaded.unet.pladis_operations()
    assert {one["operator"]: one.get("schedule") for one in found} == {"pladis": None, "nag": {"fraction": [0, 0.5]}}
    assert [one["phi"] for one in found if one["operator"] == "nag"] == [4.0]
    surgery.negative(loaded, "red")
    operate(pipeline, found)
    surgery.negative(pipeline, "red")
    assert (draw(loaded) - draw(pipeline)).abs().max() < 1e-5
    recipe["operations"][1]["with"]["operator"] = "nga"
    (tmp_path / "typo.yaml").write_text(json.dumps(recipe))
    with pytest.raises(surgery.RecipeError, match='did you mean "nag"'):
        surgery.plan(tmp_path / "typo.yaml")
    recipe["operations"][1]["with"] = {"operator": "taca"}
    del recipe["operations"][1]["schedule"]
    (tmp_path / "taca.yaml").write_text(json.dumps(recipe))
    with pytest.raises(surgery.RecipeError, match="joint attention"):
        surgery.plan(tmp_path / "taca.yaml")


def test_a_patched_module_without_the_addition_is_not_shown_it_either(pipeline):
    surgery.patch(pipeline, scale=1.0)
    surgery.patch(pipeline, operator="nag", layers="up", blend=0.0)
    base = draw(pipeline, scale=4.0)
    surgery.negative(pipeline, "red")
    assert (draw(pipeline, scale=4.0) - base).abs().max() < 1e-4
