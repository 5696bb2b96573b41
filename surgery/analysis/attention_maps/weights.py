"""The weights by which an operator mixes the values of one call, (1, heads, queries, keys) in float32.

Of joint attention they are those of the text's keys, which together have the share that softmax over text and image
gives them. Queries are taken in runs, so that the weights of a video's need no more memory than `_LARGEST`.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from surgery.nn import attention, is_pladis
from surgery.nn.functional import mask_block
from surgery.nn.joint import dense_with_lse
from surgery.nn.kernels.combined import weights_of_three
from surgery.nn.kernels.reference import attention_scores
from surgery.nn.operators import OPERATORS, later_defaults

from ..geometry import Projection
from ..observing import AttentionCall

_LARGEST = 2**24  # weights at a time, 64 MiB


def weights_by_rows(call: AttentionCall) -> Iterator[Tensor]:
    """The weights of a call for runs of its queries: by what a patched module's buffers have now, else softmax's."""
    weights_of = _weights_of(call)
    _, heads, queries, _ = call.query.shape
    rows = max(1, _LARGEST // (heads * call.key.shape[2]))
    for start in range(0, queries, rows):
        run = slice(start, min(start + rows, queries))
        weights = weights_of(run)
        yield weights if call.image is None else weights * _text_share(call, run)


def _weights_of(call):
    """rows -> the weights of their queries over the keys of a call, without the share of joint attention."""
    module = call.module
    if not is_pladis(module):
        return lambda rows: _map(call, rows, operator="pladis", scale=0.0)
    operator = module.pladis_operator
    names = [name for name in OPERATORS[operator].defaults if f"pladis_{name}" in module._buffers]
    settings = {**later_defaults(operator), **{name: module._buffers[f"pladis_{name}"] for name in names}}
    if operator in ("gag", "anderson_least_squares"):
        return _combined_weights(call, settings)
    return lambda rows: _map(call, rows, operator=operator, **settings)


def _map(call, rows, **arguments):
    """The weights of an operator without a value's part: its output for the identity, (1, heads, rows, keys)."""
    keys = call.key.shape[2]
    identity = torch.eye(keys, dtype=torch.float32, device=call.key.device).expand(*call.key.shape[:2], keys, keys)
    return _attention(call, rows, identity, **arguments)


def _attention(call, rows, value, **arguments) -> Any:
    scores = {"mask": mask_block(call.mask, rows, slice(None)), "qk_scale": call.qk_scale, "implementation": "blocked"}
    return attention(call.query[:, :, rows], call.key, value, **scores, **arguments)


def _text_share(call, rows):
    """(1, heads, rows, 1): the share of softmax over text and image that text has."""
    key, value, mask = call.image
    query = call.query[:, :, rows]
    _, of_image = dense_with_lse(query, key, value, mask_block(mask, rows, slice(None)), call.qk_scale)
    scores = attention_scores(query, call.key, mask_block(call.mask, rows, slice(None)), call.qk_scale)
    return (scores.float().logsumexp(-1) - of_image.float()).sigmoid().unsqueeze(-1)


def _combined_weights(call, settings):
    """The weights of what is combined by how the outputs lie: linear in the maps once that is known."""

    def setting(alpha, *temperatures):
        return {"operator": "sparse", "alpha": alpha, "temperature": math.prod(settings[name] for name in temperatures)}

    everywhere, value, unit = slice(None), call.value.float(), call.module.pladis_unit
    of_dense = setting(1.0, "temperature")
    of_sparse = setting(settings["alpha"], "temperature", "sparse_temperature")
    dense, sparse = (_attention(call, everywhere, value, **each) for each in (of_dense, of_sparse))
    with torch.autocast(value.device.type, enabled=False):
        if call.module.pladis_operator == "anderson_least_squares":
            of_low = setting(settings["alpha_low"], "temperature", "sparse_temperature")
            low = _attention(call, everywhere, value, **of_low)
            share, share_low = weights_of_three(sparse, low, dense, call.query, unit)

            def of_three(rows):
                maps = [_map(call, rows, **each) for each in (of_dense, of_sparse, of_low)]
                on, on_low = (mask_block(each, rows, slice(None)) for each in (share, share_low))
                return maps[0] + on * (maps[1] - maps[0]) + on_low * (maps[2] - maps[0])

            return of_three
        split = Projection.of(sparse, sparse - dense).over(unit)
    zeta, parallel = settings["zeta"], settings["parallel"]
    gain = (settings["eta"] / split.length(zeta, parallel).clamp_min(1e-30)).clamp_max(1.0).float().unsqueeze(-1)
    share = split.along.float().unsqueeze(-1)

    def of_gag(rows):
        dense, sparse = (_map(call, rows, **each) for each in (of_dense, of_sparse))
        along = mask_block(share, rows, slice(None)) * sparse
        step = parallel * along + zeta * (sparse - dense - along)
        return sparse + settings["scale"] * mask_block(gain, rows, slice(None)) * step

    return of_gag
