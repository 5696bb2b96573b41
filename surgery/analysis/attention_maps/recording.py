"""Attention weights recorded while a pipeline draws, per step, module and word."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.errors import UnsupportedModelError
from surgery.models.anatomy import record_of
from surgery.models.patching import denoiser

from ..observing import AttentionCall, Observer
from .weights import weights_by_rows
from .words import Column

Call = tuple[str, int]  # (path of a module, step from 0)


class Recording:
    """Records modules of a pipeline while it is open: `with Recording(pipeline, paths, columns, tokens) as it:`.

    paths: of the modules. columns: over whose tokens the weights are summed. tokens: how many rows of text the model
    is given, each module's keys. each_call: keep the maps of each module and step apart. entry: as `Observer`'s.
    As for `Observer`, one image may be drawn at a time, and UnsupportedModelError comes out of the pipeline's run.
    """

    def __init__(
        self,
        pipeline: Any,
        paths: Iterable[str],
        columns: Sequence[Column],
        tokens: int,
        *,
        each_call: bool = False,
        entry: int | None = None,
    ) -> None:
        self.paths = list(paths)
        self.steps = 0
        self._columns, self._tokens, self._each_call = columns, tokens, each_call
        self._observer = Observer(pipeline, self.paths, self._add, entry)
        record = record_of(denoiser(pipeline))
        self._filled = record.fills_up_to if record else 1
        self._sums: dict[
            Call, dict[int, Tensor]
        ] = {}  # of each number of queries: (columns, queries), means over heads
        self._zeros = self._negatives = self._mean = torch.zeros(tokens)  # sums over calls
        self._calls = dict.fromkeys(self.paths, 0)

    def __enter__(self) -> Self:
        self._observer.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._observer.__exit__()

    def maps(self, size: tuple[int, int], chosen: Callable[[Call], bool] | None = None) -> Tensor:
        """The mean map of each column at a size: (columns, frames, height, width), float32, on the CPU.

        frames: those of the latents, 1 of an image. Each size of map is enlarged bilinearly, so that where every token
        is in a column the dense maps' values at a pixel sum to one, in joint attention to the share of text. chosen:
        which calls, of those kept apart.
        """
        self._check_calls()
        total, count = torch.zeros(()), 0
        for call, sums in self._sums.items():
            if chosen is None or chosen(call):
                total = total + sum(self._enlarged(summed, size) for summed in sums.values())
                count += 1
        return total / (count if self._each_call else sum(self._calls.values()))

    def arrays(self) -> np.ndarray:
        """The map of every call kept apart: (columns, steps, modules, frames, height, width), float32.

        At the grid where attention is finest; a module that did not run at a step is not a number there.
        """
        self._check_calls()
        frames, *size = self._observer.grid
        shape = len(self._columns), self.steps, len(self.paths), frames, *size
        found = np.full(shape, np.nan, np.float32)
        for (path, step), sums in self._sums.items():
            ((_, summed),) = sums.items()
            found[:, step, self.paths.index(path)] = self._enlarged(summed, (size[0], size[1])).numpy()
        return found

    def shares(self) -> list[tuple[float, float, float]]:
        """Of each column: (mean weight of all its tokens, share of weights exactly zero, share below zero)."""
        self._check_calls()
        calls = sum(self._calls.values())
        mean, zeros, negatives = (each / calls for each in (self._mean, self._zeros, self._negatives))
        return [
            (float(mean[places].sum()), float(zeros[places].mean()), float(negatives[places].mean()))
            for places in (list(column.positions) for column in self._columns)
        ]

    def _add(self, call: AttentionCall) -> None:
        keys, wanted = call.key.shape[2], self._tokens + -self._tokens % self._filled
        if keys != wanted:
            raise UnsupportedModelError(
                f"{call.path} has {keys} text keys, but the prompt {wanted} tokens, so which is which is not known"
            )
        queries, runs = call.query.shape[2], []
        for weights in weights_by_rows(call):
            weights, share = weights[0, ..., : self._tokens], weights.shape[2] / queries
            runs.append(torch.stack([weights[..., column.positions].sum(-1).mean(0) for column in self._columns]))
            self._mean = self._mean + weights.mean((0, 1)).cpu() * share
            self._zeros = self._zeros + (weights == 0).float().mean((0, 1)).cpu() * share
            self._negatives = self._negatives + (weights < 0).float().mean((0, 1)).cpu() * share
        sums = self._sums.setdefault((call.path, call.step) if self._each_call else ("", 0), {})
        sums[queries] = sums.get(queries, 0.0) + torch.cat(runs, dim=1).cpu()
        self._calls[call.path] += 1
        self.steps = max(self.steps, call.step + 1)

    def _enlarged(self, summed, size):
        """(columns, frames, height, width) of (columns, queries)."""
        frames, height, width = self._grid(summed.shape[1])
        on_grid = summed[:, : frames * height * width].reshape(-1, frames, height, width)
        return F.interpolate(on_grid, size=size, mode="bilinear", align_corners=False)

    def _grid(self, queries):
        """(frames, height, width) of a map: the finest grid, halved and rounded up where a UNet is coarser."""
        frames, *sides = self._observer.grid
        height, width = sides
        if queries == frames * height * width + -(frames * height * width) % self._filled:
            return frames, height, width
        while frames * height * width > queries:
            height, width = -(-height // 2), -(-width // 2)
        if frames * height * width != queries:
            raise UnsupportedModelError(
                f"a map of {queries} queries is no halving of the image's {sides[0]} x {sides[1]} tokens"
            )
        return frames, height, width

    def _check_calls(self):
        for path, calls in self._calls.items():
            if not calls:
                raise UnsupportedModelError(f"{path} was never called while the image was drawn; there is no map of it")
