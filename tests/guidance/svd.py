"""A tiny Stable Video Diffusion: no surgery fits it, as its cross-attention has one key; guidance does."""

import torch

from ..tiny import tiny_svd_unet


def svd():
    """(StableVideoDiffusionPipeline, arguments of a call)."""
    from diffusers import (
        AutoencoderKLTemporalDecoder,
        EulerDiscreteScheduler,
        StableVideoDiffusionPipeline,
    )
    from PIL import Image
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    unet = tiny_svd_unet().eval()
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4
    ).eval()
    vision = CLIPVisionConfig(
        hidden_size=32,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=224,
        intermediate_size=37,
        patch_size=56,
    )
    pipeline = StableVideoDiffusionPipeline(
        vae=vae,
        image_encoder=CLIPVisionModelWithProjection(vision).eval(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            prediction_type="v_prediction", timestep_type="continuous", sigma_min=0.002, sigma_max=700.0
        ),
        feature_extractor=CLIPImageProcessor(),
    )
    image = Image.fromarray((torch.rand(32, 32, 3) * 255).byte().numpy())
    return pipeline, {
        "image": image,
        "num_frames": 2,
        "num_inference_steps": 2,
        "output_type": "latent",
        "height": 32,
        "width": 32,
        "min_guidance_scale": 2.0,
        "max_guidance_scale": 3.0,
        "decode_chunk_size": 2,
    }
