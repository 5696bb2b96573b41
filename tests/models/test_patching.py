"""surgery.patch, tune and unpatch on live pipelines, and saving what they made."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention

import surgery
from surgery.errors import InputError, UnsupportedModelError
from surgery.models.anatomy import refusal_of_class
from surgery.nn import is_pladis

from ..conftest import draw
from ..tiny import tiny_sdxl, tiny_svd_unet


def settings_of(pipeline):
    return {path: m.hyperparameters() for path, m in pipeline.unet.named_modules() if is_pladis(m)}


def test_patch_tune_and_unpatch(pipeline):
    base = draw(pipeline)
    pointers = {name: tensor.data_ptr() for name, tensor in pipeline.unet.named_parameters()}
    assert surgery.patch(pipeline) is pipeline
    wanted = {"alpha": 1.5, "scale": 2.0, "temperature": 1.0, "sparse_temperature": 1.0}
    assert all(setting == wanted for setting in settings_of(pipeline).values())
    assert len(settings_of(pipeline)) == 7
    assert {name: tensor.data_ptr() for name, tensor in pipeline.unet.named_parameters()} == pointers
    assert (draw(pipeline) - base).abs().max() > 0.05
    surgery.tune(pipeline, scale=0.0)
    assert (draw(pipeline) - base).abs().max() < 1e-3
    surgery.unpatch(pipeline)
    assert type(pipeline.unet) is UNet2DConditionModel and "pladis" not in pipeline.unet.config
    assert torch.equal(draw(pipeline), base)


def test_layers_select_by_block_and_pattern(pipeline):
    for layers, count in (
        (["down", "up"], 6),
        ("mid", 1),
        ("up_blocks.1.*", 2),
        (["mid", "*.attentions.0.*"], 5),
        ("all", 7),
    ):
        surgery.patch(pipeline, layers=layers)
        assert len(settings_of(pipeline)) == count
        surgery.unpatch(pipeline)


def test_tune_some_layers_and_the_config_follows(pipeline, tmp_path):
    surgery.patch(pipeline, alpha=1.25)
    surgery.tune(pipeline, layers="mid", scale=0.5, temperature=0.8)
    assert [op["scale"] for op in pipeline.unet.config.pladis] == [2.0, 0.5]
    pipeline.save_pretrained(tmp_path / "saved")
    assert settings_of(surgery.load(tmp_path / "saved", quiet=True)) == settings_of(pipeline)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: surgery.patch(p, alpha=2.5), r"alpha must lie in \[1, 2\]"),
        (lambda p: surgery.patch(p, scale=float("nan")), "scale must be a finite number"),
        (lambda p: surgery.patch(p, temperature=0), "temperature must be above 0"),
        (lambda p: surgery.patch(p, scale="2"), "scale must be a finite number"),
        (lambda p: surgery.patch(p, operator="pladiss"), "unknown operator 'pladiss'"),
        (lambda p: surgery.patch(p, implementation="fast"), "unknown implementation 'fast'"),
        (lambda p: surgery.patch(p, layers="down_blocks.7.*"), "matches no module"),
        (lambda p: surgery.patch(p, layers="*attn1"), "7 self-attention modules and no cross-attention"),
        (lambda p: surgery.patch(p, layers="uop"), 'did you mean "up"'),
        (lambda p: surgery.patch(p, layers=[]), "nothing is selected"),
        (lambda p: surgery.tune(p, scale=1.0), "not patched"),
        (lambda p: surgery.unpatch(p), "not a patched pipeline"),
        (lambda p: surgery.patch(surgery.patch(p)), "patched already"),
        (lambda p: surgery.tune(surgery.patch(p, layers="up"), scale=1, layers="down"), "no cross-attention there"),
    ],
)
def test_a_wrong_call_is_an_error_that_says_why(pipeline, call, message):
    with pytest.raises(InputError, match=message):
        call(pipeline)


def test_a_refused_patch_changes_nothing(pipeline):
    class Own:
        def __call__(self, attn, hidden_states, **kwargs):
            return hidden_states

    pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn2.set_processor(Own())
    with pytest.raises(InputError, match="its processor Own computes"):
        surgery.patch(pipeline, layers="mid")
    assert type(pipeline.unet) is UNet2DConditionModel and not settings_of(pipeline)


def test_models_without_surgery_are_refused_by_name():
    with pytest.raises(
        UnsupportedModelError, match="UNetSpatioTemporalConditionModel: its cross-attention has a single"
    ):
        surgery.patch(tiny_svd_unet())


@pytest.mark.parametrize(
    "model,pipeline,reason",
    [
        (
            "Flux2Transformer2DModel",
            "Flux2KleinKVPipeline",
            "Flux2KleinKVPipeline puts processors of its own into every attention module",
        ),
        ("UNet2DConditionModel", "StableDiffusionImageVariationPipeline", "has a single key"),
    ],
)
def test_pipelines_that_would_be_half_patched_are_refused(model, pipeline, reason):
    assert reason in refusal_of_class(model, pipeline)
    assert refusal_of_class("WanTransformer3DModel", "WanPipeline") is None


def test_the_papers_arithmetic_draws_the_same(pipeline):
    ours = draw(surgery.patch(pipeline))
    theirs = draw(surgery.patch(surgery.unpatch(pipeline), implementation="entmax"))
    assert (ours - theirs).abs().max() < 2e-3


def test_sdxl_with_several_blocks_per_transformer():
    pipeline, arguments = tiny_sdxl()

    def run():
        return torch.from_numpy(pipeline(generator=torch.Generator().manual_seed(0), **arguments).images)

    base = run()
    surgery.patch(pipeline)
    assert (run() - base).abs().max() > 1e-4
    surgery.unpatch(pipeline)
    assert torch.equal(run(), base)


def test_a_saved_patched_pipeline_says_so_and_never_loads_unpatched(pipeline, tmp_path):
    surgery.patch(pipeline, scale=1.0)
    expected = draw(pipeline)
    pipeline.save_pretrained(tmp_path)
    code, name = json.loads((tmp_path / "model_index.json").read_text())["unet"]
    assert name == "PladisUNet2DConditionModel" and (tmp_path / "unet" / f"{code}.py").is_file()
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(tmp_path)
    assert torch.equal(draw(surgery.load(tmp_path, quiet=True)), expected)
    surgery.unpatch(pipeline)
    pipeline.save_pretrained(tmp_path / "plain")
    plain = DiffusionPipeline.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert type(plain.unet.mid_block.attentions[0].transformer_blocks[0].attn2) is Attention


def test_whoever_saves_a_patched_unet_saves_something_that_stock_classes_refuse(pipeline, tmp_path):
    index = pipeline.config.unet
    surgery.patch(pipeline)
    pipeline.register_to_config(unet=index)  # as of a pipeline that was not told
    expected = draw(pipeline)
    pipeline.save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match="patched with PLADIS: load with surgery.load or trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match="patched with PLADIS"):
        UNet2DConditionModel.from_pretrained(tmp_path / "a", subfolder="unet")
    assert torch.equal(draw(surgery.load(tmp_path / "a", quiet=True)), expected)
    assert pipeline.unet.config.mid_block_type == "UNetMidBlock2DCrossAttn"


def test_projections_fused_while_patched_are_fused_after_unpatch(pipeline):
    base = draw(pipeline)
    surgery.patch(pipeline)
    pipeline.fuse_qkv_projections()
    surgery.unpatch(pipeline)
    assert (draw(pipeline) - base).abs().max() < 1e-3


def test_numpy_and_torch_scalars_are_numbers(pipeline):
    import numpy as np

    surgery.patch(pipeline, alpha=np.float32(1.3), scale=torch.tensor(0.7), temperature=np.int64(1))
    assert settings_of(pipeline)["mid_block.attentions.0.transformer_blocks.0.attn2"] == {
        "alpha": 1.3,
        "scale": 0.7,
        "temperature": 1.0,
        "sparse_temperature": 1.0,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 1e-60}, "temperature must be above 0"),
        ({"scale": 1e300}, "scale must be a finite number"),
        ({"layers": 5}, "layers must be"),
        ({"layers": ["up", 5]}, "layers must be"),
        ({"alpha": True}, "alpha must lie"),
    ],
)
def test_what_float32_or_the_selector_cannot_hold_is_refused(pipeline, arguments, message):
    with pytest.raises(InputError, match=message):
        surgery.patch(pipeline, **arguments)


def test_offloaded_buffers_are_not_tuned_into_nothing(pipeline):
    from accelerate import cpu_offload

    surgery.patch(pipeline)
    cpu_offload(pipeline.unet, "cpu", offload_buffers=True)
    with pytest.raises(InputError, match="the buffers are offloaded"):
        surgery.tune(pipeline, scale=1.0)


def test_an_assigned_state_dict_leaves_the_hyperparameters_in_float32(pipeline):
    unet = surgery.patch(pipeline, alpha=1.25).unet
    unet.load_state_dict({key: value.half() for key, value in unet.state_dict().items()}, assign=True)
    module = next(module for module in unet.modules() if is_pladis(module))
    assert module.pladis_alpha.dtype == torch.float32 and module.to_q.weight.dtype == torch.float16
