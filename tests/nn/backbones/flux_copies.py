"""Tiny pipelines of the models whose blocks are FLUX.1's, given embeddings instead of prompts."""

import torch

from ...tiny import tiny_vae
from .family import Family
from .parts import embeddings, flow_scheduler, wan_vae, words

CALL = {"num_inference_steps": 2, "output_type": "latent", "height": 32, "width": 32}
SIZES = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}


def ovis_image():
    """Ovis-Image."""
    from diffusers import OvisImagePipeline, OvisImageTransformer2DModel

    torch.manual_seed(0)
    transformer = OvisImageTransformer2DModel(
        **SIZES, out_channels=16, joint_attention_dim=32, axes_dims_rope=(4, 4, 8)
    ).eval()
    pipeline = OvisImagePipeline(transformer=transformer, vae=_vae(), scheduler=flow_scheduler(), **words())
    return pipeline, {**CALL, **embeddings(2, 20, 32), "negative_prompt": None}


def bria():
    """Bria 3.2."""
    from diffusers import BriaPipeline, BriaTransformer2DModel

    torch.manual_seed(0)
    transformer = BriaTransformer2DModel(**SIZES, joint_attention_dim=32, axes_dims_rope=[4, 4, 8]).eval()
    pipeline = BriaPipeline(transformer=transformer, vae=_vae(), scheduler=flow_scheduler(), **words())
    return pipeline, {**CALL, **embeddings(2, 20, 32)}


def bria_fibo():
    """FIBO, whose blocks each read another layer of the text encoder."""
    from diffusers import BriaFiboPipeline, BriaFiboTransformer2DModel

    torch.manual_seed(0)
    transformer = BriaFiboTransformer2DModel(
        **SIZES, joint_attention_dim=64, text_encoder_dim=32, axes_dims_rope=[4, 4, 8]
    ).eval()
    pipeline = BriaFiboPipeline(transformer=transformer, vae=wan_vae(), scheduler=flow_scheduler(), **words())
    return pipeline, {**CALL, "prompt": ["a cat", "a cat on a mat"], "negative_prompt": ["bad", "bad"]}


def _vae():
    vae = tiny_vae()
    vae.register_to_config(shift_factor=0.1)
    return vae


FAMILIES = [
    Family("ovis_image", "OvisImageTransformer2DModel", ovis_image, modules=2, text_first=True),
    Family("bria", "BriaTransformer2DModel", bria, modules=2, text_first=True),
    Family("bria_fibo", "BriaFiboTransformer2DModel", bria_fibo, modules=2, text_first=True),
]
