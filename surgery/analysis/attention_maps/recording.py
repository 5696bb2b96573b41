"""Attention weights recorded while a pipeline draws, per step, module and word."""

from collections.abc import Iterable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.errors import UnsupportedModelError

from ..observing import AttentionCall, Observer
from .weights import module_weights
from .words import Column


class Recording:
    """Records modules of a model while it is open: `with Recording(pipeline, model, paths, tokens) as recording:`.

    paths: of the modules. tokens: how many keys the text gives each of them. Each step of each module counts the same.
    As for `Observer`, one image may be drawn at a time, and UnsupportedModelError comes out of the pipeline's run.
    """

    def __init__(self, pipeline: Any, model: nn.Module, paths: Iterable[str], tokens: int) -> None:
        paths = list(paths)
        self._tokens = tokens
        self._observer = Observer(pipeline, model, paths, self._add)
        self._sums: dict[
            int, Tensor
        ] = {}  # number of queries -> (queries, keys), the sum over calls of the mean over heads
        self._zeros = self._negatives = torch.zeros(tokens)  # sums over calls of the share of weights
        self._calls = dict.fromkeys(paths, 0)

    def __enter__(self) -> Self:
        self._observer.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._observer.__exit__()

    def maps(self, columns: Sequence[Column], size: tuple[int, int]) -> Tensor:
        """The mean map of each column at the image's size: (columns, height, width), float32, on the CPU.

        columns: over whose tokens the weights are summed. Each size of map is enlarged bilinearly, so that where every
        token is in a column the dense map's values at a pixel sum to one.
        """
        self._check_calls()
        total, latent_size = torch.zeros(()), self._observer.latent_size
        assert latent_size  # as the modules were called
        for queries, summed in self._sums.items():
            grid = _grid(queries, *latent_size)
            of_columns = torch.stack([summed[:, list(column.positions)].sum(1) for column in columns])
            of_columns = of_columns.view(1, len(columns), *grid)
            total = total + F.interpolate(of_columns, size=size, mode="bilinear", align_corners=False)[0]
        return (total / sum(self._calls.values())).cpu()

    def shares(self, columns: Sequence[Column]) -> list[tuple[float, float, float]]:
        """Of each column: (mean weight of all its tokens, share of weights exactly zero, share below zero)."""
        self._check_calls()
        calls = sum(self._calls.values())
        mean = torch.stack([summed.mean(0) for summed in self._sums.values()]).sum(0) / calls
        zeros, negatives = self._zeros / calls, self._negatives / calls
        return [
            (float(mean[places].sum()), float(zeros[places].mean()), float(negatives[places].mean()))
            for places in (list(column.positions) for column in columns)
        ]

    def _add(self, call: AttentionCall) -> None:
        if call.key.shape[2] != self._tokens:
            raise UnsupportedModelError(
                f"{call.path} has {call.key.shape[2]} keys, but the prompt {self._tokens} tokens"
            )
        weights = module_weights(call)[0]  # (heads, queries, keys)
        queries = weights.shape[1]
        self._sums[queries] = self._sums.get(queries, 0.0) + weights.mean(0)
        self._zeros = self._zeros + (weights == 0).float().mean((0, 1)).cpu()
        self._negatives = self._negatives + (weights < 0).float().mean((0, 1)).cpu()
        self._calls[call.path] += 1

    def _check_calls(self):
        for path, calls in self._calls.items():
            if not calls:
                raise UnsupportedModelError(f"{path} was never called while the image was drawn; there is no map of it")


def _grid(queries, height, width):
    """(height, width) of a map with so many queries: the latent's size, halved and rounded up as often as need be."""
    latent = f"{height} x {width}"
    while height * width > queries:
        height, width = -(-height // 2), -(-width // 2)
    if height * width != queries:
        raise UnsupportedModelError(f"a map of {queries} queries is no halving of the latent's {latent}")
    return height, width
