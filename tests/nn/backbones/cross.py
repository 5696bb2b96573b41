"""Tiny pipelines of the UNets and of the transformers with cross-attention."""

import torch

from ...conftest import PROMPTS, load_shapes
from ...tiny import tiny_sdxl, tiny_vae
from .family import Family
from .parts import flow_scheduler, gemma_text, gemma_tokenizer, t5_text, t5_tokenizer

CALL = {"prompt": "a cat", "num_inference_steps": 2, "output_type": "np"}


def pixart():
    """PixArt-Sigma."""
    from diffusers import DDIMScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        use_additional_conditions=False,
    ).eval()
    pipeline = PixArtSigmaPipeline(
        transformer=transformer,
        vae=tiny_vae(),
        scheduler=DDIMScheduler(),
        text_encoder=t5_text(),
        tokenizer=t5_tokenizer(),
    )
    size = {"height": 32, "width": 32, "max_sequence_length": 16, "use_resolution_binning": False}
    return pipeline, {**CALL, **size, "clean_caption": False}


def sana():
    """SANA, whose self-attention is linear."""
    from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel

    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=32,
        qk_norm="rms_norm_across_heads",
    ).eval()
    vae = AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    ).eval()
    pipeline = SanaPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=flow_scheduler(shift=7.0),
        text_encoder=gemma_text(),
        tokenizer=gemma_tokenizer(),
    )
    size = {"height": 32, "width": 32, "max_sequence_length": 16, "use_resolution_binning": False}
    return pipeline, {**CALL, **size, "complex_human_instruction": None}


def sdxl():
    """SDXL."""
    return tiny_sdxl()


def shapes():
    """The trained pipeline of this repository, whose UNet is that of SD1.5, smaller."""
    return load_shapes(), {**CALL, "prompt": PROMPTS[0], "height": 64, "width": 64}


FAMILIES = [
    Family("shapes", "UNet2DConditionModel", shapes, modules=7),
    Family("sdxl", "UNet2DConditionModel", sdxl, modules=8),
    Family("pixart", "PixArtTransformer2DModel", pixart, modules=2, mask="encoder_attention_mask"),
    Family("sana", "SanaTransformer2DModel", sana, modules=2, mask="encoder_attention_mask"),
]
