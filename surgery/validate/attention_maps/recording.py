"""Sums of the cross-attention weights of a model's modules over every call of one run of its pipeline.

Averages over heads, modules and denoising steps, as PLADIS (arXiv 2503.07677, Fig. 10 and G.2), DAAM (arXiv 2210.04885,
castorini/daam) and Prompt-to-Prompt (arXiv 2208.01626, google/prompt-to-prompt) take them. The weights are computed
again, from what `Observer` sees, beside the module's own run. What is kept is one sum per size of map, (queries, keys)
in float32: SDXL at 1024 x 1024 pixels needs 1.6 MB for its two sizes, whatever the number of modules and steps. So no
size is left out; `layers` chooses.
"""

import torch
import torch.nn.functional as F

from surgery.errors import UnsupportedModelError

from .observing import Observer
from .weights import module_weights


class Recording:
    """Records modules of a model while it is open: `with Recording(pipeline, model, paths, tokens) as recording:`.

    paths: of the modules. tokens: how many keys the text gives each of them. Each call of each module counts the same.
    As for `Observer`, one image may be drawn at a time, and UnsupportedModelError comes out of the pipeline's run.
    """

    def __init__(self, pipeline, model, paths, tokens):
        self._model = model
        self._observer = Observer(pipeline, model, paths, tokens, self._add)
        self._handle = None
        self._latent_size = None
        self._sums = {}  # number of queries -> (queries, keys), the sum over calls of the mean over heads
        self._zeros = self._negatives = 0.0  # (keys,): sums over calls of the share of weights
        self._calls = dict.fromkeys(paths, 0)

    def __enter__(self):
        def before_model(_module, arguments, keywords):
            sample = arguments[0] if arguments else keywords["sample"]
            self._latent_size = tuple(sample.shape[-2:])

        self._handle = self._model.register_forward_pre_hook(before_model, with_kwargs=True)
        self._observer.__enter__()
        return self

    def __exit__(self, *_):
        self._handle.remove()
        self._observer.__exit__()

    def maps(self, columns, size):
        """The mean map of each column at the image's size: (columns, height, width), float32, on the CPU.

        columns: objects with `positions`, over whose tokens the weights are summed. Each size of map is enlarged
        bilinearly, so that where every token is in a column the dense map's values at a pixel sum to one.
        """
        self._check_calls()
        total = 0.0
        for queries, summed in self._sums.items():
            grid = _grid(queries, *self._latent_size)
            of_columns = torch.stack([summed[:, list(column.positions)].sum(1) for column in columns])
            of_columns = of_columns.view(1, len(columns), *grid)
            total = total + F.interpolate(of_columns, size=size, mode="bilinear", align_corners=False)[0]
        return (total / sum(self._calls.values())).cpu()

    def shares(self, columns):
        """Of each column: (mean weight of all its tokens, share of weights exactly zero, share below zero)."""
        self._check_calls()
        calls = sum(self._calls.values())
        mean = sum(summed.mean(0) for summed in self._sums.values()) / calls
        zeros, negatives = self._zeros / calls, self._negatives / calls
        return [
            (float(mean[places].sum()), float(zeros[places].mean()), float(negatives[places].mean()))
            for places in (list(column.positions) for column in columns)
        ]

    def _add(self, path, module, query, key, value, mask):
        weights = module_weights(module, query, key, value, mask)[0]  # (heads, queries, keys)
        queries = weights.shape[1]
        self._sums[queries] = self._sums.get(queries, 0.0) + weights.mean(0)
        self._zeros = self._zeros + (weights == 0).float().mean((0, 1))
        self._negatives = self._negatives + (weights < 0).float().mean((0, 1))
        self._calls[path] += 1

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
