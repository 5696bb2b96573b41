"""What a model with additions is told of the prompts of a run, and how its modules come to know it.

The negative prompt's tokens are put behind the text's where the model is called, so that whatever the model makes of
its text it makes of them; modules that attend to the text without an addition are not shown them.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .additions import WORD, Teller, Told, negative_role
from .further_text import FurtherTexts
from .hooks import arguments_of
from .module import is_pladis
from .text_stream import put_stream_hooks, with_noise


class Prompts(NamedTuple):
    """Of the images of a run, in their order.

    negative: the negative prompt as the pipeline encodes it, (images, tokens, channels), or None. mask: (images,
    tokens), nonzero where one is attended to, as the model takes its text's, or None. words: (images, tokens) bool,
    which are no padding. active: (images,) bool, which images have one. pair: that a call of twice as many rows is
    CFG's, [without prompt, with prompt]. kinds: (images, the text's tokens) as in additions.py; negative_kinds too.
    more: what else the model is given of the same text, each as `negative` is. areas: (regions, height, width) bool of
    the image, where `negative` has the prompts of as many regions one behind the other, of one length. noise: (2,
    images, ...) as text_stream.py has it, for `diversity`. always: that calls without the prompt, which are CFG's own,
    are told of the texts as well, and that no image has one there: an engine's calls are all alike.
    """

    negative: Tensor | None = None
    mask: Tensor | None = None
    words: Tensor | None = None
    active: Tensor | None = None
    pair: bool = False
    kinds: Tensor | None = None
    negative_kinds: Tensor | None = None
    more: tuple[Tensor, ...] = ()
    areas: Tensor | None = None
    noise: Tensor | None = None
    always: bool = False


def put_hooks(model: Any, negative: bool) -> list:
    """Have a model tell its modules of the prompts that it is told; negative: that one may be negative."""
    teller = Teller()
    for module in model.modules():
        if is_pladis(module):
            module.pladis_teller = teller
    handles = [model.register_forward_pre_hook(functools.partial(_tell, teller), with_kwargs=True)]
    handles += _further_text_hooks(model, teller) if negative else []
    return handles + put_stream_hooks(model, teller)


def _further_text_hooks(model, teller):
    hide, handles = functools.partial(_hide, teller), []
    handles += [other.register_forward_pre_hook(hide, with_kwargs=True) for other in _others(model)]
    for pattern, tokens in model.apart.items():
        for path, module in model.named_modules():
            if re.fullmatch(pattern, path):
                handles += Apart(teller, tokens).hooks(module)
    for stack in model.negative_blocks:
        for index, block in enumerate(getattr(model, stack)):
            at_block = functools.partial(_at_block, teller, model, index == 0 and stack == model.negative_blocks[0])
            handles.append(block.register_forward_pre_hook(at_block, with_kwargs=True))
            handles.append(block.register_forward_hook(functools.partial(_behind_block, teller, model)))
    return handles


def _others(model):
    """The modules with attention to the text that have no negative prompt, patched or not."""
    modules = [model.get_submodule(path) for path in model.text_sites(model)]
    return [module for module in modules if not (is_pladis(module) and negative_role(module))]


class Apart:
    """Hooks of a module that works on text alone: it is run for the prompt and for each further text by itself.

    tokens: {argument: its dimension of the text's tokens}.
    """

    def __init__(self, teller: Teller, tokens: Mapping[str, int]) -> None:
        self.teller, self.tokens = teller, tokens
        self.further: list[dict[str, Any]] = []

    def hooks(self, module: nn.Module) -> list:
        """Put them on."""
        return [
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            module.register_forward_hook(self._behind),
        ]

    def _before(self, module, args, kwargs):
        told = self.teller.told
        self.further, begin = [], 0
        if not told.negative:
            return None
        given = arguments_of(type(module).forward, args, kwargs)
        for length in told.lengths:
            self.further.append(self._part(given, begin - told.negative, length))
            begin += length
        return (), self._part(given, 0, -told.negative)

    def _behind(self, module, args, output):
        further, self.further = self.further, []
        return torch.cat([output, *(module.forward(**given) for given in further)], dim=1) if further else None

    def _part(self, given, begin, length):
        """The arguments with `length` of the text's tokens from `begin` on, each counted from the end if below 0."""

        def cut(value, dim):
            if isinstance(value, tuple):
                return tuple(cut(part, dim) for part in value)
            first = begin if begin >= 0 else value.shape[dim] + begin
            return value.narrow(dim, first, length if length >= 0 else value.shape[dim] + length)

        changed = {name: cut(given[name], dim) for name, dim in self.tokens.items() if given.get(name) is not None}
        if self.teller.told.shown is not None and begin < 0:  # the model was told that it is padding
            own = self.teller.told.encoded[1]
            for name in changed:
                if name.endswith("mask") and own is not None:
                    part = own.narrow(1, own.shape[1] + begin, length)
                    changed[name] = part.reshape(changed[name].shape).to(changed[name])
        return {**given, **changed}


def _behind_block(teller, model, block, args, output):
    return model.behind_block(teller, output) if teller.told.negative else None


def _at_block(teller, model, first, block, args, kwargs):
    if not teller.told.negative:
        return None
    return (), model.at_block(teller, arguments_of(type(block).forward, args, kwargs), first)


def _tell(teller: Teller, model: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    prompts: Prompts | None = model.__dict__.get("_pladis_prompts")
    teller.told = Told()
    without_prompt = model.__dict__.get("_pladis_context") == "uncond"
    if prompts is None:
        return None
    given = arguments_of(model.stock.forward, args, kwargs)
    text = given[model.text]
    if without_prompt and not prompts.always:
        if prompts.kinds is not None:  # there are no words to tell apart
            size = len(text), max(len(one) for one in text) if isinstance(text, list) else text.shape[model.text_dim]
            kinds = model.kinds_of_text(torch.full(size, WORD, device=text[0].device), given)
            teller.told = Told(kinds=torch.full_like(kinds, WORD))
        return None
    if isinstance(text, tuple):
        raise ValueError("a negative prompt in attention has no place in a text of two parts, as this call's is")
    batch, images, device = len(text), _images(prompts), text[0].device
    if batch % images:
        raise ValueError(f"the denoiser was told of {images} prompts, which do not fit a batch of {batch}")
    start = images if prompts.pair and batch == 2 * images else 0
    times = batch // images

    def of_all(tensor):
        return None if tensor is None else tensor.to(device).repeat(times, *[1] * (tensor.ndim - 1))

    kinds = of_all(prompts.kinds)
    kinds = None if kinds is None else model.kinds_of_text(kinds, given)
    if kinds is not None and start:
        kinds[:start] = WORD  # without a prompt there are no words to tell apart
    if kinds is not None and without_prompt:
        kinds = torch.full_like(kinds, WORD)
    if prompts.noise is not None and not without_prompt:
        given = {**given, model.text: _with_noise(model, text, prompts.noise.to(device), start, times)}
    if prompts.negative is None:
        teller.told = Told(kinds=kinds)
        return (), given
    tokens, active, mask = (of_all(tensor) for tensor in (prompts.negative, prompts.active, prompts.mask))
    assert tokens is not None and active is not None  # what has one says of which images
    more = tuple(one for one in map(of_all, prompts.more) if one is not None)
    kinds_of_negative = of_all(prompts.negative_kinds)
    texts = 1 if prompts.areas is None else prompts.areas.shape[0]
    length = tokens.shape[model.text_dim] // texts
    around = model.around_negative(length, given)
    whole = sum(around) + length
    if kinds is not None:
        behind = kinds_of_negative
        behind = None if behind is None else _of_each(texts, behind, model.kinds_of_text, given)
        kinds = None if behind is None else torch.cat([kinds, behind], dim=1)
    words, shown = of_all(prompts.words), None
    every = torch.ones(batch, texts * length, dtype=torch.bool, device=device)
    if model.hides_negative:
        shown = _of_each(texts, every if mask is None else mask.bool(), model.negative_shown, given)
    if words is not None or any(around):
        words = _of_each(texts, every if words is None else words.bool(), model.negative_words, given)
    areas = () if prompts.areas is None else _areas(model, given, prompts.areas.to(device))
    if without_prompt:
        active, areas = torch.zeros_like(active), tuple(torch.zeros_like(area) for area in areas)
    encoded = (tokens, mask, given, more)
    teller.kept = None
    teller.told = Told(whole * texts, start, active[start:], words, kinds, shown, (whole,) * texts, encoded, areas)
    return (), model.with_negative(given, FurtherTexts(tokens, mask, more, (length,) * texts))


def _with_noise(model, text, noise, start, times):
    """A call's text with each image's noise where it has a prompt."""
    own = next(module for module in model.modules() if is_pladis(module) and "diversity" in module.pladis_additions)
    noise = torch.cat([noise] * (1 if start else times), dim=1)
    changed = with_noise(text[start:], noise, own.number("strength"), own.number("portion"))
    return [*text[:start], *changed] if isinstance(text, list) else torch.cat([text[:start], changed])


def _of_each(texts, tensor, function, *arguments):
    """A function's results of each of as many texts in (batch, tokens), one behind the other again."""
    return torch.cat([function(part, *arguments) for part in tensor.chunk(texts, dim=1)], dim=1)


def _areas(model, given, areas):
    """(regions, tokens) bool of the image's tokens, for each level of the model; areas: (regions, height, width)."""
    try:
        frames, height, width = model.backbone.grid(model.config, given)
    except ValueError:
        raise ValueError("regions: other images stand beside the one drawn, so its parts are not known") from None
    found = []
    while True:
        level = F.interpolate(areas[None].float(), (height, width), mode="nearest-exact")[0].bool()
        found.append(level.flatten(1).repeat(1, frames))
        if not model.backbone.has_levels or max(height, width) == 1:
            return tuple(found)
        height, width = (height + 1) // 2, (width + 1) // 2


def _images(prompts):
    known = [one for one in (prompts.negative, prompts.kinds) if one is not None]
    known += [] if prompts.noise is None else [prompts.noise[0]]
    return known[0].shape[0] if known else 1


def _hide(teller: Teller, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """A forward pre-hook of a module that does not know of negative prompts: it is called as without one."""
    count = teller.told.negative
    if not count:
        return None
    given = arguments_of(getattr(module, "stock", type(module)).forward, args, kwargs)
    text = given["encoder_hidden_states"]
    length = (text[0] if isinstance(text, tuple) else text).shape[1]
    hidden = (text[0][:, :-count], *text[1:]) if isinstance(text, tuple) else text[:, :-count]
    mask = given.get("attention_mask")
    if mask is not None and mask.shape[-1] == length:
        mask = mask[..., :-count]
    return (), {**given, "encoder_hidden_states": hidden, "attention_mask": mask}
