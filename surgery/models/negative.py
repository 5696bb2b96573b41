"""The negative prompt of a live pipeline's `nag` or `vsf`, or the prompts of its `regions`, by its own encoders.

While the pipeline runs, its `encode_prompt` is listened to: with what it is called for the prompt it is called once
more for the negative prompt.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from surgery.errors import InputError, UnsupportedModelError
from surgery.nn.hooks import arguments_of
from surgery.nn.operators import ADDITIONS, TOLD_ROLES

from .anatomy import record_of
from .encoded import kinds_of, reading
from .patching import attachment, denoisers, patched_modules
from .regions import REGIONS, regions_of
from .runs import stand_around, stand_aside
from .twofold import plain_of

if TYPE_CHECKING:
    pass

_LISTENER = "negative prompts"
_OWN = "pladis_negative_prompt"
_ALWAYS = "pladis_always_told"
# Of a pipeline's call of its encode_prompt, what is not said again for another prompt.
_NOT_AGAIN = ("embeds", "negative", "attention_mask", "prompt_2", "prompt_3", "prompt_4")


def has_negative(pipeline: Any) -> bool:
    """Whether a live pipeline is patched with an operation on negative prompts."""
    return bool({"nag", "vsf"} & set(_additions(pipeline)))


def negative(pipeline: Any, prompt: str | Sequence[str] | None) -> Any:
    """Set the negative prompt that the `nag` or `vsf` of a live pipeline leads away from, in place; returns it.

    prompt: one for all images, or one for each prompt of a run; "" is none, exactly. None: again the `negative_prompt`
    that the pipeline is called with, as it is before this is called. Nothing is compiled again for another prompt.
    Raises InputError for a pipeline that has neither, and for what is no prompt.
    """
    if not has_negative(pipeline):
        raise InputError(
            'this pipeline has no negative prompt in attention; surgery.patch(pipe, operator="nag") or "vsf" does that'
        )
    is_text = isinstance(prompt, str) or prompt is None
    if not is_text and not (isinstance(prompt, (list, tuple)) and prompt and all(isinstance(p, str) for p in prompt)):
        raise InputError(f"a negative prompt must be text, a list of texts or None, not {prompt!r}")
    _check_encodes(pipeline)
    vars(pipeline).pop(_OWN, None)
    if prompt is not None:
        vars(pipeline)[_OWN] = prompt
    listen(pipeline)
    return pipeline


def regions(pipeline: Any, given: Sequence[Mapping[str, Any]] | None) -> Any:
    """Set the regional prompts of a live pipeline that is patched with `regions`, in place; returns it.

    given: for each region {"prompt": text, "box": [left, top, right, bottom]}, parts of the image from 0 to 1, or with
    a "mask" in place of the box: an image, a file of one or (height, width) numbers, white or 1 being the region.
    Regions may overlap; the prompt of the run is everything else's, and `base` its share in them. None: no regions,
    exactly.
    Nothing is compiled again for other regions of as many prompts.
    Raises InputError for what is no region, and a pipeline that is not patched so.
    """
    if "regions" not in _additions(pipeline):
        raise InputError('this pipeline has no regional prompts; surgery.patch(pipe, operator="regions") does that')
    _check_encodes(pipeline)
    vars(pipeline).pop(REGIONS, None)
    if given is not None:
        vars(pipeline)[REGIONS] = regions_of(given)
    listen(pipeline)
    return pipeline


@contextmanager
def told_in(pipeline: Any, arguments: dict[str, Any]) -> Iterator[None]:
    """While it lasts, `regions` and the negative prompt among a run's arguments are told to the pipeline's operations.

    Takes them out of `arguments`: `regions` always, a negative prompt where the pipeline has no such argument. A
    pipeline that is not patched, a base, has no regions. Raises InputError as `regions`.
    """
    given = arguments.pop("regions", None)
    before = {name: vars(pipeline).get(name) for name in (_OWN, REGIONS)}
    if given and patched_modules(pipeline):
        regions(pipeline, given)
    has_argument = "negative_prompt" in inspect.signature(type(pipeline).__call__).parameters
    if not has_argument and "negative_prompt" in arguments and has_negative(pipeline):
        negative(pipeline, arguments.pop("negative_prompt"))
    try:
        yield
    finally:
        for name, value in before.items():
            vars(pipeline).pop(name, None)
            vars(pipeline).update({} if value is None else {name: value})


def always_tell(pipeline: Any) -> None:
    """Have the denoisers of a pipeline told of a negative prompt in all their calls, be it that there is none.

    So that they are all alike, as an engine's are. A pipeline whose denoiser runs an engine does so by itself.
    """
    vars(pipeline)[_ALWAYS] = True


def _check_encodes(pipeline):
    if not hasattr(pipeline, "encode_prompt"):
        raise UnsupportedModelError(
            f"{type(pipeline).__name__} has no encode_prompt() to encode it by: give its denoiser's tell() the tokens"
        )


def listen(pipeline: Any) -> None:
    """Have a pipeline's runs tell its denoisers of their prompts, where they have additions which need it; else not."""
    from diffusers import DiffusionPipeline

    if not isinstance(pipeline, DiffusionPipeline) or not hasattr(pipeline, "encode_prompt"):
        return  # whoever calls the model tells it
    wanted = [name for name in _additions(pipeline) if ADDITIONS[name].role in TOLD_ROLES]
    if not wanted:
        for name in (_OWN, REGIONS):
            vars(pipeline).pop(name, None)
        stand_aside(pipeline, _LISTENER)
        return
    stand_around(pipeline, _LISTENER, lambda args, kwargs: _told(pipeline, args, kwargs))


def _live(pipeline):
    return [getattr(model, "stood_for", model) for model in denoisers(pipeline).values()]  # guidance may stand before


def _told_of(pipeline):
    """The denoisers that are told of the prompts; a pipeline's are of one class."""
    return [one for one in _live(pipeline) if _additions(one)]


def _additions(pipeline) -> list[Any]:
    found = (getattr(module, "pladis_additions", {}) for module in patched_modules(pipeline).values())
    return list(dict.fromkeys(name for own in found for name in own))


@contextmanager
def _told(pipeline, args, kwargs) -> Iterator[None]:
    """While it lasts, which is a run of the pipeline, its denoisers are told of the prompts that are encoded."""
    given, told = arguments_of(type(pipeline).__call__, args, kwargs), _told_of(pipeline)
    asked = vars(pipeline).get(_OWN, given.get("negative_prompt"))
    names = _additions(pipeline)
    encode = pipeline.encode_prompt
    heard = False

    def listening(*own: Any, **more: Any) -> Any:
        nonlocal heard
        with reading(pipeline) as reads:
            result = encode(*own, **more)
        if not heard:
            heard = True
            bound = inspect.signature(encode).bind(*own, **more)
            prompts = _prompts(pipeline, encode, bound, (result, reads), asked, names)
            prompts = prompts._replace(always=_always(pipeline))
            if "diversity" in names:
                prompts = prompts._replace(noise=_noise(_encoded(pipeline, result)[0], given.get("generator")))
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


def _prompts(pipeline, encode, bound, heard, asked, names):
    """The Prompts of a run whose encode_prompt was called so. heard: what it gave, what the encoders read."""
    import torch

    from surgery.nn.additions import PADDING
    from surgery.nn.prompts import Prompts

    bound.apply_defaults()
    given = bound.arguments
    texts = given.get("prompt")
    (result, reads), text_dim = heard, _told_of(pipeline)[0].text_dim
    embeds, _, _ = _encoded(pipeline, result)
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
        kinds = _kinds(pipeline, reads, embeds, count, text_dim)
        if kinds is None:
            raise UnsupportedModelError(
                f"{by_kind[0]}: what {type(pipeline).__name__} gives its denoiser as text is no output of its text "
                "encoders, so which of it is padding is not known"
            )
        prompts = prompts._replace(kinds=kinds.repeat_interleave(copies, 0))
    if "regions" in names:
        return _with_regions(pipeline, encode, given, prompts, count * copies)
    negatives = _as_many(asked, count) if any(ADDITIONS[name].role == "text" for name in names) else []
    if not any(negatives) and not (negatives and _always(pipeline)):
        return prompts
    with reading(pipeline) as reads:
        embeds, mask, more = _encoded(pipeline, encode(**_again(given, negatives)))
    kinds = _kinds(pipeline, reads, embeds, len(negatives), text_dim)
    kinds = None if kinds is None else kinds.repeat_interleave(copies, 0)
    return prompts._replace(
        negative=embeds,
        mask=mask,
        words=mask if kinds is None else kinds != PADDING,
        active=torch.tensor([bool(text) for text in negatives], device=embeds.device).repeat_interleave(copies),
        negative_kinds=kinds if by_kind else None,
        more=more,
    )


def _always(pipeline):
    engines = [attachment(model) for model in _live(pipeline)]
    return _ALWAYS in vars(pipeline) or any(engine is not None and engine.takes_texts for engine in engines)


def _noise(embeds, generator):
    """(2, images, ...) of normal and even noise as text_stream.py has it, of each image's seed."""
    import torch

    given = generator if isinstance(generator, (list, tuple)) else [generator] * len(embeds)
    seeds = [torch.initial_seed() if one is None else one.initial_seed() for one in given]
    drawn = []
    for index, seed in enumerate(seeds):
        number = seed + (0 if isinstance(generator, (list, tuple)) else index)
        own = torch.Generator().manual_seed(number % 2**63)
        drawn.append(torch.stack([draw(embeds.shape[1:], generator=own) for draw in (torch.randn, torch.rand)]))
    return torch.stack(drawn, dim=1).to(embeds.device)


def _again(given, texts):
    """The arguments of an encode_prompt for other texts."""
    again = {name: value for name, value in given.items() if not any(part in name for part in _NOT_AGAIN)}
    again |= {name: None for name in given if name in ("prompt_2", "prompt_3", "prompt_4")}
    again |= {name: None for name in given if name == "complex_human_instruction"}  # SANA's, for prompts alone
    again |= {"do_classifier_free_guidance": False} if "do_classifier_free_guidance" in given else {}
    return {**again, "prompt": texts}


def _with_regions(pipeline, encode, given, prompts, images):
    """The Prompts of so many images with the pipeline's regions, which all of them have."""
    import torch

    texts, areas = vars(pipeline).get(REGIONS, ((), None))
    if not texts:
        return prompts
    again = _again(given, list(texts))
    again |= {name: 1 for name in ("num_images_per_prompt", "num_videos_per_prompt") if name in again}
    with reading(pipeline) as reads:
        embeds, mask, more = _encoded(pipeline, encode(**again))
    text_dim = _told_of(pipeline)[0].text_dim

    def in_one(tensor, dim):
        """(regions, ..., tokens, ...) as (images, ..., all their tokens, ...)."""
        whole = torch.cat(list(tensor[:, None]), dim=dim)
        return whole.expand(images, *whole.shape[1:])

    kinds = _kinds(pipeline, reads, embeds, len(texts), text_dim) if prompts.kinds is not None else None
    return prompts._replace(
        negative=in_one(embeds, text_dim),
        mask=None if mask is None else in_one(mask, 1),
        active=torch.ones(images, dtype=torch.bool, device=embeds.device),
        negative_kinds=None if kinds is None else in_one(kinds, 1),
        more=tuple(in_one(one, one.ndim - 2) for one in more),
        areas=areas,
    )


def _as_many(asked, count):
    """The negative prompts of so many prompts; "" is none."""
    if asked is None or isinstance(asked, str):
        return [asked or ""] * count
    if len(asked) != count:
        raise InputError(f"{len(asked)} negative prompts for {count} prompts; give one for all, or one for each")
    return [text or "" for text in asked]


def _encoded(pipeline, result):
    found = _told_of(pipeline)[0].encoded(pipeline, plain_of(result))
    if found is None:
        raise UnsupportedModelError(f"{type(pipeline).__name__}'s encode_prompt() gives back no tokens")
    return found


def _kinds(pipeline, reads, embeds, count, text_dim):
    """(texts, tokens) of START, WORD and PADDING; None where the encoders' states are not in the text."""
    import torch

    rows = embeds[:: embeds.shape[0] // count]
    rows = rows if rows.ndim == 3 else rows.select(3 - text_dim, 0)  # of several layers' states the first
    found = [kinds_of(pipeline, reads, text) for text in rows]
    return None if any(one is None for one in found) else torch.tensor(found, device=embeds.device)
