"""Tiny models in ComfyUI and in diffusers with the same weights: what tests/comfyui/test_real.py draws from."""

import torch

from ..tiny import tiny_vae
from . import real


class Side:
    """A tiny model in ComfyUI (`model`) and in diffusers (`pipeline`), with the same weights, text and noise."""

    def __init__(self, pipeline, model, text, pooled=None, call=None, conditioning=None):
        self.pipeline, self.model, self.call, self.conditioning = pipeline, model, call or {}, conditioning or {}
        generator = torch.Generator().manual_seed(1)
        self.text, self.negative, self.other = (torch.randn(1, *text, generator=generator) for _ in range(3))
        self.pooled = pooled and [torch.randn(1, pooled, generator=generator) for _ in range(2)]
        pipeline.set_progress_bar_config(disable=True)

    def diffusers(self, **more):
        """The latents of diffusers' pipeline."""
        given = {"prompt_embeds": self.text, "negative_prompt_embeds": self.negative, "guidance_scale": 3.0}
        if self.pooled:
            names = "pooled_prompt_embeds", "negative_pooled_prompt_embeds"
            given |= dict(zip(names, self.pooled, strict=True))
        given |= {"latents": self.noise(), "num_inference_steps": 3, "output_type": "latent"}
        return self.pipeline(**{**given, **self.call, **more}).images

    def noise(self):
        return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def comfyui(self, model=None, scale=3.0, **texts):
        """Those of ComfyUI's sampler, at the sigmas of diffusers' last run."""
        sigmas = self.pipeline.scheduler.sigmas
        texts = {"prompt": self.text, "negative": self.negative, "pooled": self.pooled, **texts}
        first = self.noise() * getattr(self.pipeline.scheduler, "init_noise_sigma", 1.0) / sigmas[0]
        return real.sampled(model or self.model, first, sigmas, scale=scale, **texts, **self.conditioning)


def unet(kind, stored=None):
    """SD 1.5 or SDXL; stored: the dtype of the weights in a file, which ComfyUI keeps and casts at each layer."""
    from diffusers import (
        EulerDiscreteScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )

    torch.manual_seed(0)
    common = {"block_out_channels": (32, 64), "layers_per_block": 1, "sample_size": 8, "cross_attention_dim": 32}
    config = {"in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1], "image_size": 32}
    config |= {"channel_mult": [1, 2], "context_dim": 32, "use_spatial_transformer": True, "legacy": False}
    config["dtype"] = torch.float32
    parts = {"vae": tiny_vae(), "text_encoder": None, "tokenizer": None}
    parts["scheduler"] = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    if kind == "sd15":
        stock = UNet2DConditionModel(
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=4,
            **common,
        ).eval()
        config |= {"transformer_depth": [1, 0], "transformer_depth_output": [1, 1, 0, 0], "num_heads": 4}
        config |= {"transformer_depth_middle": 1, "use_linear_in_transformer": False}
        pipeline = StableDiffusionPipeline(
            unet=stock, safety_checker=None, feature_extractor=None, requires_safety_checker=False, **parts
        )
        rounded(stock, stored)
        return Side(pipeline, real.unet(config, stock, stored), (77, 32))
    stock = UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=6 * 256 + 32,
        **common,
    ).eval()
    config |= {"transformer_depth": [0, 2], "transformer_depth_output": [0, 0, 2, 2], "num_head_channels": 16}
    config |= {"transformer_depth_middle": 2, "use_linear_in_transformer": True, "num_classes": "sequential"}
    config["adm_in_channels"] = 6 * 256 + 32
    pipeline = StableDiffusionXLPipeline(
        unet=stock, text_encoder_2=None, tokenizer_2=None, add_watermarker=False, **parts
    )
    rounded(stock, stored)
    size = {"width": 64, "height": 64}
    return Side(pipeline, real.unet(config, stock, stored), (77, 32), 32, size, size)


def rounded(model, dtype):
    """A model's weights as a file of that dtype has them."""
    if dtype is not None:
        for weight in model.parameters():
            weight.data.copy_(weight.data.to(dtype).to(weight.dtype))


class Flux(Side):
    """FLUX.1: latents in patches, no CFG."""

    def diffusers(self, **more):
        from diffusers import FluxPipeline

        noise = FluxPipeline._pack_latents(self.noise(), 1, 4, 8, 8)
        given = {"guidance_scale": 3.5, "negative_prompt_embeds": None, "negative_pooled_prompt_embeds": None}
        packed = super().diffusers(latents=noise, **given, **more)
        return FluxPipeline._unpack_latents(packed, 8, 8, 1)

    def comfyui(self, model=None, **texts):
        return super().comfyui(model, 1.0, **texts)


def flux():
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    stock = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    pipeline = FluxPipeline(
        transformer=stock,
        vae=tiny_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
    )
    config = {"image_model": "flux", "in_channels": 4, "out_channels": 4, "vec_in_dim": 32, "context_in_dim": 32}
    config |= {"hidden_size": 32, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2}
    config |= {"axes_dim": [4, 4, 8], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True}
    config["dtype"] = torch.float32
    size = {"width": 16, "height": 16}
    return Flux(pipeline, real.flux(config, stock), (24, 32), 32, size, {"guidance": 3.5})


PATHS = [
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2",
    "mid_block.attentions.0.transformer_blocks.0.attn2",
    "up_blocks.1.attentions.0.transformer_blocks.0.attn2",
    "up_blocks.1.attentions.1.transformer_blocks.0.attn2",
]
MAKERS = {"sd15": lambda: unet("sd15"), "sdxl": lambda: unet("sdxl"), "flux": flux}
