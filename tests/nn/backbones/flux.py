"""Tiny pipelines of FLUX.1 and FLUX.2: blocks of two streams, then blocks of one."""

import torch

from ...tiny import clip_text, clip_tokenizer, tiny_vae
from .family import Family
from .parts import flow_scheduler, t5_text, t5_tokenizer

CALL = {"num_inference_steps": 2, "output_type": "np"}


def flux(guidance_embeds=True):
    """FLUX.1-dev; without guidance embedding, FLUX.1-schnell."""
    from diffusers import FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    vae = tiny_vae()
    vae.register_to_config(shift_factor=0.1)
    pipeline = FluxPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=flow_scheduler(),
        text_encoder=clip_text(),
        text_encoder_2=t5_text(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=t5_tokenizer(),
    )
    return pipeline, {**CALL, "prompt": ["a cat", "two dogs"], "height": 32, "width": 32, "max_sequence_length": 24}


def flux2_klein(guidance_embeds=False):
    """FLUX.2 Klein base, drawn with guidance; with guidance embedding, its transformer is like FLUX.2-dev's."""
    from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel

    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    ).eval()
    vae = AutoencoderKLFlux2(
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        sample_size=32,
    ).eval()
    pipeline = Flux2KleinPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=flow_scheduler(),
        text_encoder=qwen3_text(),
        tokenizer=qwen3_tokenizer(),
        is_distilled=False,
    )
    size = {"height": 16, "width": 16, "max_sequence_length": 48, "text_encoder_out_layers": (0, 1)}
    return pipeline, {**CALL, **size, "prompt": ["a cat", "two dogs"], "guidance_scale": 4.0}


def qwen3_text():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=266,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        pad_token_id=256,
    )
    return Qwen3ForCausalLM(config).eval()


def qwen3_tokenizer():
    """A Qwen 2 tokenizer of bytes with a chat template."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary, merges=[], model_max_length=512, additional_special_tokens=list(tokens[257:])
    )
    tokenizer.chat_template = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
    return tokenizer


FAMILIES = [
    Family("flux", "FluxTransformer2DModel", flux, modules=4, text_first=True),
    Family("flux2", "Flux2Transformer2DModel", flux2_klein, modules=4, text_first=True),
]
