"""Self-attention replaced: the experiment of PLADIS, Fig. 3, on request alone, warned of wherever it is seen."""

import json
import math

import pytest
import torch
import yaml

import surgery
from surgery.errors import InputError, RecipeError
from surgery.models.selection import DESTROYS

from ..conftest import SHAPES, draw, load_shapes
from ..nn.backbones.two_streams import qwen_image
from ..nn.backbones.video import wan
from ..nn.oracle import entmax_oracle


def recipe(folder, *operations, base=SHAPES):
    """The path of a recipe with these operations."""
    text = {"schema": 1, "name": "r", "base": {"pipeline": str(base)}, "operations": list(operations)}
    (folder / "r.yaml").write_text(yaml.safe_dump(text))
    return folder / "r.yaml"


SPARSE = {"replace": "self-attention", "layers": "up", "with": {"operator": "sparse"}}


@torch.no_grad()
def test_its_rows_are_sparse_over_the_image_itself_and_it_goes_away_again(pipeline):
    base = draw(pipeline)
    with pytest.warns(UserWarning, match="self-attention, which destroys images"):
        surgery.patch(pipeline, operator="sparse", layers="up", replace="self-attention")
    paths = pipeline.unet.config.pladis[0]["layers"]
    assert paths and all(path.endswith("attn1") for path in paths)
    assert pipeline.unet.config.pladis[0]["replace"] == "self-attention"
    module = pipeline.unet.get_submodule(paths[0])
    hidden = torch.randn(1, 9, module.to_q.in_features, generator=torch.Generator().manual_seed(0))
    query, key, value = (
        (hidden @ part.weight.T).double().unflatten(-1, (module.heads, -1)).transpose(1, 2)
        for part in (module.to_q, module.to_k, module.to_v)
    )
    weights = entmax_oracle(query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]), 1.5)
    expected = module.to_out[0]((weights @ value).transpose(1, 2).flatten(2).float())
    assert torch.allclose(module(hidden), expected, atol=1e-5)
    assert (draw(pipeline) - base).abs().max() > 0.02
    surgery.tune(pipeline, alpha=1.0)
    assert (draw(pipeline) - base).abs().max() < 1e-4
    surgery.unpatch(pipeline)
    assert torch.equal(draw(pipeline), base)


def test_a_recipe_with_it_is_planned_applied_loaded_and_its_card_says_what_it_does(tmp_path, run):
    path = recipe(tmp_path, SPARSE, {"replace": "cross-attention", "layers": "up", "with": {"operator": "pladis"}})
    planned = run("plan", path, "--json", check=0)
    assert f"surgery: warning: operations[0]: {DESTROYS}" in planned.stderr
    assert json.loads(planned.stdout)["warnings"] == [f"operations[0]: {DESTROYS}"]
    applied = run("apply", path, "--out", tmp_path / "out", check=0)
    assert DESTROYS in applied.stderr
    assert f"**Warning**: {DESTROYS}." in (tmp_path / "out/README.md").read_text()
    pipeline = surgery.load(tmp_path / "out", verify=True, quiet=True)
    kinds = {operation.get("replace"): operation["layers"] for operation in pipeline.unet.config.pladis}
    assert all(p.endswith("attn1") for p in kinds["self-attention"]) and all(p.endswith("attn2") for p in kinds[None])
    live = surgery.patch(load_shapes(), layers="up")
    assert (draw(live) - draw(pipeline)).abs().max() > 0.01


@pytest.mark.parametrize("operation", [{}, {"layers": "all"}, {"layers": "*"}])
def test_nothing_selects_it_unasked(tmp_path, operation):
    plan = surgery.plan(recipe(tmp_path, {"replace": "cross-attention", "with": {"operator": "gag"}, **operation})).plan
    assert all(path.endswith("attn2") for op in plan.operations for path in op["layers"]) and not plan.warnings


def test_what_has_none_to_replace_says_why(tmp_path):
    with pytest.raises(InputError, match="joint attention, in which image and text share one softmax"):
        surgery.patch(qwen_image()[0], replace="self-attention")
    with pytest.raises(InputError, match="turn by their place"):
        surgery.patch(wan()[0], replace="self-attention")
    with pytest.raises(InputError, match="unknown replace 'self'; there are cross-attention, joint-attention, self"):
        surgery.patch(load_shapes(), replace="self")
    with pytest.raises(RecipeError, match="'\\*attn2' matches 7 cross-attention modules and no self-attention"):
        surgery.plan(recipe(tmp_path, {**SPARSE, "layers": "*attn2"}))
