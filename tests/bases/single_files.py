"""Tiny checkpoints in one file, with the keys that the models' own authors gave them."""

import re
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file

from ..tiny import clip_text, clip_tokenizer, tiny_vae

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
OPENCLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def text_encoder(width, with_projection=False):
    return clip_text(with_projection, width, seed=width)


def pipeline(is_xl):
    """A Stable Diffusion XL, or a Stable Diffusion 1.5, of a level with attention and one without."""
    torch.manual_seed(0)
    xl = {
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 96,  # 6 * 8 + 48
    }
    kind: Any = UNet2DConditionModel
    unet = kind(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        cross_attention_dim=80 if is_xl else 32,
        **(xl if is_xl else {}),
    ).eval()
    parts = {
        "unet": unet,
        "vae": tiny_vae(),
        "scheduler": EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1),
        "text_encoder": text_encoder(32),
        "tokenizer": clip_tokenizer(),
    }
    if is_xl:
        parts |= {"text_encoder_2": text_encoder(48, True), "tokenizer_2": clip_tokenizer()}
        made = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        unchecked: Any = {"safety_checker": None, "feature_extractor": None}
        made = StableDiffusionPipeline(**parts, **unchecked, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def original_unet(state):
    """{key: tensor} of a UNet with one layer a block, as its authors have it."""
    named = {}
    for key, tensor in state.items():
        module, _, kind = key.rpartition(".")
        if module in UNET_TOP:
            named[f"{UNET_TOP[module]}.{kind}"] = tensor
            continue
        room, rest = _unet_room(key, state)
        for ours, theirs in RESNET.items():
            if ".resnets." in key and rest.startswith(f"{ours}."):
                rest = rest.replace(ours, theirs, 1)
        named[f"{room}.{rest}"] = tensor
    return {f"model.diffusion_model.{key}": tensor for key, tensor in named.items()}


def _unet_room(key, state):
    if found := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", key):
        kind, index, rest = found.groups()
        return f"middle_block.{2 * int(index) if kind == 'resnets' else 1}", rest
    found = re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", key)
    assert found
    way, block, kind, index, rest = found.groups()
    number = 2 * int(block) + int(index) + 1 if way == "down" else 2 * int(block) + int(index)
    if kind == "downsamplers":
        return f"input_blocks.{2 * int(block) + 2}.0.op", rest.removeprefix("conv.")
    if kind == "upsamplers":
        number = 2 * int(block) + 1
        has_attention = any(name.startswith(f"up_blocks.{block}.attentions.") for name in state)
        return f"output_blocks.{number}.{2 if has_attention else 1}.conv", rest.removeprefix("conv.")
    place = {"resnets": 0, "attentions": 1}[kind]
    return f"{'input' if way == 'down' else 'output'}_blocks.{number}.{place}", rest


def original_vae(state):
    """{key: tensor} of an AutoencoderKL as its authors have it: with 1x1 convolutions for its attention."""
    levels = 1 + max(int(found[1]) for key in state if (found := re.match(r"encoder\.down_blocks\.(\d)", key)))
    named = {}
    for key, tensor in state.items():
        key = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", key)
        key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
        key = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}", key)
        key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", key)
        key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
        key = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if "mid_block.attentions.0." in key:
            names = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
            key = key.replace("mid_block.attentions.0.", "mid.attn_1.")
            for ours, theirs in names.items():
                key = key.replace(f"attn_1.{ours}.", f"attn_1.{theirs}.")
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        named[f"first_stage_model.{key}"] = tensor
    return named


def original_clip(state, room):
    """{key: tensor} of CLIP's text encoder, which is transformers' own within a room."""
    return {f"{room}.transformer.text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in state.items()}


def original_open_clip(state, room):
    """{key: tensor} of OpenCLIP's text encoder: queries, keys and values in one matrix, the projection transposed."""
    state = {key.removeprefix("text_model."): tensor for key, tensor in state.items()}
    named = {
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "text_projection": state["text_projection.weight"].T.contiguous(),
        "logit_scale": torch.tensor(4.6),
    }
    for key, tensor in state.items():
        if not (found := re.match(r"encoder\.layers\.(\d+)\.(.*)\.(weight|bias)", key)):
            continue
        layer, module, kind = found.groups()
        if module == "self_attn.q_proj":
            parts = [state[key.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            named[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(parts)
        elif module in OPENCLIP:
            named[f"transformer.resblocks.{layer}.{OPENCLIP[module]}.{kind}"] = tensor
    return {f"{room}.{key}": tensor for key, tensor in named.items()}


def checkpoint(pipe):
    """{key: tensor} of a pipeline as people have it in one file."""
    state = {**original_unet(pipe.unet.state_dict()), **original_vae(pipe.vae.state_dict())}
    if not hasattr(pipe, "text_encoder_2"):
        return {**state, **original_clip(pipe.text_encoder.state_dict(), "cond_stage_model")}
    state |= original_clip(pipe.text_encoder.state_dict(), "conditioner.embedders.0")
    return {**state, **original_open_clip(pipe.text_encoder_2.state_dict(), "conditioner.embedders.1.model")}


def write(path, pipe, dtype=torch.float32):
    """The pipeline's weights as a single-file checkpoint."""
    save_file({key: tensor.to(dtype).contiguous() for key, tensor in checkpoint(pipe).items()}, path)


def configs_alone(pipe, folder):
    """A folder with a pipeline's configs and tokenizers, and no weights."""
    pipe.save_pretrained(folder)
    for path in folder.rglob("*.safetensors"):
        path.unlink()


SD3_TOP = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
SD3_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
SD3_QKV = {
    "attn.to_q": ("x_block.attn", ["attn.to_q", "attn.to_k", "attn.to_v"]),
    "attn.add_q_proj": ("context_block.attn", ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]),
    "attn2.to_q": ("x_block.attn2", ["attn2.to_q", "attn2.to_k", "attn2.to_v"]),
}


def original_sd3(state):
    """{key: tensor} of an SD3 transformer: qkv in one matrix, and shift before scale where a norm has these two."""
    last = max(int(found[1]) for key in state if (found := re.match(r"transformer_blocks\.(\d+)", key)))
    named = {}
    for key, tensor in state.items():
        found = re.match(r"transformer_blocks\.(\d+)\.(.*)\.(weight|bias)$", key)
        if not found:
            module, _, kind = key.rpartition(".")
            named[SD3_TOP.get(key) or f"{SD3_TOP[module]}.{kind}"] = _swapped(tensor) if "norm_out" in key else tensor
            continue
        block, module, kind = found.groups()
        if module in SD3_QKV:
            room, parts = SD3_QKV[module]
            joined = [state[f"transformer_blocks.{block}.{part}.{kind}"] for part in parts]
            named[f"joint_blocks.{block}.{room}.qkv.{kind}"] = torch.cat(joined)
        elif module in SD3_BLOCK:
            swaps = module == "norm1_context.linear" and int(block) == last
            named[f"joint_blocks.{block}.{SD3_BLOCK[module]}.{kind}"] = _swapped(tensor) if swaps else tensor
    return {f"model.diffusion_model.{key}": tensor for key, tensor in named.items()}


def _swapped(tensor):
    return torch.cat(tensor.chunk(2)[::-1])
