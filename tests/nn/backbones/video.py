"""Tiny pipelines of the transformers that draw videos, called with two prompts, the shorter one of them padded."""

import torch

from ...tiny import clip_text, clip_tokenizer
from .family import Family
from .parts import LETTERS, WORD, flow_scheduler, t5_text, t5_tokenizer, wan_vae

CALL = {
    "prompt": ["a cat", "a cat on it"],
    "num_inference_steps": 2,
    "output_type": "np",
    "num_frames": 9,
    "max_sequence_length": 16,
}


def ltx():
    """LTX-Video; image and text of one width, as in its checkpoints."""
    from diffusers import AutoencoderKLLTXVideo, LTXPipeline, LTXVideoTransformer3DModel

    torch.manual_seed(0)
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=32,
    ).eval()
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
    ).eval()
    pipeline = LTXPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=flow_scheduler(),
        text_encoder=t5_text(),
        tokenizer=t5_tokenizer(),
    )
    return pipeline, {**CALL, "negative_prompt": ["bad", "bad"], "height": 32, "width": 32}


def wan():
    """Wan from text."""
    from diffusers import WanPipeline

    transformer, parts = _wan_parts(in_channels=16)
    pipeline = WanPipeline(transformer=transformer, **parts)
    return pipeline, {**CALL, "height": 32, "width": 32}


def wan22():
    """Wan 2.2 A14B: one transformer for the first of the two steps, another for the second."""
    from diffusers import WanPipeline, WanTransformer3DModel

    transformer, parts = _wan_parts(in_channels=16)
    second = WanTransformer3DModel.from_config(transformer.config).eval()
    pipeline = WanPipeline(transformer=transformer, transformer_2=second, **parts, boundary_ratio=0.9)
    return pipeline, {**CALL, "height": 32, "width": 32}


def wan_from_image():
    """Wan 2.1 from an image, whose tokens stand before the 512 of text."""
    from diffusers import WanImageToVideoPipeline
    from PIL import Image
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    # noise, a mask of the four frames behind each latent one, the image's latents
    transformer, parts = _wan_parts(in_channels=36, image_dim=8, added_kv_proj_dim=24)
    config = CLIPVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    pipeline = WanImageToVideoPipeline(
        transformer=transformer,
        **parts,
        image_encoder=CLIPVisionModel(config).eval(),
        image_processor=CLIPImageProcessor(size=8, crop_size=8),
    )
    text, other = torch.randn(2, 1, 512, 32, generator=torch.Generator().manual_seed(0))  # prompts would need ftfy
    given = {"image": Image.new("RGB", (32, 32), (200, 30, 60)), "prompt_embeds": text, "negative_prompt_embeds": other}
    return pipeline, {**CALL, **given, "prompt": None, "height": 32, "width": 32}


def _wan_parts(**settings):
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        out_channels=16,
        text_dim=32,
        freq_dim=64,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        **settings,
    ).eval()
    return transformer, {
        "vae": wan_vae(),
        "scheduler": flow_scheduler(shift=3.0),
        "text_encoder": t5_text(multilingual=True),
        "tokenizer": t5_tokenizer(),
    }


def mochi():
    """Mochi 1 without guidance and with one prompt: diffusers attends to each entry of a batch on its own."""
    from diffusers import AutoencoderKLMochi, MochiPipeline, MochiTransformer3DModel

    torch.manual_seed(0)
    transformer = MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        text_embed_dim=32,
        time_embed_dim=4,
        max_sequence_length=16,
    ).eval()
    torch.nn.init.normal_(transformer.pos_frequencies)  # zeros otherwise, and no rotation
    vae = AutoencoderKLMochi(
        latent_channels=12,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    ).eval()
    pipeline = MochiPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=flow_scheduler(),
        text_encoder=t5_text(),
        tokenizer=t5_tokenizer(),
    )
    size = {"height": 32, "width": 48, "num_frames": 7}
    return pipeline, {**CALL, **size, "prompt": "a cat on it", "guidance_scale": 1.0}


def hunyuan_video(**settings):
    """HunyuanVideo. settings: of its transformer, beyond the usual."""
    from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel

    torch.manual_seed(0)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=1,
        text_embed_dim=16,
        pooled_projection_dim=32,
        rope_axes_dim=(2, 4, 4),
        **settings,
    ).eval()
    for name, weight in transformer.named_parameters():
        if "attn.norm" in name:  # scores so far apart that the operators differ from softmax
            torch.nn.init.constant_(weight, 3.0)
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    ).eval()
    pipeline = HunyuanVideoPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=flow_scheduler(shift=7.0),
        text_encoder=_llama(),
        tokenizer=_llama_tokenizer(),
        text_encoder_2=clip_text(),
        tokenizer_2=clip_tokenizer(),
    )
    template = {"template": "{}", "crop_start": 0}
    return pipeline, {**CALL, "height": 32, "width": 32, "prompt_template": template}


def _llama():
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    return LlamaModel(config).eval()


def _llama_tokenizer():
    from transformers import LlamaTokenizerFast

    tokens = ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{code:02X}>" for code in range(256)), WORD, *LETTERS]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return LlamaTokenizerFast(vocab=vocabulary, merges=[], pad_token="<pad>", model_max_length=512)


class _WithoutPadding(Family):
    """A model that takes padding out of the text before attention sees it."""

    def text_length(self, call):
        return int(call[self.mask].sum())


FAMILIES = [
    Family("ltx", "LTXVideoTransformer3DModel", ltx, modules=2, mask="encoder_attention_mask"),
    Family("wan", "WanTransformer3DModel", wan, modules=2),
    Family("wan_from_image", "WanTransformer3DModel", wan_from_image, modules=2),
    _WithoutPadding(
        "mochi", "MochiTransformer3DModel", mochi, modules=2, text_first=False, mask="encoder_attention_mask"
    ),
    Family(
        "hunyuan_video",
        "HunyuanVideoTransformer3DModel",
        hunyuan_video,
        modules=4,
        text_first=False,
        mask="encoder_attention_mask",
    ),
]
