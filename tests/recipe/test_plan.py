"""Plans and anatomy: from config files alone, everything that will be done and why."""

import json
import shutil

import pytest
import torch

from surgery.errors import BaseError, InputError, RecipeError, UnsupportedModelError
from surgery.models.anatomy import attention_sites, build_on_meta
from surgery.models.inspecting import inspect_model
from surgery.nn.operators import OPERATORS
from surgery.recipe.plan import make_plan

from ..conftest import SHAPES, load_shapes
from ..tiny import tiny_svd_unet


@pytest.fixture
def base(tmp_path):
    """A copy of the shapes pipeline's text files, without any weights, and a recipe beside it."""
    for path in SHAPES.rglob("*.json"):
        target = tmp_path / "base" / path.relative_to(SHAPES)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    for path in SHAPES.rglob("*.safetensors"):  # right names, nothing inside: a plan reads no weights
        (tmp_path / "base" / path.relative_to(SHAPES)).write_bytes(b"")
    (tmp_path / "r.yaml").write_text(
        "schema: 1\nname: r\nbase: {pipeline: ./base}\n"
        "operations: [{replace: cross-attention, with: {operator: pladis}}]\n"
    )
    return tmp_path


def test_a_plan_needs_no_weights_and_says_what_is_replaced_and_what_not_and_why(base):
    plan = make_plan(base / "r.yaml").plan
    assert plan.totals["attention_modules"] == 14 and plan.totals["replaced"] == 7
    assert len(plan.operations[0]["layers"]) == 7 and all(p.endswith("attn2") for p in plan.operations[0]["layers"])
    assert set(plan.skipped.values()) == {"it is self-attention; sparsifying it destroys the image, so it stays dense"}
    assert all(site.heads * site.head_dim in (96, 128) for site in plan.sites)
    partial = make_plan(base / "r.yaml", ["operations.0.layers=[up, mid]"]).plan
    assert partial.totals["replaced"] == 5
    assert partial.skipped["down_blocks.1.attentions.0.transformer_blocks.0.attn2"] == "no operation selects it"
    assert {site.block for site in plan.sites} == {"down", "mid", "up"}


def test_a_plan_prints_as_json_and_its_hash_follows_its_content(base):
    plan = make_plan(base / "r.yaml").plan
    data = json.loads(json.dumps(plan.to_json()))
    assert data["schema_version"] == 1 and data["plan_hash"] == plan.hash and len(data["sites"]) == 14
    assert make_plan(base / "r.yaml").plan.hash == plan.hash
    assert make_plan(base / "r.yaml", ["operations.0.with.scale=1.9"]).plan.hash != plan.hash


def test_a_plan_carries_each_operators_own_settings_and_a_schedule_where_there_is_one(base):
    def operation_of(*overrides):
        plan = make_plan(base / "r.yaml", [f"operations.0.{override}" for override in overrides]).plan
        hashes.append(plan.hash)
        (operation,) = json.loads(json.dumps(plan.to_json()))["operations"]
        assert len(operation.pop("layers")) == 7
        return operation

    hashes = []
    gag = {"operator": "gag", **OPERATORS["gag"].defaults, "unit": "head"}
    assert operation_of("with.operator=gag") == gag
    assert operation_of("with={operator: gag, unit: token}") == {**gag, "unit": "token"}
    scheduled = operation_of("with.operator=gag", "schedule={steps: [5, null], zeta: [0, 1]}")
    assert scheduled == {**gag, "schedule": {"steps": [5, None], "zeta": [0, 1]}}
    assert operation_of("with={operator: sparse}") == {"operator": "sparse", "alpha": 1.5, "temperature": 1.0}
    assert len(set(hashes)) == 4


def test_the_anatomy_on_meta_is_that_of_the_live_model():
    unet = load_shapes().unet
    meta = build_on_meta("UNet2DConditionModel", dict(unet.config))
    assert attention_sites(meta) == attention_sites(unet)
    assert {parameter.device.type for parameter in meta.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("break_it", "error", "message"),
    [
        (lambda b: shutil.rmtree(b / "base"), BaseError, "there is no folder"),
        (lambda b: (b / "base/model_index.json").unlink(), BaseError, "no file model_index.json"),
        (lambda b: (b / "base/unet/config.json").write_text("{"), BaseError, "config.json cannot be read as JSON"),
        (lambda b: (b / "base/unet/diffusion_pytorch_model.safetensors").unlink(), BaseError, "no weights for unet"),
        (lambda b: shutil.rmtree(b / "base/vae"), BaseError, "names the component vae"),
        (lambda b: edit(b / "base/unet/config.json", block_out_channels=[3]), BaseError, "cannot build"),
        (
            lambda b: edit(b / "base/model_index.json", unet=["diffusers", "UNet3DConditionModel"]),
            UnsupportedModelError,
            "there is no surgery for UNet3DConditionModel;",
        ),
        (
            lambda b: edit(b / "base/model_index.json", _class_name="StableDiffusionImageVariationPipeline"),
            UnsupportedModelError,
            "a single key, where PLADIS changes nothing",
        ),
        (lambda b: edit(b / "base/model_index.json", unet=[None, None]), UnsupportedModelError, "neither a unet nor"),
    ],
)
def test_a_broken_base_is_a_clear_error(base, break_it, error, message):
    break_it(base)
    with pytest.raises(error, match=message):
        make_plan(base / "r.yaml")


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("base.pipeline=not a name", InputError, "neither a Hub repository"),
        ("base.revision=abc", InputError, "has no revision"),
        ("base.variant=fp16", BaseError, "no weights of variant 'fp16'; it has none"),
        ("base.components.unet={file: other.safetensors}", BaseError, "other.safetensors is not there; give `repo`"),
        ("base.scheduler.class=LCMSchedulr", RecipeError, 'did you mean "LCMScheduler"'),
        ("base.scheduler={class: LCMScheduler, timestep_spacin: x}", RecipeError, 'did you mean "timestep_spacing"'),
        ("base.scheduler={class: SchedulerMixin}", RecipeError, "diffusers has no scheduler SchedulerMixin"),
        (
            "base.scheduler={class: FlowMatchEulerDiscreteScheduler}",
            RecipeError,
            "does not fit a pipeline made for DDIM",
        ),
        ("base.scheduler={class: DDIMScheduler, timestep_spacing: traling}", RecipeError, "does not work with"),
        ("base.scheduler={class: DDIMScheduler, beta_schedule: nope}", RecipeError, "does not work with"),
        ("sampling.timesteps=[999, 500, 1]", RecipeError, "DDIMScheduler takes no timesteps of one's own"),
        (
            "base.scheduler={class: UNet2DConditionModel}",
            RecipeError,
            "diffusers has no scheduler UNet2DConditionModel",
        ),
    ],
)
def test_a_wrong_base_section_is_a_clear_error(base, override, error, message):
    with pytest.raises(error, match=message):
        make_plan(base / "r.yaml", [override])


def test_inspect_lists_any_backbone_and_says_why_surgery_does_not_fit(tmp_path):
    found = inspect_model(SHAPES)
    assert found["fits"] and found["replaceable"] == 7
    tiny_svd_unet().save_config(tmp_path / "unet")
    index = {"_class_name": "StableVideoDiffusionPipeline", "unet": ["diffusers", "UNetSpatioTemporalConditionModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    found = inspect_model(tmp_path)
    assert not found["fits"] and "single key" in found["refusal"] and len(found["sites"]) > 0

    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        flux = FluxTransformer2DModel(
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=[4, 4, 8],
        )
    flux.save_config(tmp_path / "transformer")
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    found = inspect_model(tmp_path)
    assert found["fits"] and found["replaceable"] == 2
    found = [(site.kind, site.block, site.module_class) for site in found["sites"]]
    assert found == [("joint", "double", "FluxAttention"), ("joint", "single", "FluxAttention")]
