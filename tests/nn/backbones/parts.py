"""Tokenizers and text encoders of the tiny backbones, with random weights, built from configs alone."""

import torch

LETTERS = [chr(code) for code in range(33, 127)]
WORD = "▁"  # how sentencepiece writes a space


def t5_tokenizer(length=512):
    """A T5 tokenizer whose words are letters."""
    from transformers import T5Tokenizer

    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (WORD, -2.0), *((letter, -3.0) for letter in LETTERS)]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=length)


def t5_text(channels=32, multilingual=False):
    """A two-layer T5 encoder, or UMT5."""
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    config, model = (UMT5Config, UMT5EncoderModel) if multilingual else (T5Config, T5EncoderModel)
    sizes = {"d_model": channels, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    return model(config(vocab_size=128, feed_forward_proj="gated-gelu", **sizes)).eval()


def gemma_tokenizer(length=512):
    """A Gemma tokenizer of bytes and letters."""
    from transformers import GemmaTokenizer

    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{code:02X}>" for code in range(256)), WORD, *LETTERS]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return GemmaTokenizer(vocab=vocabulary, merges=[], model_max_length=length, padding_side="right")


def gemma_text(channels=8):
    """A one-layer Gemma 2."""
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=400,
        hidden_size=channels,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=1024,
        sliding_window=128,
        query_pre_attn_scalar=8,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
    )
    return Gemma2Model(config).eval()


def qwen_vae():
    """Qwen-Image's autoencoder."""
    from diffusers import AutoencoderKLQwenImage

    torch.manual_seed(0)
    return AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()


def wan_vae():
    """Wan's autoencoder."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()


def words():
    """{text_encoder, tokenizer} of a pipeline that is given embeddings: it saves and loads both, and asks neither."""
    return {"text_encoder": t5_text(), "tokenizer": t5_tokenizer()}


def embeddings(*shape):
    """{prompt_embeds, negative_prompt_embeds} of a shape, as arguments of a pipeline."""
    prompt, negative = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    return {"prompt_embeds": prompt, "negative_prompt_embeds": negative}


def flow_scheduler(**settings):
    """The scheduler of the flow-matching models."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**settings)
