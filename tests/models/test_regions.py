"""Regional prompts on live pipelines: encoded by the pipeline, where they say, undone, and what is no region."""

import json

import pytest
import torch
from PIL import Image

import surgery
from surgery.recipe.reading import shipped_recipes

from .test_negative import draw, pipeline, shapes  # noqa: F401  fixtures

LEFT, RIGHT = [0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]


def test_a_region_changes_the_image_and_none_changes_no_bit(pipeline):  # noqa: F811
    base = draw(pipeline, scale=4.0)
    surgery.patch(pipeline, operator="regions", base=0.0)
    dense = draw(pipeline, scale=4.0)
    assert (dense - base).abs().max() < 1e-4
    whole = [{"prompt": "a circle", "box": [0, 0, 1, 1]}]
    surgery.regions(pipeline, whole)
    assert (draw(pipeline, scale=4.0) - base).abs().max() < 1e-3  # the prompt itself
    surgery.regions(pipeline, [{"prompt": "a red star", "box": LEFT}, {"prompt": "a square", "box": RIGHT}])
    two = draw(pipeline, scale=4.0)
    assert (two - base).abs().max() > 0.05
    surgery.regions(pipeline, [{"prompt": "a square", "box": RIGHT}, {"prompt": "a red star", "box": LEFT}])
    assert (draw(pipeline, scale=4.0) - two).abs().max() < 1e-3
    together = draw(pipeline, ["a circle", "a star"], (0, 1), scale=4.0)  # pyright: ignore[reportArgumentType] as lists do
    assert (together[0] - two[0]).abs().max() < 1e-3
    surgery.regions(pipeline, None)
    assert torch.equal(draw(pipeline, scale=4.0), dense)


def test_a_mask_is_as_the_box_that_it_draws_and_needs_no_graph(pipeline, tmp_path):  # noqa: F811
    surgery.patch(pipeline, operator="regions")
    surgery.regions(pipeline, [{"prompt": "a red star", "box": LEFT}])
    by_box = draw(pipeline)
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    mask.save(tmp_path / "mask.png")
    for given in (mask, tmp_path / "mask.png", torch.arange(64).expand(64, 64) < 32):
        surgery.regions(pipeline, [{"prompt": "a red star", "mask": given}])
        assert torch.equal(draw(pipeline), by_box)
    eager, pipeline.unet = pipeline.unet, torch.compile(pipeline.unet, fullgraph=True, backend="eager")
    try:
        found = draw(pipeline)
        surgery.regions(pipeline, [{"prompt": "a circle", "box": RIGHT}])
        with torch.compiler.set_stance("fail_on_recompile"):
            other = draw(pipeline)
    finally:
        pipeline.unet = eager
    assert (found - by_box).abs().max() < 1e-3 < (other - found).abs().max()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "must be a list"),
        ([{"prompt": "x"}], "either box"),
        ([{"prompt": " ", "box": LEFT}], r"regions\[0\].prompt must be text"),
        ([{"prompt": "x", "box": [0.5, 0, 0.2, 1]}], "each first below its second"),
        ([{"prompt": "x", "box": [0, 0, 64, 64]}], "parts of the image"),
        ([{"prompt": "x", "box": [0, 0, 1e-5, 1]}], "too small"),
        ([{"prompt": "x", "mask": "nowhere.png"}], "no file nowhere.png"),
        ([{"prompt": "x", "mask": torch.zeros(8, 8)}], "is empty"),
    ],
)
def test_what_is_no_region_is_named(pipeline, given, message):  # noqa: F811
    surgery.patch(pipeline, operator="regions")
    with pytest.raises(surgery.InputError, match=message):
        surgery.regions(pipeline, given)
    surgery.unpatch(pipeline)
    with pytest.raises(surgery.InputError, match='operator="regions"'):
        surgery.regions(pipeline, [{"prompt": "x", "box": LEFT}])


def test_a_recipe_has_regions_and_generate_others(tmp_path, run):
    recipe = {
        "schema": 1,
        "name": "regions",
        "base": {"pipeline": str(shipped_recipes()["shapes"].parent / "shapes")},
        "operations": [{"replace": "cross-attention", "with": {"operator": "regions", "base": 0.0}}],
        "sampling": {"steps": 2, "guidance_scale": 4.0, "regions": [{"prompt": "a red star", "box": LEFT}]},
    }
    (tmp_path / "regions.yaml").write_text(json.dumps(recipe))
    artifact = surgery.apply(tmp_path / "regions.yaml", tmp_path / "out").folder
    assert run("generate", artifact, "a circle", "--images", "1", "--out", tmp_path / "a.png").returncode == 0
    own = ["--region", "0,0,1,1=a blue square"]
    assert run("generate", artifact, "a circle", "--images", "1", "--out", tmp_path / "b.png", *own).returncode == 0
    drawn = [[(tmp_path / name / f"{side}-0-0.png").read_bytes() for side in ("base", "patched")] for name in "ab"]
    assert drawn[0][0] == drawn[1][0] and len({drawn[0][0], drawn[0][1], drawn[1][1]}) == 3
    for wrong, message in (
        ("0,0,1=x", "no file 0,0,1"),
        ("0,0,1,9=x", "parts of the image"),
        ("0,0,1,1", "write LEFT"),
    ):
        failed = run("generate", artifact, "a circle", "--region", wrong)
        assert failed.returncode == 2 and message in failed.stderr
    recipe["sampling"]["regions"][0]["box"] = [0.5, 0, 0.2, 1]
    (tmp_path / "typo.yaml").write_text(json.dumps(recipe))
    with pytest.raises(surgery.RecipeError, match="each first below its second"):
        surgery.plan(tmp_path / "typo.yaml")
