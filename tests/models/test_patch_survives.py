"""What a patch survives: adapters, offloading, quantisation, compilation, other guidance, loaded before it or after."""

import copy

import pytest
import torch

import surgery
from surgery.nn import is_pladis

from ..conftest import PROMPTS, draw, load_shapes
from ..quick import quick
from ..tiny import tiny_sdxl, with_controlnet


def lora_state(unet, seed=0):
    """A LoRA on every cross-attention projection, in the layout that load_lora_weights reads."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for path, module in unet.named_modules():
        if path.endswith("attn2"):
            for name in ("to_q", "to_k", "to_v", "to_out.0"):
                out, into = module.get_submodule(name).weight.shape
                state[f"unet.{path}.{name}.lora_A.weight"] = torch.randn(4, into, generator=generator) * 0.2
                state[f"unet.{path}.{name}.lora_B.weight"] = torch.randn(out, 4, generator=generator) * 0.2
    return state


def test_lora_loaded_before_or_after_is_the_same(pipeline):
    state = lora_state(pipeline.unet)
    other = load_shapes()
    patched = draw(surgery.patch(pipeline))
    pipeline.load_lora_weights(dict(state))
    other.load_lora_weights(dict(state))
    lora_alone = draw(other)
    surgery.patch(other)
    assert torch.equal(draw(pipeline), draw(other))
    assert (draw(pipeline) - patched).abs().max() > 0.01
    half = {"cross_attention_kwargs": {"scale": 0.5}}
    assert torch.equal(draw(pipeline, **half), draw(other, **half))
    assert (draw(pipeline, **half) - draw(pipeline)).abs().max() > 0.01
    surgery.unpatch(pipeline)
    assert torch.equal(draw(pipeline), lora_alone)
    surgery.patch(pipeline)
    pipeline.fuse_lora()
    assert (draw(pipeline) - draw(other)).abs().max() < 1e-2
    other.unload_lora_weights()
    assert torch.equal(draw(other), patched)


def ip_adapter_state(unet, dim=16, seed=0):
    """A random IP-Adapter (one token per image) in the layout that load_ip_adapter reads."""
    generator = torch.Generator().manual_seed(seed)
    context = unet.config.cross_attention_dim
    projection = {
        "proj.weight": torch.randn(4 * context, dim, generator=generator) * 0.1,
        "proj.bias": torch.zeros(4 * context),
        "norm.weight": torch.ones(context),
        "norm.bias": torch.zeros(context),
    }
    layers, number = {}, 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            width = unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape[0]
            for kind in ("to_k_ip", "to_v_ip"):
                layers[f"{number}.{kind}.weight"] = torch.randn(width, context, generator=generator) * 0.1
            number += 2
    return {"image_proj": projection, "ip_adapter": layers}


def load_ip_adapter(pipeline):
    pipeline.load_ip_adapter(ip_adapter_state(pipeline.unet), subfolder="", weight_name="", image_encoder_folder=None)
    pipeline.set_ip_adapter_scale(0.7)


@pytest.mark.parametrize("masked", [False, True])
def test_ip_adapter_loaded_before_or_after_stays_dense(pipeline, masked):
    embeds = torch.randn(4, 1, 16, generator=torch.Generator().manual_seed(3))  # negative and positive, two images
    arguments = {"ip_adapter_image_embeds": [embeds]}
    if masked:
        mask = torch.zeros(1, 1, 64, 64)
        mask[..., :32] = 1.0
        arguments["cross_attention_kwargs"] = {"ip_adapter_masks": [mask]}
    other = load_shapes()
    load_ip_adapter(other)
    stock = draw(other, **arguments)
    other.set_ip_adapter_scale(0.0)
    assert (draw(other, **arguments) - stock).abs().max() > 0.01  # the adapter does something
    other.set_ip_adapter_scale(0.7)
    surgery.patch(other)
    surgery.patch(pipeline)
    load_ip_adapter(pipeline)
    assert torch.equal(draw(pipeline, **arguments), draw(other, **arguments))
    assert (draw(pipeline, **arguments) - stock).abs().max() > 0.01
    surgery.tune(pipeline, scale=0.0)
    assert (draw(pipeline, **arguments) - stock).abs().max() < 1e-3  # text dense and image dense: the stock adapter
    surgery.unpatch(pipeline)
    assert torch.equal(draw(pipeline, **arguments), stock)


def check_negative(pipeline, **arguments):
    """NAG and regions beside what the pipeline has: nothing from the prompt itself, and the image from others."""
    stock = draw(pipeline, **arguments)
    surgery.patch(pipeline, operator="nag", phi=8.0, blend=1.0)
    surgery.negative(pipeline, PROMPTS)
    assert (draw(pipeline, **arguments) - stock).abs().max() < 1e-3
    surgery.negative(pipeline, "red circle")
    assert (draw(pipeline, **arguments) - stock).abs().max() > 0.01
    surgery.unpatch(pipeline)
    surgery.patch(pipeline, operator="regions", base=1.0)
    surgery.regions(pipeline, [{"prompt": "red circle", "box": [0, 0, 0.5, 1]}])
    assert (draw(pipeline, **arguments) - stock).abs().max() < 1e-3
    surgery.tune(pipeline, base=0.0)
    assert (draw(pipeline, **arguments) - stock).abs().max() > 0.01
    surgery.unpatch(pipeline)


def test_negative_and_regional_prompts_beside_an_ip_adapter(pipeline):
    embeds = torch.randn(4, 1, 16, generator=torch.Generator().manual_seed(3))
    load_ip_adapter(pipeline)
    check_negative(pipeline, ip_adapter_image_embeds=[embeds])


def test_freeu(pipeline):
    surgery.patch(pipeline)
    patched = draw(pipeline)
    pipeline.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert (draw(pipeline) - patched).abs().max() > 0.01
    surgery.tune(pipeline, scale=0.0)
    with_freeu = draw(pipeline)
    surgery.unpatch(pipeline)
    assert (draw(pipeline) - with_freeu).abs().max() < 1e-3
    surgery.patch(pipeline)
    pipeline.disable_freeu()
    assert torch.equal(draw(pipeline), patched)


def test_controlnet():
    pipeline = with_controlnet(load_shapes())
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    arguments = {"image": image, "height": 64, "width": 64}

    def run(scale):
        return draw(pipeline, controlnet_conditioning_scale=scale, **arguments)

    stock = run(1.0)
    surgery.patch(pipeline)
    assert not any(is_pladis(module) for module in pipeline.controlnet.modules())
    assert (run(1.0) - stock).abs().max() > 0.01
    assert (run(0.0) - run(1.0)).abs().max() > 0.01
    surgery.tune(pipeline, scale=0.0)
    assert (run(1.0) - stock).abs().max() < 1e-3
    surgery.unpatch(pipeline)
    check_negative(pipeline, **arguments)


@pytest.mark.parametrize("offload_first", [True, False])
def test_model_offload_and_sequential_offload(pipeline, offload_first):
    from accelerate import cpu_offload, cpu_offload_with_hook

    expected = draw(surgery.patch(copy.deepcopy(pipeline)))
    for offload in (lambda unet: cpu_offload_with_hook(unet, "cpu"), lambda unet: cpu_offload(unet, "cpu")):
        fresh = load_shapes()
        if offload_first:
            offload(fresh.unet)
        surgery.patch(fresh)
        if not offload_first:
            offload(fresh.unet)
        assert torch.equal(draw(fresh), expected)


def test_enable_model_cpu_offload_of_the_pipeline(pipeline, monkeypatch):
    expected = draw(surgery.patch(copy.deepcopy(pipeline)))
    # diffusers insists on an accelerator for this call; its hooks work the same from CPU to CPU.
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.get_device", lambda: "cpu", raising=False)
    surgery.patch(pipeline)
    try:
        pipeline.enable_model_cpu_offload(device="cpu")
    except RuntimeError as error:
        pytest.fail(f"diffusers refused: {error}")
    assert torch.equal(draw(pipeline), expected)


def test_group_offload_and_layerwise_casting(pipeline):
    surgery.patch(pipeline)
    expected = draw(pipeline)
    pipeline.unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert all(m.pladis_alpha.dtype == torch.float32 for m in pipeline.unet.modules() if is_pladis(m))
    assert (draw(pipeline) - expected).abs().mean() < 0.05


def test_quantised_linears_inside_the_projections(pipeline):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def is_projection(module, path):
        return isinstance(module, torch.nn.Linear) and ".attn2.to_" in path

    other = load_shapes()
    quantize_(pipeline.unet, Int8WeightOnlyConfig(), filter_fn=is_projection)
    stock = draw(pipeline)
    surgery.patch(pipeline)
    quantize_(surgery.patch(other).unet, Int8WeightOnlyConfig(), filter_fn=is_projection)
    assert type(pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.data) is not torch.Tensor
    assert torch.equal(draw(pipeline), draw(other))
    surgery.unpatch(pipeline)
    assert torch.equal(draw(pipeline), stock)


@pytest.mark.parametrize("compile_first", quick([True, False], True))
def test_compile_repeated_blocks(pipeline, compile_first):
    torch._dynamo.reset()
    expected = draw(surgery.patch(load_shapes()))
    if compile_first:
        pipeline.unet.compile_repeated_blocks(fullgraph=True, backend="eager")
        draw(pipeline)
    surgery.patch(pipeline)
    if not compile_first:
        pipeline.unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert (draw(pipeline) - expected).abs().max() < 1e-3
    surgery.tune(pipeline, scale=0.0)
    surgery.unpatch(pipeline)
    assert (draw(pipeline) - draw(load_shapes())).abs().max() < 1e-3


def test_a_compiled_unet_is_patched_inside_its_wrapper():
    torch._dynamo.reset()
    pipeline, other = (tiny_sdxl(blocks=1, up=False)[0] for _ in range(2))
    expected = draw(surgery.patch(other))
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    surgery.patch(pipeline)
    assert (draw(pipeline) - expected).abs().max() < 1e-3


def test_slicing_fused_projections_and_reset_processors(pipeline):
    surgery.patch(pipeline)
    expected = draw(pipeline)
    pipeline.enable_attention_slicing()
    assert (draw(pipeline) - expected).abs().max() < 1e-3
    pipeline.disable_attention_slicing()
    pipeline.unet.fuse_qkv_projections()
    assert (draw(pipeline) - expected).abs().max() < 1e-3
    pipeline.unet.unfuse_qkv_projections()
    pipeline.unet.set_default_attn_processor()
    assert (draw(pipeline) - expected).abs().max() < 1e-3


def test_perturbed_attention_guidance_finds_its_layers(pipeline):
    from diffusers import StableDiffusionPAGPipeline

    surgery.patch(pipeline)
    pag = StableDiffusionPAGPipeline(**pipeline.components, requires_safety_checker=False, pag_applied_layers=["mid"])
    assert (draw(pag, pag_scale=3.0) - draw(pag, pag_scale=0.0)).abs().max() > 0.01
    assert len([module for module in pag.unet.modules() if is_pladis(module)]) == 7


def test_prompt_masks_are_honoured(pipeline):
    unet = surgery.patch(pipeline).unet
    generator = torch.Generator().manual_seed(0)
    sample, text = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 20, 128, generator=generator)
    keep = torch.ones(2, 20, dtype=torch.bool)
    keep[:, 8:] = False
    with torch.no_grad():
        masked = unet(sample, 10, text, encoder_attention_mask=keep).sample
        shorter = unet(sample, 10, text[:, :8]).sample
        assert (masked - shorter).abs().max() < 1e-4
        assert (masked - unet(sample, 10, text).sample).abs().max() > 1e-3
