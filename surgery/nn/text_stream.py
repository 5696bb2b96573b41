"""What is done to the text's own states: brought back, weighted, or with noise, as the blocks of a model are given it.

    reinject   a block's text gets some of that of the model's second block (Prompt Reinjection, arXiv 2602.06886)
    rebalance  a block's text times `gain` (arXiv 2601.02211)
    diversity  the text of all blocks with noise, an image's own, that seeds differ by (in a window of early steps)

Prompt Reinjection: with z(x) a token's states less their mean over their standard deviation s(x), both over channels,

    x' = z(z(x) + weight z(o)) s(x) + mean(x)

o being the same token's states at the input of the second block, as the authors' code has it, whose standard deviation
has n - 1 below in two of the three places: its x' is sqrt(n / (n - 1)) times as far from the mean. Their rotation of o,
which is fitted for each model, is left out.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from .additions import Teller
from .hooks import arguments_of
from .module import is_pladis

_ORIGIN = 1  # of the blocks in the model's order, counted from 0
_TEXT = "encoder_hidden_states"


def reinjected(text: Tensor, origin: Tensor, weight: Tensor) -> Tensor:
    """Prompt Reinjection's x', in the dtype of `text`; to the bit `text` where weight is 0.

    text, origin: (batch, tokens, channels). weight: a scalar.
    """
    exact = text.float()
    mixed, mean, size = _standardised(exact)
    mixed = mixed + weight * _standardised(origin.float())[0]
    changed = _standardised(mixed)[0] * size + mean
    return torch.where(weight == 0, exact, changed).to(text.dtype)


def _standardised(states):
    """(states with mean 0 and standard deviation 1, mean, standard deviation) over the channels."""
    mean = states.mean(-1, keepdim=True)
    size = states.var(-1, correction=0, keepdim=True).add(1e-12).sqrt()
    return (states - mean) / size, mean, size


def with_noise(text: Any, noise: Tensor, strength: Tensor, portion: Tensor) -> Any:
    """A text with noise of `strength` times its standard deviation in a `portion` of its numbers.

    text: (images, ...) or a list of (tokens, channels). noise: (2, images, ...), of which the first is normal and the
    second, even in [0, 1), says which numbers. strength, portion: scalars.
    """
    if isinstance(text, list):
        parts = [noise[:, index, : len(one)] for index, one in enumerate(text)]
        return [
            with_noise(one[None], part[:, None], strength, portion)[0] for one, part in zip(text, parts, strict=True)
        ]
    exact = text.float()
    size = exact.flatten(1).std(1).reshape(-1, *[1] * (text.ndim - 1))
    normal, chosen = noise
    return (exact + strength * size * normal * (chosen < portion)).to(text.dtype)


def put_stream_hooks(model: Any, teller: Teller) -> list:
    """Have the blocks of a model whose attention modules have `reinject` or `rebalance` do that to their text."""
    paths = [path for path, kind in model.text_sites(model).items() if kind == "joint"]
    names = list(dict.fromkeys(filter(None, map(model.backbone.block_of, paths))))
    changed = {}
    for path in paths:
        module = model.get_submodule(path)
        if is_pladis(module) and {"reinject", "rebalance"} & set(module.pladis_additions):
            changed[model.backbone.block_of(path)] = module
    handles = []
    for index, name in enumerate(names):
        if name in changed or (index == _ORIGIN and changed):
            change = functools.partial(_change, teller, changed.get(name), index)
            handles.append(model.get_submodule(name).register_forward_pre_hook(change, with_kwargs=True))
    return handles


def _change(
    teller: Teller, module: Any, index: int, block: nn.Module, args: tuple, kwargs: dict
) -> tuple[tuple, dict] | None:
    given = arguments_of(type(block).forward, args, kwargs)
    text = given[_TEXT]
    if index == _ORIGIN:
        teller.origin = text
    if module is None:  # the second block alone
        return None
    if "reinject" in module.pladis_additions and index > _ORIGIN:
        assert teller.origin is not None  # the blocks run in their order
        text = reinjected(text, teller.origin, module.number("weight"))
    if "rebalance" in module.pladis_additions:
        text = (text * module.number("gain")).to(text.dtype)
    return (), {**given, _TEXT: text}


def has_text_apart(backbone: Any, path: str) -> bool:
    """Whether the block of the attention module at `path` is given its text beside the image."""
    block = backbone.block_of(path)
    streams = backbone.streams.get((block or "").rpartition(".")[0])
    return block is not None and not backbone.one_stream and (streams is None or _TEXT in streams)
