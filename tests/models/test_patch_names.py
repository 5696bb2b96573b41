"""A patched model where others know models by their class: tables, pipelines' indexes, configs, copies, processors."""

import json

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNetMotionModel,
)
from diffusers.models.attention_processor import AttnProcessor

import surgery
from surgery.nn import BACKBONES, backbone_of, is_pladis
from surgery.nn.backbones.cross import PladisAttention

from ..conftest import load_shapes
from .test_patch_survives import lora_state


def test_loras_by_block_are_scaled_as_on_the_stock_unet(pipeline):
    state, by_block = lora_state(pipeline.unet), {"unet": {"down": 0.5, "up": {"block_0": 0.2, "block_1": 1.0}}}
    scales = []
    for loaded in (load_shapes(), surgery.patch(pipeline)):
        loaded.load_lora_weights(dict(state), adapter_name="a")
        loaded.set_adapters("a", by_block)
        scales.append({path: m.scaling["a"] for path, m in loaded.unet.named_modules() if hasattr(m, "scaling")})
    assert scales[0] == scales[1] and len(set(scales[0].values())) == 3


def test_every_patched_class_equals_its_stock_class_and_no_other():
    for name in BACKBONES:
        patched = backbone_of(name).patched
        assert patched == patched.stock and patched.stock == patched and patched is not patched.stock
        assert (patched == UNet2DConditionModel) == (patched.stock is UNet2DConditionModel) and patched != None  # noqa: E711


def test_a_model_that_peft_has_wrapped_is_patched_inside_its_wrapper(pipeline):
    from peft import LoraConfig, get_peft_model

    unet = pipeline.unet
    pipeline.unet = get_peft_model(unet, LoraConfig(target_modules=["to_q"]))
    surgery.tune(surgery.patch(pipeline), scale=0.5)
    assert sum(map(is_pladis, unet.modules())) == 7 and pipeline.unet.config.pladis[0]["scale"] == 0.5
    surgery.unpatch(pipeline)
    assert type(unet) is UNet2DConditionModel and "pladis" not in pipeline.unet.config


@pytest.mark.parametrize("through", [lambda other: other, lambda other: other.unet])
def test_every_pipeline_of_a_model_is_told_what_it_became(pipeline, through, tmp_path):
    other = AutoPipelineForImage2Image.from_pipe(surgery.patch(pipeline))
    surgery.unpatch(through(other))
    assert pipeline.config.unet == other.config.unet == ("diffusers", "UNet2DConditionModel")
    pipeline.save_pretrained(tmp_path)
    assert type(DiffusionPipeline.from_pretrained(tmp_path).unet) is UNet2DConditionModel
    surgery.patch(through(pipeline))
    assert pipeline.config.unet == other.config.unet and other.config.unet[1] == "PladisUNet2DConditionModel"


@pytest.mark.parametrize("kind", [StableDiffusionPipeline, StableDiffusionInpaintPipeline])
def test_from_pipe_takes_a_patched_unet_along(pipeline, kind):
    assert kind.from_pipe(surgery.patch(pipeline)).unet is pipeline.unet


def test_the_config_in_memory_makes_no_unpatched_model(pipeline, tmp_path):
    from diffusers.training_utils import EMAModel

    base = dict(pipeline.unet.config)
    unet = surgery.patch(pipeline).unet
    with pytest.raises(ValueError, match="patched with pladis"):
        UNet2DConditionModel.from_config(unet.config)
    EMAModel(unet.parameters(), model_cls=type(unet), model_config=unet.config).save_pretrained(tmp_path)
    assert sum(map(is_pladis, type(unet).from_pretrained(tmp_path).modules())) == 7
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["act_fn"] == "silu" and saved["mid_block_type"].startswith("UNetMidBlock2DCrossAttn patched with")
    unet.register_to_config(sample_size=16)
    assert unet.config.mid_block_type == "UNetMidBlock2DCrossAttn"
    unet.register_to_config(sample_size=base["sample_size"])
    assert dict(surgery.unpatch(pipeline).unet.config) == base


@pytest.mark.parametrize("copied_by", [ControlNetModel.from_unet, UNetMotionModel.from_unet2d])
def test_who_copies_a_patched_unet_reads_what_to_do(pipeline, copied_by):
    with pytest.raises(ValueError, match=r"cannot be copied: surgery.unpatch\(pipe\), copy, patch again"):
        copied_by(surgery.patch(pipeline).unet)
    copied_by(surgery.unpatch(pipeline).unet)


@pytest.mark.parametrize("wrong", ["one for all", "one of many", "another name"])
def test_processors_are_set_all_or_none(pipeline, wrong):
    class Own:
        pass

    unet = surgery.patch(pipeline).unet
    before = unet.attn_processors
    last = [name for name in before if name.endswith("attn2.processor")][-1]
    given = {name: AttnProcessor() for name in before}
    if wrong == "another name":
        given["elsewhere"] = given.pop(last)
    else:
        given = Own() if wrong == "one for all" else {**given, last: Own()}
    with pytest.raises(ValueError, match="no processor is given for" if wrong == "another name" else "cannot run Own"):
        unet.set_attn_processor(given)
    assert unet.attn_processors == before
    unet.set_attn_processor({name: AttnProcessor() for name in before})
    assert {type(processor) for processor in unet.attn_processors.values()} == {AttnProcessor}


def test_casting_says_nothing_of_the_buffers_which_stay_float32(pipeline, monkeypatch):
    heard = []
    monkeypatch.setattr("diffusers.models.modeling_utils.logger.warning", heard.append)
    unet = surgery.patch(pipeline).unet.to(torch.float16)
    assert not any("pladis" in text for text in heard) and "pladis_alpha" in type(unet)._keep_in_fp32_modules
    assert {m.pladis_alpha.dtype for m in unet.modules() if isinstance(m, PladisAttention)} == {torch.float32}
