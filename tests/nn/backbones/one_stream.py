"""Tiny pipelines of the transformers with blocks of one stream, given embeddings instead of prompts."""

import torch

from ...tiny import tiny_vae
from .family import Family
from .parts import embeddings, flow_scheduler, qwen_vae, words

CALL = {"num_inference_steps": 2, "output_type": "latent"}


def chroma():
    """Chroma, with a mask of each prompt's tokens."""
    from diffusers import ChromaPipeline, ChromaTransformer2DModel

    torch.manual_seed(0)
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    ).eval()
    vae = tiny_vae()
    vae.register_to_config(shift_factor=0.1)
    pipeline = ChromaPipeline(transformer=transformer, vae=vae, scheduler=flow_scheduler(), **words())
    mask = torch.ones(2, 20)
    mask[0, 15:] = 0
    given = {f"{sign}prompt_attention_mask": mask for sign in ("", "negative_")} | embeddings(2, 20, 32)
    return pipeline, {**CALL, **given, "height": 32, "width": 32}


def z_image():
    """Z-Image, with prompts of two lengths: 32 and 64 tokens with its learned padding."""
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 4, 8],
        axes_lens=[256, 32, 32],
    ).eval()
    for pad in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(pad)
    vae = tiny_vae()
    vae.register_to_config(shift_factor=0.1)
    pipeline = ZImagePipeline(transformer=transformer, vae=vae, scheduler=flow_scheduler(), **words())
    text = torch.randn(4, 40, 16, generator=torch.Generator().manual_seed(0))
    given = {"prompt_embeds": [text[0], text[1][:20]], "negative_prompt_embeds": [text[2], text[3]]}
    return pipeline, {**CALL, **given, "height": 32, "width": 32}


def krea2():
    """Krea 2, whose four heads of queries share two of keys."""
    from diffusers import Krea2Pipeline, Krea2Transformer2DModel

    torch.manual_seed(0)
    transformer = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    pipeline = Krea2Pipeline(
        transformer=transformer,
        vae=qwen_vae(),
        scheduler=flow_scheduler(),
        **words(),
        text_encoder_select_layers=(0, 1, 2),
    )
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, 9:] = False
    given = {f"{sign}prompt_embeds_mask": mask for sign in ("", "negative_")} | embeddings(2, 12, 3, 16)
    return pipeline, {**CALL, **given, "height": 32, "width": 32}


class _ZImage(Family):
    """Its text is a list, of which 64 tokens are in a batch, behind 64 of the image."""

    def text_length(self, call):
        return 64

    def is_to_text(self, length, queries, keys):
        return keys == length + 64


FAMILIES = [
    Family(
        "chroma",
        "ChromaTransformer2DModel",
        chroma,
        modules=2,
        text_first=True,
    ),
    _ZImage("z_image", "ZImageTransformer2DModel", z_image, modules=2, text_first=False),
    Family("krea2", "Krea2Transformer2DModel", krea2, modules=2, text_first=True, mask="encoder_attention_mask"),
]
