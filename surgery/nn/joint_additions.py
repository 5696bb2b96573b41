"""Joint attention with a module's additions (additions.py): with two texts, and with changed scores of the text's keys.

The image's queries see each key of the text with `taca` and `words`; the text's own queries see none of it.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .additions import (
    flipped,
    in_regions,
    kinds_told,
    led_rows,
    negative_bias,
    negative_count,
    part_of_mask,
    seen_by_regions,
    shown_in,
    with_bias,
    within,
    words_bias,
)
from .functional import dense_attention, text_and_image

# (query, key, value, mask, how many are text, whether a boolean mask leaves out text alone) -> joint attention
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, int, bool], Tensor]


def attend_jointly_with_additions(
    module: Any,
    attend: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_length: int,
    text_first: bool,
    mask: Tensor | None,
    only_text_is_masked: bool,
) -> Tensor:
    """As joint.py's `attend_jointly`; attend: that without additions, by the module's operator."""
    told, length = module.pladis_teller.told, query.shape[2]
    count = negative_count(module)
    text, image = text_and_image(length, text_length, text_first)
    prompt, rest = slice(text.start, text.stop - count), slice(text.stop - count, text.stop)
    if mask is not None and count:
        mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
        mask = shown_in(mask, told, rest, query.shape[0])
    sequence = _Sequence(module, attend, (query, key, value, mask), text_first, only_text_is_masked, text_length)
    if not count:
        return sequence.attended([prompt], image)
    rows = slice(told.start, None)
    if "vsf" in module.pladis_additions:
        of_prompt, of_rest = sequence.of_text(prompt, image), sequence.of_text(rest, image, rows)
        _, of_image = _text_and_image(sequence.attended([prompt, rest], image, turned=rest), text_length, text_first)
    else:
        regional = "regions" in module.pladis_additions
        of_prompt, of_image = _text_and_image(sequence.attended([prompt], image), text_length - count, text_first)
        seen = _seen(module, image, count, text_first) if regional else None
        of_rest, to_rest = _text_and_image(sequence.attended([rest], image, rows, seen=seen), count, text_first)
        of_image = (in_regions if regional else led_rows)(module, of_image, to_rest)
    if told.start:  # what CFG's rows without a prompt have there is read by nobody
        of_rest = torch.cat([of_rest.new_zeros(told.start, *of_rest.shape[1:]), of_rest])
    texts = [of_prompt, of_rest]
    return torch.cat([*texts, of_image] if text_first else [of_image, *texts], dim=2)


def _text_and_image(output, text_length, text_first):
    return [output[:, :, part] for part in text_and_image(output.shape[2], text_length, text_first)]


def _seen(module, image, count, text_first):
    """(tokens, tokens) bool of regional prompts and image: a region's see themselves and their part of the image."""
    area = seen_by_regions(module, image.stop - image.start)  # (texts' tokens, image's tokens)
    place = torch.arange(count, device=area.device)
    ends = torch.tensor(module.pladis_teller.told.lengths, device=area.device).cumsum(0)
    region = torch.searchsorted(ends, place, right=True)
    same, image_to_image = region[:, None] == region, area.new_ones(area.shape[1], area.shape[1])
    if text_first:
        return torch.cat([torch.cat([same, area], dim=1), torch.cat([area.T, image_to_image], dim=1)])
    return torch.cat([torch.cat([image_to_image, area.T], dim=1), torch.cat([area, same], dim=1)])


class _Sequence:
    """The tokens of a joint attention, of which it attends to some. tensors: query, key, value and mask."""

    def __init__(self, module: Any, attend: Attend, tensors: Any, text_first: bool, text_alone: bool, length: int):
        self.module, self.attend, self.tensors = module, attend, tensors
        self.text_first, self.text_alone = text_first, text_alone
        self.kinds = kinds_told(module, length)

    def attended(
        self,
        texts: list[slice],
        image: slice,
        rows: slice = slice(None),
        turned: slice | None = None,
        seen: Tensor | None = None,
    ) -> Tensor:
        """Joint attention among these texts and the image, in their order. turned: the text that VSF turns, if any.

        seen: (tokens, tokens) bool among them, which leaves out no token of the image to another; None for all.
        """
        order = self._order(texts, image)
        query, key, value = self._tokens(order, rows)
        mask = self._mask(rows, order, order)
        text_alone = self.text_alone or mask is None
        if seen is not None:
            mask = seen[None, None] if mask is None else within(mask, seen)
        length = sum(part.stop - part.start for part in texts)
        at_text = slice(0, length) if self.text_first else slice(key.shape[2] - length, key.shape[2])
        more, bias = self._of_image_to_text(texts, image, rows, turned, key, value, at_text)
        if more is None and bias is None:
            return self.attend(query, key, value, mask, length, text_alone)
        key, value = more or (key, value)
        output = self.attend(query, key, value, mask if bias is None else with_bias(mask, bias), length, text_alone)
        if turned is not None:  # whose rows are not its own
            return output
        _, of_image = _text_and_image(output, length, self.text_first)
        of_text = self.of_text(texts[0], image, rows, seen)
        return torch.cat([of_text, of_image] if self.text_first else [of_image, of_text], dim=2)

    def of_text(self, text: slice, image: slice, rows: slice = slice(None), seen: Tensor | None = None) -> Tensor:
        """Dense attention of a text's queries to itself and the image. seen: as `attended` has it."""
        order = self._order([text], image)
        query, key, value = self._tokens(order, rows)
        query, mask = self.tensors[0][rows, :, text], self._mask(rows, [text], order)
        if seen is not None:
            count = text.stop - text.start
            seen = seen[:count] if self.text_first else seen[-count:]
            mask = seen[None, None] if mask is None else within(mask, seen)
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(query.dtype)
        return dense_attention(query, key, value, mask)

    def _order(self, texts, image):
        return [*texts, image] if self.text_first else [image, *texts]

    def _tokens(self, order, rows):
        return [torch.cat([tensor[rows, :, part] for part in order], dim=2) for tensor in self.tensors[:3]]

    def _mask(self, rows, queries, keys):
        mask = self.tensors[3]
        if mask is None:
            return None
        mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
        if mask.shape[2] > 1:
            mask = torch.cat([mask[:, :, part] for part in queries], dim=2)
        if mask.shape[3] > 1:
            mask = torch.cat([mask[..., part] for part in keys], dim=3)
        return part_of_mask(mask, rows, slice(None))

    def _of_image_to_text(self, texts, image, rows, turned, key, value, at_text):
        """((key, value) or None, bias over all keys or None) as the image's queries see them."""
        module, more, bias = self.module, None, None
        keys = key.shape[2]
        before = 0 if self.text_first else keys - (at_text.stop - at_text.start)
        after = keys - at_text.stop
        if "taca" in module.pladis_additions:
            gain = torch.ones(keys, dtype=torch.float32, device=key.device)
            gain = torch.where(_inside(keys, at_text, key.device), module.number("gamma"), gain)
            more = (key * gain[:, None]).to(key.dtype), value
        if "words" in module.pladis_additions:
            assert self.kinds is not None
            start = 0 if self.text_first else image.stop  # the text's place in the whole sequence
            kinds = torch.cat([self.kinds[rows, part.start - start : part.stop - start] for part in texts], dim=1)
            bias = F.pad(words_bias(module, kinds), (before, after))
        if turned is not None:
            count = turned.stop - turned.start
            first = at_text.stop - count
            key, value = more or (key, value)
            parts = [
                value[:, :, :first],
                flipped(module, value[:, :, first : at_text.stop]),
                value[:, :, at_text.stop :],
            ]
            more = key, torch.cat(parts, dim=2)
            own = F.pad(negative_bias(module, value.shape[0]), (first, after))
            bias = own if bias is None else bias + own
        return more, bias


def _inside(length, part, device):
    place = torch.arange(length, device=device)
    return (place >= part.start) & (place < part.stop)
