"""Tiny pipelines of the transformers whose blocks all keep image and text in streams of their own."""

import torch

from ...tiny import clip_text, clip_tokenizer, tiny_vae
from .family import Family
from .parts import flow_scheduler, qwen_vae, t5_text, t5_tokenizer

CALL = {"num_inference_steps": 2, "output_type": "np", "height": 32, "width": 32}


def sd3():
    """SD3.5-medium: self-attention of the image beside the joint one in the first block, and a last one without text.

    Fewer image tokens than text tokens, so that the two kinds of attention are told apart by their lengths.
    """
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ).eval()
    vae = tiny_vae()
    vae.register_to_config(shift_factor=0.1)
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        vae=vae,
        scheduler=flow_scheduler(shift=3.0),
        text_encoder=clip_text(with_projection=True),
        text_encoder_2=clip_text(with_projection=True),
        text_encoder_3=t5_text(channels=64),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=t5_tokenizer(),
    )
    return pipeline, {**CALL, "prompt": "a cat", "max_sequence_length": 16}


def qwen_image():
    """Qwen-Image, with two prompts of different lengths, so that the shorter one is padded."""
    from diffusers import QwenImagePipeline, QwenImageTransformer2DModel

    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    ).eval()
    pipeline = QwenImagePipeline(
        transformer=transformer,
        vae=qwen_vae(),
        scheduler=flow_scheduler(),
        text_encoder=_qwen_vl(),
        tokenizer=_qwen_tokenizer(),
    )
    guided = {"negative_prompt": ["bad", "very bad"], "true_cfg_scale": 2.0}
    return pipeline, {**CALL, **guided, "prompt": ["a cat", "a cat on a mat"], "max_sequence_length": 512}


def _qwen_vl():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16}
    text = {
        **sizes,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 266,
        "max_position_embeddings": 2048,
        "pad_token_id": 256,
        "bos_token_id": 256,
        "eos_token_id": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config={**sizes, "depth": 1, "num_heads": 2, "out_hidden_size": 16},
        image_token_id=262,
        video_token_id=263,
        vision_start_token_id=259,
        vision_end_token_id=260,
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def _qwen_tokenizer():
    """A Qwen 2 tokenizer of bytes."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    names = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"<|{name}|>" for name in names)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    special = tokens[257:]
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], model_max_length=2048, additional_special_tokens=special)


FAMILIES = [
    Family("sd3", "SD3Transformer2DModel", sd3, modules=3, text_first=False),
    Family(
        "qwen_image",
        "QwenImageTransformer2DModel",
        qwen_image,
        modules=2,
        text_first=True,
        mask="encoder_hidden_states_mask",
    ),
]
