"""What a module does besides its operator: a negative prompt's keys and values, and what becomes of the text's.

In one module they act in this order, whatever the order in which a recipe names them:

    taca     the scores of image queries with text keys are multiplied, in joint attention
    words    the weights of keys that are no words are reduced
    -        the operator: T
    shares   T within start, words and padding, each with its share of the softmax
    nag      all of this for the prompt, Z+, and for the negative prompt, Z-; then Z is led from Z- away
    vsf      or all of this over the prompt's and the negative prompt's keys together
    regions  or all of this for the prompt, and for the queries of a region over the keys of its own prompt

The negative prompt's tokens are the last of the text's (prompts.py puts them there), so a model's own projections,
norms and blocks make keys and values of them as of the prompt's. In joint attention they are a second text: they attend
to the image and to themselves, the image attends to each text apart, and the prompt does not see them. That is what the
code of NAG's authors computes for FLUX with a batch twice as large, as all else in a block is token by token.

VSF's negative tokens are there twice in joint attention: as keys of their own text, and with their values' sign turned
as keys of the image. Its padding is no key of the image; NAG's is, as in its authors' code.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels.fused import attention_by
from .operators import ADDITIONS, LARGEST

START, WORD, PADDING = 0, 1, 2  # kinds of text tokens; the end token is padding, as which CLIP repeats it


class Told(NamedTuple):
    """What the modules of one call of a model are told of its text.

    negative: how many of the text's last tokens are the negative prompt's. start: the first row of the batch that has a
    prompt; those before it are CFG's without. active: (batch - start,) bool, which of the rest have a negative prompt.
    attended: (batch, negative) bool, which of its tokens are no padding. kinds: (batch, text) of START, WORD, PADDING;
    None where nobody has told. shown: (batch, negative) bool, which of its tokens are keys, where the model was told
    that none is; else the call's own mask says. lengths: of the texts among them, one after the other. encoded:
    (tokens, mask, the arguments of the call, more), for a model that takes the texts at its blocks. areas: where the
    texts are of regions, (regions, queries) bool for each level of the model, which of the image's tokens lie in each.
    """

    negative: int = 0
    start: int = 0
    active: Tensor | None = None
    attended: Tensor | None = None
    kinds: Tensor | None = None
    shown: Tensor | None = None
    lengths: tuple[int, ...] = ()
    encoded: tuple[Any, ...] = ()
    areas: tuple[Tensor, ...] = ()


class Teller:
    """What the modules of one model ask: what they are `told` of the call that goes on."""

    def __init__(self) -> None:
        self.told = Told()
        self.origin: Tensor | None = None  # the text at the second block (text_stream.py)
        self.kept: Any = None  # by a model, of what it makes of the texts, from its first block to the others


def led_away(positive: Tensor, negative: Tensor, phi: Tensor, tau: Tensor, blend: Tensor) -> Tensor:
    """NAG: blend Z + (1 - blend) Z+, Z being u = Z+ + phi (Z+ - Z-) cut to tau times the L1 norm of Z+.

    positive, negative: Z+ and Z-, (batch, heads, queries, head_dim); norms over all heads of a token. In float32 or
    more; returns it in the dtype of `positive`. phi, tau, blend: scalars.
    """
    dtype = torch.promote_types(positive.dtype, torch.float32)
    exact = positive.to(dtype)
    led = exact + phi * (exact - negative.to(dtype))
    size, length = (states.abs().sum((1, 3), keepdim=True) for states in (exact, led))
    led = led * (tau * size / length.clamp_min(torch.finfo(dtype).tiny)).clamp_max(1.0)
    return torch.lerp(exact, led, blend.to(dtype)).to(positive.dtype)


def attend_with_additions(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, qk_scale: float
) -> Tensor:
    """Cross-attention by a module's operator and additions. query: (batch, heads, queries, head_dim), the others alike.

    mask: boolean or additive, broadcastable to (batch, heads, queries, keys). Raises ValueError where an addition asks
    what kinds of tokens there are, and nobody has told.
    """
    told, count = module.pladis_teller.told, negative_count(module)
    kinds = kinds_told(module, key.shape[2])
    length = key.shape[2] - count
    mask = shown_in(mask, told, slice(length, None), query.shape[0])
    prompt, rest = slice(0, length), slice(length, None)

    def operated(rows, columns):
        own_kinds = None if kinds is None else kinds[rows, columns]
        own_mask = part_of_mask(mask, rows, columns)
        parts = (query[rows], key[rows, :, columns], value[rows, :, columns])
        return _operated(module, *parts, own_mask, own_kinds, qk_scale)

    everyone = slice(None)
    if not count:
        return operated(everyone, everyone)
    if "vsf" in module.pladis_additions:
        value = torch.cat([value[:, :, prompt], flipped(module, value[:, :, rest])], dim=2)
        mask = with_bias(mask, F.pad(negative_bias(module, query.shape[0]), (length, 0)))
        return operated(everyone, everyone)
    positive = operated(everyone, prompt)
    if "regions" in module.pladis_additions:
        seen = seen_by_regions(module, query.shape[2]).T  # (queries, keys)
        mask = seen[None, None] if mask is None else within(mask[..., rest] if mask.shape[-1] > 1 else mask, seen)
        mask = F.pad(mask, (length, 0))
        return in_regions(module, positive, operated(slice(told.start, None), rest))
    return led_rows(module, positive, operated(slice(told.start, None), rest))


def _operated(module, query, key, value, mask, kinds, qk_scale):
    """The operator over these keys, with `words` and `shares`."""
    if kinds is not None and "words" in module.pladis_additions:
        mask = with_bias(mask, words_bias(module, kinds))

    def by_operator(own_mask, with_lse):
        return attention_by(
            module.pladis_implementation,
            query,
            key,
            value,
            own_mask,
            module.hyperparameter_tensors(),
            module.pladis_operator,
            module.pladis_unit,
            qk_scale,
            with_lse,
        )

    output, _ = by_operator(mask, False)
    if kinds is None or "shares" not in module.pladis_additions:
        return module.accelerated(query, output)
    outputs, sums = [], []
    for kind in (START, WORD, PADDING):
        only = torch.where(kinds == kind, 0.0, -torch.inf)[:, None, None]
        found, lse = by_operator(with_bias(mask, only), True)
        assert lse is not None
        outputs.append(found)
        sums.append(lse)
    shares = torch.stack(sums).softmax(0).unsqueeze(-1).to(output.dtype)
    held = (shares * torch.stack(outputs)).sum(0)
    return torch.lerp(output, held, module.number("held").to(output.dtype))


def negative_count(module: Any) -> int:
    """How many of the text's tokens, the last ones, are the negative prompt's to a module."""
    return module.pladis_teller.told.negative if negative_role(module) else 0  # else prompts.py hides them


def negative_role(module: Any) -> bool:
    """Whether a patched module has an addition for negative prompts."""
    return any(ADDITIONS[name].role == "text" for name in module.pladis_additions)


def kinds_told(module: Any, length: int) -> Tensor | None:
    """(batch, length) kinds of the text's tokens, where the module needs them; ValueError where nobody has told."""
    wanting = [name for name in ("words", "shares") if name in module.pladis_additions]
    if not wanting:
        return None
    kinds = module.pladis_teller.told.kinds
    if kinds is None:
        raise ValueError(
            f"{wanting[0]} needs to know which tokens are words, which a pipeline tells that surgery.patch or "
            "surgery.load was given: call that, or tell the denoiser by its tell()"
        )
    return kinds[:, :length]


def led_rows(module: Any, positive: Tensor, negative: Tensor) -> Tensor:
    """NAG's output where rows have a negative prompt, Z+ elsewhere. negative: Z- of the rows that have a prompt."""
    told = module.pladis_teller.told
    with_prompt = positive[told.start :]
    led = led_away(with_prompt, negative, *(module.number(name) for name in ("phi", "tau", "blend")))
    assert told.active is not None
    led = torch.where(told.active[:, None, None, None], led, with_prompt)
    return torch.cat([positive[: told.start], led]) if told.start else led


def area_of(module: Any, queries: int) -> Tensor:
    """(regions, queries) bool of a call of so many of the image's tokens; what stands behind the image is in none."""
    areas = module.pladis_teller.told.areas
    for area in areas:
        if area.shape[1] == queries:
            return area
    if len(areas) == 1 and (behind := queries - areas[0].shape[1]) > 0:
        return F.pad(areas[0], (0, behind))
    raise ValueError(f"regions: an attention of {queries} tokens of the image is of no size of this call's image")


def seen_by_regions(module: Any, queries: int) -> Tensor:
    """(tokens, queries) bool: which of the regional prompts' tokens belong to the image's tokens."""
    area = area_of(module, queries)
    lengths = torch.tensor(module.pladis_teller.told.lengths, device=area.device)
    return area.repeat_interleave(lengths, dim=0, output_size=sum(module.pladis_teller.told.lengths))


def within(mask: Tensor, seen: Tensor) -> Tensor:
    """A mask of either kind that also leaves out what is not seen, bool and broadcastable to it."""
    return mask & seen if mask.dtype == torch.bool else torch.where(seen, mask, -torch.inf)


def in_regions(module: Any, output: Tensor, regional: Tensor) -> Tensor:
    """The output over the prompt, with its regions' where a query lies in one. regional: of the rows with a prompt."""
    start = module.pladis_teller.told.start
    inside = area_of(module, output.shape[2]).any(0)[:, None]
    own = output[start:]
    base = module.number("base").to(output.dtype)
    own = torch.where(inside, torch.lerp(regional, own, base), own)
    return torch.cat([output[:start], own]) if start else own


def flipped(module: Any, value: Tensor) -> Tensor:
    """VSF's values of the negative prompt's tokens, in the dtype of `value`."""
    return (value * -module.number("flip")).to(value.dtype)


def negative_bias(module: Any, batch: int) -> Tensor:
    """(batch, 1, 1, negative) float32: what VSF adds to the scores of the negative prompt's keys.

    -infinity where a row has none, and at its padding.
    """
    told = module.pladis_teller.told
    assert told.active is not None
    active = F.pad(told.active, (batch - told.active.shape[0], 0))[:, None]
    active = active.expand(batch, told.negative) if told.attended is None else active & told.attended
    bias = -module.number("offset").clamp(-LARGEST, LARGEST).expand(active.shape)
    return torch.where(active, bias, -torch.inf)[:, None, None]


def words_bias(module: Any, kinds: Tensor) -> Tensor:
    """(batch, 1, 1, keys) float32: what `words` adds to scores, the logarithm of `kept` at keys that are no words."""
    return torch.where(kinds == WORD, 0.0, module.number("kept").log())[:, None, None]


def with_bias(mask: Tensor | None, bias: Tensor) -> Tensor:
    """An additive mask: one of either kind, or none, with `bias` added to it."""
    if mask is None:
        return bias
    return torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else mask + bias


def shown_in(mask: Tensor | None, told: Told, columns: slice, batch: int) -> Tensor | None:
    """A call's mask of keys with what is told of the negative prompt's, at these columns, in place of what it says."""
    if mask is None or told.shown is None or mask.shape[-1] == 1:
        return mask
    shown = told.shown[:, None, None]
    own = shown if mask.dtype == torch.bool else torch.where(shown, 0.0, -torch.inf).to(mask.dtype)
    mask = mask.expand(batch, *mask.shape[1:])
    own = own.expand(*mask.shape[:-1], own.shape[-1])
    stop = mask.shape[-1] if columns.stop is None else columns.stop
    return torch.cat([mask[..., : columns.start], own, mask[..., stop:]], dim=-1)


def placed(module: Any, places: Tensor, dim: int = 0) -> Tensor:
    """What stands for the text's places, in order along `dim`, with those of a prompt for each further text."""
    told = module.pladis_teller.told
    if not negative_count(module):
        return places
    own = places.narrow(dim, 0, places.shape[dim] - told.negative)
    return torch.cat([own, *(places.narrow(dim, 0, length) for length in told.lengths)], dim=dim)


def part_of_mask(mask: Tensor | None, rows: Any, columns: Any) -> Tensor | None:
    """Some rows of the batch and some keys of a mask that may have one of either."""
    if mask is None:
        return None
    if mask.ndim == 4 and mask.shape[0] > 1:
        mask = mask[rows]
    return mask[..., columns] if mask.shape[-1] > 1 else mask
