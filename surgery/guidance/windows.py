"""A denoiser's call for a part of the image, for `swg`: latents and whatever lies along them are cut."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from surgery.errors import UnsupportedModelError

from .base import Grid

if TYPE_CHECKING:
    from .calls import Call


@dataclass(frozen=True)
class Crop:
    """A part of the image, its rows and columns in tokens, and the Call for it."""

    rows: slice
    columns: slice
    call: "Call"


def edges(length: int, size: float, windows: int) -> list[slice]:
    """Where so many windows of a share of a side lie on it, in tokens, at even steps from its beginning.

    As in the authors' code, in which a rest of the division is left out at the end; here the last one ends there.
    """
    extent = max(1, min(length - 1, math.ceil(length * size)))
    stride = (length - extent) / (windows - 1)
    starts = [round(stride * number) for number in range(windows)]
    return [slice(start, start + extent) for start in starts]


def crops(call: "Call", grid: Grid, size: float, windows: int) -> Iterator[Crop]:
    """The windows x windows Crops of a call; UnsupportedModelError where an image has a single row or column."""
    if min(grid.height, grid.width) < 2:
        raise UnsupportedModelError(
            f"guidance: swg cuts the image, and one of {grid.height} x {grid.width} tokens has no parts"
        )
    beside = [name for name, value in call.arguments.items() if name.endswith("_residuals") and value is not None]
    if beside:
        raise UnsupportedModelError(
            f"guidance: swg gives the model a part of the image, and {beside[0]} is of the whole"
        )
    for rows in edges(grid.height, size, windows):
        for columns in edges(grid.width, size, windows):
            place = (rows, columns)
            cut = {name: _cut(name, value, call, grid, place) for name, value in call.arguments.items()}
            yield Crop(rows, columns, call.with_(**cut))


def put_together(found: Sequence[tuple[Crop, Tensor]], whole: Tensor, grid: Grid, masked: bool) -> Tensor:
    """The outputs of Crops at their places, the mean where they overlap; `whole` where nothing is, or no two, masked.

    whole: the output for all of the image, of whose layout the result is.
    """
    total, count = torch.zeros_like(whole, dtype=torch.float32), torch.zeros_like(whole, dtype=torch.float32)
    for crop, output in found:
        index, part = _places(whole, grid, (crop.rows, crop.columns)), output.float()
        total[index] += part.reshape(total[index].shape)
        count[index] += 1
    return (total / count.clamp_min(1)).to(whole.dtype).where(count > (1 if masked else 0), whole)


def _places(states, grid, place):
    """An index of latents' or a prediction's part: by rows and columns, or of tokens by their numbers."""
    rows, columns = place
    if states.ndim == 3:  # (batch, tokens, channels)
        return slice(None), _tokens(grid, place).to(states.device)
    first = 2 if grid.channels_last else states.ndim - 2
    high, wide = states.shape[first] // grid.height, states.shape[first + 1] // grid.width
    spatial = (slice(rows.start * high, rows.stop * high), slice(columns.start * wide, columns.stop * wide))
    return (*[slice(None)] * first, *spatial)


def _tokens(grid, place):
    """The numbers of a part's tokens, frame by frame and row by row."""
    numbers = torch.arange(grid.count).view(grid.frames, grid.height, grid.width)
    return numbers[:, place[0], place[1]].flatten()


def _cut(name, value, call, grid, place):
    """An argument for a part of the image: the latents, what has their height and width, or an entry for each token.

    By name, since a prompt may have as many tokens as an image.
    """
    rows, columns = place
    own = name == call.backbone.latents
    if name == "visual_rope_pos":  # of frames, rows and columns
        return [value[0], value[1][rows], value[2][columns]]
    if name == "img_shapes":  # of each image of the batch (frames, height, width) in tokens, or a list of it
        shape = (grid.frames, rows.stop - rows.start, columns.stop - columns.start)
        return [[shape] if isinstance(one[0], (list, tuple)) else shape for one in value]
    if name in ("height", "width") and isinstance(value, int):  # in tokens, of a model that is told
        side = rows if name == "height" else columns
        return side.stop - side.start
    if isinstance(value, dict):
        return {key: _cut(key, part, call, grid, place) for key, part in value.items()}
    if own and isinstance(value, (list, tuple)):  # (channels, frames, height, width) each
        return [part[_places(part, grid, place)] for part in value]
    if not torch.is_tensor(value):
        return value
    tokens = _tokens(grid, place).to(value.device)
    if name in ("img_ids", "position_ids") or (name == "attention_mask" and call.latents.ndim == 3):
        dim = value.ndim - 2 if name != "attention_mask" else value.ndim - 1
        text = torch.arange(value.shape[dim] - grid.count, device=value.device)
        first = (text, len(text) + tokens) if grid.text_first else (tokens, grid.count + text)
        return value.index_select(dim, torch.cat(first))
    if name == "video_coords":  # (batch, 3, tokens, begin and end)
        return value[:, :, tokens]
    if name.startswith("prior_token"):  # (batch, tokens)
        return value[:, tokens]
    like = value.ndim == call.latents.ndim > 3 and not name.startswith("encoder_")
    if own or (like and _sides(value, grid) == _sides(call.latents, grid)):
        return value[_places(value, grid, place)]
    return value


def _sides(states, grid):
    first = 2 if grid.channels_last else states.ndim - 2
    return tuple(states.shape[first : first + 2])
