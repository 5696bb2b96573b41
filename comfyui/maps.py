"""Attention maps: how much of the text's softmax weight each place of an image gives to a word, over a run."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .operators import text_and_image


class Maps:
    """The maps of one run: the mean over its layers, heads, calls and images with a prompt."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin a run."""
        self.total: Tensor | None = None  # (tokens, height, width) of the latents, float32 on the CPU
        self.count = 0
        self.left_out = 0  # attention calls whose queries fill no grid of the latents' shape

    def take(
        self,
        query: Tensor,
        key: Tensor,
        text: int,
        text_first: bool,
        latents: Sequence[int],
        conds: Sequence[int],
    ) -> None:
        """Add an attention call. query, key: (rows, heads, length, head_dim), a row for each image and part of CFG.

        text: how many tokens of a joint sequence are text, 0 in cross-attention. latents: their shape. conds: 0 for
        each part of the rows that has the prompt. Masks are left out, so padding has a weight.
        """
        rows = query.shape[0] // max(len(conds), 1)
        chosen = [index * rows + row for index, cond in enumerate(conds or [0]) if cond == 0 for row in range(rows)]
        if not chosen:
            return
        query, key = query[chosen], key[chosen]
        columns = slice(None)
        if text:
            columns, image = text_and_image(query.shape[2], text, text_first)
            query = query[:, :, image]
        height, width = latents[-2:]
        grid = _grid(query.shape[2], height, width)
        if grid is None or (self.total is not None and self.total.shape[0] != key[:, :, columns].shape[2]):
            self.left_out += 1
            return
        found: Any = 0.0
        for head in range(query.shape[1]):  # one at a time: all of them at once are gigabytes in a large model
            scores = query[:, head].float() @ key[:, head].float().mT * query.shape[3] ** -0.5
            found = found + scores.softmax(-1)[..., columns].mean(0)
        found = (found / query.shape[1]).T.unflatten(-1, grid)
        found = F.interpolate(found[None], (height, width), mode="bilinear")[0].cpu()
        self.total = found if self.total is None else self.total + found
        self.count += 1

    def mean(self) -> Tensor:
        """(tokens, height, width): the maps of all tokens of the text. ValueError where nothing was recorded."""
        if self.total is None:
            more = f"; {self.left_out} attention calls fit no grid of the latents" if self.left_out else ""
            raise ValueError(f"no maps were recorded: connect the latent of a sampler that has this model{more}")
        return self.total / self.count


def _grid(queries, height, width):
    """(height, width) of an attention's queries, the latents' own divided by a power of two; None if there is none."""
    for step in (1, 2, 4, 8, 16, 32):
        for up in (0, step - 1):  # a level that is cut in half rounds up, in some models down
            grid = (height + up) // step, (width + up) // step
            if grid[0] * grid[1] == queries:
                return grid
    return None


def places_of(text: dict[str, list], word: dict[str, list], empty: dict[str, list], tokens: int) -> list[int]:
    """Where the tokens of a word stand in a text; [] where it is not in it.

    text, word, empty: both and the empty text as a CLIP object of ComfyUI's tokenizes them, {encoder: parts of (token,
    weight)}. tokens: how many the model was given, which tells the encoder; ValueError where none makes as many.
    """
    numbers = {name: [_number(token) for part in parts for token in part] for name, parts in text.items()}
    name = next((name for name, own in numbers.items() if len(own) == tokens), None)
    if name is None:
        counts = ", ".join(f"{name} {len(own)}" for name, own in numbers.items())
        raise ValueError(f"the model had {tokens} tokens, of this text come {counts}: it is not the prompt")
    own = {_number(token) for part in empty[name] for token in part}  # start, end, padding
    wanted = [number for part in word[name] for number in map(_number, part) if number not in own]
    found = []
    for start in range(tokens - len(wanted) + 1):
        if wanted and numbers[name][start : start + len(wanted)] == wanted:
            found += range(start, start + len(wanted))
    return found


def _number(token):
    return int(token[0]) if not isinstance(token[0], Tensor) else -1  # an embedding's


def picture(heat: Tensor, side: int = 8) -> Tensor:
    """A map as ComfyUI's IMAGE, (1, height * side, width * side, 3) in [0, 1]: from black over orange to white."""
    heat = (heat - heat.min()) / (heat.max() - heat.min()).clamp_min(1e-12)
    heat = F.interpolate(heat[None, None], scale_factor=side, mode="bilinear")[0, 0]
    return torch.stack([(heat * 2).clamp(0, 1), (heat * 1.4).clamp(0, 1) ** 1.5, (heat * 2 - 1).clamp(0, 1)], -1)[None]
