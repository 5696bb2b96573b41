"""Negative prompts and words where a pipeline has several encoders, or reads layers of one: real classes, tiny."""

import pytest
import torch

import surgery

from ..guidance import loops
from ..nn.backbones.checks import denoiser
from ..nn.backbones.flux import qwen3_tokenizer
from ..nn.backbones.flux_copies import bria_fibo as fibo
from ..nn.backbones.parts import gemma_tokenizer, t5_text, t5_tokenizer
from ..tiny import clip_text, clip_tokenizer

LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def _with(made, **parts):
    """A pipeline of loops.py whose prompts its own encoders read."""
    pipeline, arguments = made
    del pipeline.encode_prompt
    pipeline.register_modules(**parts)
    return pipeline, {**arguments, "prompt": "a cat", "guidance_scale": 1.0}


def glm_image():
    """GLM-Image: what is in quotation marks is its text, read by ByT5."""
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 384}
    torch.manual_seed(0)
    made = loops.glm_image()
    made[1]["prior_token_ids"] = made[1]["prior_token_ids"][:1]
    encoder = T5EncoderModel(T5Config(**sizes)).eval()
    pipeline, arguments = _with(made, text_encoder=encoder, tokenizer=ByT5Tokenizer())
    return pipeline, {**arguments, "prompt": "a sign that says 'open'"}, "a sign that says 'shut'"


def hidream():
    """HiDream-I1: two of CLIP's, T5 and all layers of a Llama."""
    from diffusers import HiDreamImageTransformer2DModel
    from transformers import LlamaConfig, LlamaForCausalLM

    pipeline, arguments = loops.hidream()
    torch.manual_seed(0)
    config = {**pipeline.transformer.config, "text_emb_dim": 64}  # of both of CLIP's
    pipeline.register_modules(transformer=HiDreamImageTransformer2DModel.from_config(config).eval())
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=266, attn_implementation="eager", **LLAMA)).eval()
    parts = {"text_encoder_3": t5_text(16), "text_encoder_4": llama}
    parts |= {"tokenizer_3": t5_tokenizer(), "tokenizer_4": qwen3_tokenizer()}
    parts |= {name: clip_text(with_projection=True) for name in ("text_encoder", "text_encoder_2")}
    parts |= {name: clip_tokenizer() for name in ("tokenizer", "tokenizer_2")}
    pipeline, arguments = _with((pipeline, arguments), **parts)
    return pipeline, {**arguments, "max_sequence_length": 16}, "a dog"


def bria_fibo():
    """FIBO: layers of SmolLM3, an empty prompt being Llama 3's first token."""
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    pipeline, arguments = fibo()
    torch.manual_seed(0)
    config = SmolLM3Config(vocab_size=128_001, **{**LLAMA, "hidden_size": 32, "head_dim": 16}, pad_token_id=256)
    pipeline.register_modules(text_encoder=SmolLM3ForCausalLM(config).eval(), tokenizer=qwen3_tokenizer())
    del arguments["negative_prompt"]
    return pipeline, {**arguments, "prompt": "a cat", "guidance_scale": 1.0}, "a dog"


def ltx2():
    """LTX-2: all layers of Gemma 3, and its connectors."""
    from diffusers.pipelines.ltx2 import LTX2TextConnectors
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(0)
    text = {**LLAMA, "vocab_size": 400, "sliding_window": 64, "max_position_embeddings": 512}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    encoder = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=399)
    ).eval()
    pipeline, arguments = loops.ltx2()
    connectors = LTX2TextConnectors.from_config({**pipeline.connectors.config, "text_proj_in_factor": 3}).eval()
    made = pipeline, arguments
    pipeline, arguments = _with(made, text_encoder=encoder, tokenizer=gemma_tokenizer(), connectors=connectors)
    return pipeline, {**arguments, "max_sequence_length": 32}, "a dog"


PIPELINES = [glm_image, hidream, bria_fibo, ltx2]


@pytest.fixture(scope="module", params=PIPELINES, ids=lambda made: made.__name__)
def built(request):
    return request.param()


@pytest.fixture
def pipeline(built):
    """(A pipeline, the arguments of a call, another prompt); whatever a test patches is taken out again."""
    yield built
    if hasattr(denoiser(built[0]), "revert"):
        surgery.unpatch(built[0])


def drawn(pipeline, arguments):
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        found = pipeline(generator=torch.Generator().manual_seed(0), **arguments)
    return torch.as_tensor(next(getattr(found, name) for name in ("images", "frames") if hasattr(found, name)))


def test_a_negative_prompt_is_read_as_the_prompt_is(pipeline):
    pipeline, arguments, other = pipeline
    base = drawn(pipeline, arguments)
    size = base.square().mean().sqrt()
    surgery.patch(pipeline, operator="nag", phi=8.0, blend=1.0)
    surgery.negative(pipeline, arguments["prompt"])
    assert (drawn(pipeline, arguments) - base).abs().max() < 1e-3 * size  # away from itself is nowhere
    surgery.negative(pipeline, other)
    assert (drawn(pipeline, arguments) - base).abs().max() > 1e-2 * size
    surgery.negative(pipeline, "")
    assert (drawn(pipeline, arguments) - base).abs().max() < 1e-4 * size


def test_words_are_told_from_padding_by_what_the_encoders_read(pipeline):
    """LTX-2's connectors make a text of its own; FIBO's mask leaves its padding out by itself."""
    pipeline, arguments, other = pipeline
    if type(pipeline).__name__ == "BriaFiboPipeline":
        arguments = {**arguments, "prompt": [arguments["prompt"], other + " on a mat"]}
    base = drawn(pipeline, arguments)
    surgery.patch(pipeline, operator="words")
    if type(pipeline).__name__ == "LTX2Pipeline":
        with pytest.raises(surgery.UnsupportedModelError, match="LTX2Pipeline .* no output of its text encoders"):
            drawn(pipeline, arguments)
        return
    found = drawn(pipeline, arguments)
    assert found.isfinite().all()
    assert ((found - base).abs().max() > 1e-4) == (type(pipeline).__name__ != "BriaFiboPipeline")
    surgery.tune(pipeline, kept=1.0)
    assert (drawn(pipeline, arguments) - base).abs().max() < 1e-4
