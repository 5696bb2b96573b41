"""Where the text stands in each class of ComfyUI's, found out by the model itself: keys that change with the prompt.

Needs COMFYUI_PATH. Tiny models with random weights, each called once through the nodes' wrapper.
"""

import importlib
import sys

import pytest
import torch

from . import real, stand_in
from .pack import NAME, node

pytestmark = pytest.mark.skipif(real.folder() is None, reason="COMFYUI_PATH names no folder of ComfyUI")

_STREAMS = {"vec_in_dim": 32, "context_in_dim": 32, "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2}
_STREAMS |= {"depth_single_blocks": 2, "axes_dim": [4, 4, 8], "theta": 256, "qkv_bias": True}
_CHROMA = {key: value for key, value in _STREAMS.items() if key != "vec_in_dim"}
_COSMOS = {"max_img_h": 8, "max_img_w": 8, "max_frames": 1, "in_channels": 4, "out_channels": 4}
_IMAGE, _VIDEO = (1, 4, 8, 8), (1, 4, 1, 8, 8)
_POOLED = {"y": torch.ones(1, 32)}

# {name: (module, class, its arguments, latents, text tokens, channels, sites, image's tokens, more of the call)}
MODELS = {
    "FLUX": (
        "flux.model",
        "Flux",
        {**_STREAMS, "in_channels": 4, "out_channels": 4, "patch_size": 2, "guidance_embed": False},
        *(_IMAGE, 5, 32, 4, 16, _POOLED),
    ),
    "Chroma": (
        "chroma.model",
        "Chroma",
        {**_CHROMA, "in_channels": 16, "out_channels": 16, "patch_size": 2, "in_dim": 64, "out_dim": 32}
        | {"hidden_dim": 32, "n_layers": 1},
        *(_IMAGE, 5, 32, 4, 16, {"guidance": torch.zeros(1)}),
    ),
    "HunyuanVideo": (
        "hunyuan_video.model",
        "HunyuanVideo",
        {**_STREAMS, "in_channels": 4, "out_channels": 4, "patch_size": [1, 2, 2], "guidance_embed": False}
        | {"byt5": False, "meanflow": False},
        *(_VIDEO, 5, 32, 4, 16, _POOLED),
    ),
    "SD3": (
        "modules.diffusionmodules.mmdit",
        "OpenAISignatureMMDITWrapper",
        {"input_size": None, "depth": 2, "adm_in_channels": 32, "pos_embed_max_size": 8, "num_patches": 64}
        | {"context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 32, "out_features": 128}}}
        | {"qk_norm": "rms", "x_block_self_attn_layers": [0]},
        *(_IMAGE, 5, 32, 2, 16, _POOLED),
    ),
    "Qwen-Image": (
        "qwen_image.model",
        "QwenImageTransformer2DModel",
        {"in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
        | {"joint_attention_dim": 32, "axes_dims_rope": (4, 4, 8)},
        *(_VIDEO, 5, 32, 2, 16, {}),
    ),
    "Lumina 2": (
        "lumina.model",
        "NextDiT",
        {"dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 1, "cap_feat_dim": 32}
        | {"axes_dims": (4, 4, 8), "axes_lens": (64, 64, 64), "qk_norm": True},
        *(_IMAGE, 5, 32, 2, 16, {"num_tokens": 5}),
    ),
    "AuraFlow": (
        "aura.mmdit",
        "MMDiT",
        {"dim": 32, "n_layers": 3, "n_double_layers": 1, "n_heads": 2, "global_conddim": 32, "cond_seq_dim": 32}
        | {"max_seq": 64},
        *(_IMAGE, 5, 32, 3, 16, {}),
    ),
    "HiDream": (
        "hidream.model",
        "HiDreamImageTransformer2DModel",
        {"patch_size": 2, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16}
        | {"num_attention_heads": 2, "caption_channels": [32, 32], "text_emb_dim": 32, "axes_dims_rope": (4, 4, 8)}
        | {"llama_layers": [0, 1], "max_resolution": (16, 16)},
        *(_IMAGE, 5, 32, 2, 16, {**_POOLED, "encoder_hidden_states_llama3": torch.ones(1, 2, 3, 32)}),
    ),
    "Wan": (
        "wan.model",
        "WanModel",
        {"text_len": 5, "in_dim": 4, "dim": 32, "ffn_dim": 32, "freq_dim": 16, "text_dim": 32, "out_dim": 4}
        | {"num_heads": 2, "num_layers": 2},
        *(_VIDEO, 5, 32, 2, 16, {}),
    ),
    "LTX-Video": (
        "lightricks.model",
        "LTXVModel",
        {"in_channels": 4, "cross_attention_dim": 32, "attention_head_dim": 16, "num_attention_heads": 2}
        | {"caption_channels": 32, "num_layers": 2},
        *(_VIDEO, 5, 32, 2, 64, {"attention_mask": None}),
    ),
    "Cosmos 2": (
        "cosmos.predict2",
        "MiniTrainDIT",
        {**_COSMOS, "patch_spatial": 2, "patch_temporal": 1, "model_channels": 32, "num_blocks": 2, "num_heads": 2}
        | {"crossattn_emb_channels": 32, "pos_emb_cls": "rope3d", "use_adaln_lora": True, "adaln_lora_dim": 8},
        *(_VIDEO, 5, 32, 2, 16, {}),
    ),
}


@pytest.fixture(scope="module", autouse=True)
def loaded():
    real.comfyui()


def built(module, name, arguments):
    """A model of ComfyUI's with random weights."""
    import comfy.ops

    torch.manual_seed(0)
    cls = getattr(importlib.import_module(f"comfy.ldm.{module}"), name)
    network = cls(**arguments, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init).eval()
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(torch.randn_like(weight) * 0.3)
    return network


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_image_s_rows_change_and_the_text_s_stay(name, monkeypatch):
    module, cls, arguments, latents, tokens, channels, sites, image, more = MODELS[name]
    network = built(module, cls, arguments)
    model, what = node("PLADIS")(stand_in.Patcher(network), alpha=2.0, scale=4.0)
    assert f"{sites} of {sites}" in what
    hook = model.model_options["transformer_options"]["pladis_surgery"]
    seen, attended = [], hook.attended

    def spying(place, q, k, v, heads, *args, **kwargs):
        found = attended(place, q, k, v, heads, *args, **kwargs)
        if found is not None:
            first = kwargs.get("skip_reshape", False)
            query, key, value = (
                one if first else one.reshape(*one.shape[:2], heads, -1).transpose(1, 2) for one in (q, k, v)
            )
            dense = torch.nn.functional.scaled_dot_product_attention(query, key, value)
            if not kwargs.get("skip_output_reshape"):
                dense = dense.transpose(1, 2).flatten(2)
                seen.append((key, (dense - found).abs().amax((0, 2)) > 1e-4))
            else:
                seen.append((key, (dense - found).abs().amax((0, 1, 3)) > 1e-4))
        return found

    monkeypatch.setattr(hook, "attended", spying)
    x = torch.randn(latents, generator=torch.Generator().manual_seed(0))
    for seed in (1, 2):
        text = torch.randn(1, tokens, channels, generator=torch.Generator().manual_seed(seed))
        output = model.run(x, text, sigmas=(0.5,), **more)
        assert output.isfinite().all() and output.shape == x.shape
    assert sum(hook.report.changed.values()) == sites
    half = len(seen) // 2
    assert half == sites
    (key, changed), (other, _) = seen[0], seen[half]
    moved = (key - other).abs().amax((0, 1, 3)) > 1e-6  # keys of the text, as the prompt is another
    assert int(changed.sum()) == image
    if len(moved) == len(changed):
        assert moved.any() and not (moved & changed).any()
    else:  # cross-attention
        assert moved.all()


def test_the_second_attention_of_sd35_stays_dense_and_masks_of_uneven_prompts_do_too():
    module, cls, arguments, latents, *_, more = MODELS["SD3"]
    model, _ = node("PLADIS")(stand_in.Patcher(built(module, cls, arguments)))
    with torch.no_grad():
        model.run(torch.randn(latents), torch.randn(1, 5, 32), sigmas=(0.5,), **more)
    assert "2 of 3 attention calls changed" in node("Report")(model, after=None)[1]
    module, cls, arguments, latents, *_ = MODELS["Lumina 2"]
    model, _ = node("PLADIS")(stand_in.Patcher(built(module, cls, arguments)))
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    with torch.no_grad():
        model.run(torch.randn(latents), torch.randn(1, 5, 32), sigmas=(0.5,), num_tokens=5, attention_mask=mask)
    assert "2 of 2 attention calls changed" in node("Report")(model, after=None)[1]
    hook = sys.modules[f"{NAME}.hook"]
    assert hook._kept(torch.tensor([[1, 1, 0], [1, 1, 1]])) == [2, 3]
