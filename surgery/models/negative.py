"""The negative prompt of a live pipeline's `nag` or `vsf`, by the pipeline's own encoders, and what its tokens are.

While the pipeline runs, its `encode_prompt` is listened to: with what it is called for the prompt it is called once
more for the negative prompt.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from surgery.errors import InputError, UnsupportedModelError
from surgery.nn.hooks import arguments_of
from surgery.nn.operators import ADDITIONS

from .anatomy import record_of
from .patching import denoisers, patched_modules
from .runs import stand_around, stand_aside

if TYPE_CHECKING:
    import torch

_LISTENER = "negative prompts"
_OWN = "pladis_negative_prompt"
# Of a pipeline's call of its encode_prompt, what is not said again for another prompt.
_NOT_AGAIN = ("embeds", "negative", "attention_mask", "prompt_2", "prompt_3", "prompt_4")


def negative(pipeline: Any, prompt: str | Sequence[str] | None) -> Any:
    """Set the negative prompt that the `nag` or `vsf` of a live pipeline leads away from, in place; returns it.

    prompt: one for all images, or one for each prompt of a run; "" is none, exactly. None: again the `negative_prompt`
    that the pipeline is called with, as it is before this is called. Nothing is compiled again for another prompt.
    Raises InputError for a pipeline that has neither, and for what is no prompt.
    """
    if not any(ADDITIONS[name].role == "negative" for name in _additions(pipeline)):
        raise InputError(
            'this pipeline has no negative prompt in attention; surgery.patch(pipe, operator="nag") or "vsf" does that'
        )
    is_text = isinstance(prompt, str) or prompt is None
    if not is_text and not (isinstance(prompt, (list, tuple)) and prompt and all(isinstance(p, str) for p in prompt)):
        raise InputError(f"a negative prompt must be text, a list of texts or None, not {prompt!r}")
    if not hasattr(pipeline, "encode_prompt"):
        raise UnsupportedModelError(
            f"{type(pipeline).__name__} has no encode_prompt() to encode it by: give its denoiser's tell() the tokens"
        )
    vars(pipeline).pop(_OWN, None)
    if prompt is not None:
        vars(pipeline)[_OWN] = prompt
    listen(pipeline)
    return pipeline


def listen(pipeline: Any) -> None:
    """Have a pipeline's runs tell its denoisers of their prompts, where they have additions which need it; else not."""
    from diffusers import DiffusionPipeline

    if not isinstance(pipeline, DiffusionPipeline) or not hasattr(pipeline, "encode_prompt"):
        return  # whoever calls the model tells it
    wanted = [name for name in _additions(pipeline) if ADDITIONS[name].role != "scores"]
    if not wanted:
        vars(pipeline).pop(_OWN, None)
        stand_aside(pipeline, _LISTENER)
        return
    stand_around(pipeline, _LISTENER, lambda args, kwargs: _told(pipeline, args, kwargs))


def _live(pipeline):
    return [getattr(model, "stood_for", model) for model in denoisers(pipeline).values()]  # guidance may stand before


def _additions(pipeline) -> list[Any]:
    found = (getattr(module, "pladis_additions", {}) for module in patched_modules(pipeline).values())
    return list(dict.fromkeys(name for own in found for name in own))


@contextmanager
def _told(pipeline, args, kwargs) -> Iterator[None]:
    """While it lasts, which is a run of the pipeline, its denoisers are told of the prompts that are encoded."""
    given, told = (
        arguments_of(type(pipeline).__call__, args, kwargs),
        [one for one in _live(pipeline) if _additions(one)],
    )
    asked = vars(pipeline).get(_OWN, given.get("negative_prompt"))
    names = _additions(pipeline)
    encode = pipeline.encode_prompt
    heard = False

    def listening(*own: Any, **more: Any) -> Any:
        nonlocal heard
        result = encode(*own, **more)
        if not heard:
            heard = True
            bound = inspect.signature(encode).bind(*own, **more)
            prompts = _prompts(pipeline, encode, bound, result, asked, names)
            for model in told:
                model.tell(prompts)
        return result

    vars(pipeline)["encode_prompt"] = listening
    try:
        yield
    finally:
        vars(pipeline).pop("encode_prompt", None)
        for model in told:
            model.tell(None)


def _prompts(pipeline, encode, bound, result, asked, names):
    """The Prompts of a run whose encode_prompt was called so, and gave `result`."""
    import torch

    from surgery.nn.additions import PADDING
    from surgery.nn.prompts import Prompts

    bound.apply_defaults()
    given = bound.arguments
    texts = given.get("prompt")
    embeds, mask = _embeds_and_mask(result)
    copies = given.get("num_images_per_prompt", given.get("num_videos_per_prompt")) or 1
    count = len(texts) if isinstance(texts, (list, tuple)) else embeds.shape[0] // copies
    backbone = record_of(_live(pipeline)[0])
    prompts = Prompts(
        pair=bool(given.get("do_classifier_free_guidance")) and backbone is not None and backbone.batches_cfg
    )
    by_kind = [name for name in names if ADDITIONS[name].role in ("keys", "shares")]
    if by_kind:
        if texts is None:
            raise InputError(
                f"{by_kind[0]} tells words from padding by the prompt's text; give prompt, not prompt_embeds"
            )
        texts = [texts] if isinstance(texts, str) else list(texts)
        prompts = prompts._replace(kinds=_kinds(pipeline, texts, embeds, mask).repeat_interleave(copies, 0))
    negatives = _as_many(asked, count) if any(ADDITIONS[name].role == "negative" for name in names) else []
    if not any(negatives):
        return prompts
    again = {name: value for name, value in given.items() if not any(part in name for part in _NOT_AGAIN)}
    again |= {name: None for name in given if name in ("prompt_2", "prompt_3", "prompt_4")}
    again |= {name: None for name in given if name == "complex_human_instruction"}  # SANA's, for prompts alone
    again |= {"prompt": negatives}
    again |= {"do_classifier_free_guidance": False} if "do_classifier_free_guidance" in given else {}
    embeds, mask = _embeds_and_mask(encode(**again))
    kinds = _kinds(pipeline, negatives, embeds, mask).repeat_interleave(copies, 0)
    return prompts._replace(
        negative=embeds,
        mask=mask,
        words=kinds != PADDING,
        active=torch.tensor([bool(text) for text in negatives], device=embeds.device).repeat_interleave(copies),
        negative_kinds=kinds if by_kind else None,
    )


def _as_many(asked, count):
    """The negative prompts of so many prompts; "" is none."""
    if asked is None or isinstance(asked, str):
        return [asked or ""] * count
    if len(asked) != count:
        raise InputError(f"{len(asked)} negative prompts for {count} prompts; give one for all, or one for each")
    return [text or "" for text in asked]


def _embeds_and_mask(result) -> "tuple[torch.Tensor, torch.Tensor | None]":
    """(tokens, (batch, tokens) mask or None) in what an encode_prompt gives back: the first of each."""
    import torch

    parts = [part for part in (result if isinstance(result, (list, tuple)) else [result]) if torch.is_tensor(part)]
    embeds = next((part for part in parts if part.ndim == 3), None)
    if embeds is None:
        raise UnsupportedModelError("its encode_prompt() gives back no tokens of one length for all prompts")
    return embeds, next((part for part in parts if part.shape == embeds.shape[:2]), None)


def _kinds(pipeline: Any, texts: Sequence[str], embeds: "torch.Tensor", mask: "torch.Tensor | None") -> "torch.Tensor":
    """(texts, tokens) of START, WORD and PADDING as in surgery/nn/additions.py, by the tokenizers and the mask.

    A row without words, an empty prompt's, has words alone: there is nothing to tell apart.
    """
    import torch

    from surgery.nn.additions import PADDING, WORD

    parts = [_tokenized(tokenizer, texts, size) for tokenizer, size in _tokenizers(pipeline, embeds.shape[1])]
    kinds, kept = (torch.cat(part, dim=1).to(embeds.device) for part in zip(*parts, strict=True))
    if mask is not None:
        own = mask[:: embeds.shape[0] // len(texts)].bool()
        if not torch.equal(own, kept):  # the pipeline puts words of its own around the prompt, or no padding behind it
            kinds = torch.where(own, WORD, PADDING)
    return torch.where((kinds == WORD).any(1, keepdim=True), kinds, WORD)


def _tokenizers(pipeline, length):
    """[(tokenizer, how many of the text's tokens it makes)] in the order of the text."""
    first, second, third = (getattr(pipeline, name, None) for name in ("tokenizer", "tokenizer_2", "tokenizer_3"))
    size = min(getattr(first, "model_max_length", length) or length, length)
    if third is not None and length > size:  # SD3: CLIP's tokens, then T5's
        return [(first, size), (third, length - size)]
    return [(first if second is None or length == size else second, length)]


def _tokenized(tokenizer, texts, length):
    """((texts, length) kinds of tokens, (texts, length) bool: which are no padding by the tokenizer)."""
    import torch

    from surgery.nn.additions import PADDING, START, WORD

    options: Mapping[str, Any] = {"padding": "max_length", "max_length": length, "truncation": True}
    found = tokenizer(list(texts), **options, return_tensors="pt", return_attention_mask=True)
    ids, kept = found.input_ids, found.attention_mask.bool()
    special = torch.isin(ids, torch.tensor(sorted(set(tokenizer.all_special_ids)), dtype=ids.dtype))
    kinds = torch.where(kept & ~special, WORD, PADDING)
    if getattr(tokenizer, "bos_token_id", None) is not None:
        kinds[:, 0] = torch.where(ids[:, 0] == tokenizer.bos_token_id, START, kinds[:, 0])
    return kinds, kept
