"""The weights by which an operator mixes the values of one call, (batch, heads, queries, keys) in float32."""

import math
from typing import Any

import torch
from torch import Tensor

from surgery.nn import attention, is_pladis
from surgery.nn.kernels.combined import weights_of_three
from surgery.nn.operators import OPERATORS, later_defaults

from ..geometry import Projection
from ..observing import AttentionCall


def module_weights(call: AttentionCall) -> Tensor:
    """The weights of a call: of a patched module with the hyperparameters that its buffers have now, else softmax."""
    module = call.module
    scores = {"mask": call.mask, "qk_scale": call.qk_scale, "implementation": "blocked"}
    if not is_pladis(module):
        return attention_map(call.query, call.key, operator="pladis", scale=0.0, **scores)
    operator = module.pladis_operator
    names = [name for name in OPERATORS[operator].defaults if f"pladis_{name}" in module._buffers]
    settings = {**later_defaults(operator), **{name: module._buffers[f"pladis_{name}"] for name in names}}
    if operator in ("gag", "anderson_least_squares"):
        return _combined_weights(call, settings, scores)
    return attention_map(call.query, call.key, operator=operator, **settings, **scores)


def attention_map(query: Tensor, key: Tensor, **arguments: Any) -> Tensor:
    """The weights of an operator without a value's part: its output for the identity, (batch, heads, queries, keys).

    arguments: as `surgery.nn.attention` takes them.
    """
    keys = key.shape[2]
    identity = torch.eye(keys, dtype=torch.float32, device=key.device).expand(*key.shape[:2], keys, keys)
    output = attention(query, key, identity, **arguments)
    assert isinstance(output, Tensor)  # no log-sum-exp is asked for
    return output


def _combined_weights(call, settings, scores):
    """The weights of what is combined by how the outputs lie: linear in the maps once that is known."""

    def map_of(alpha, *temperatures):
        temperature = math.prod(settings[name] for name in temperatures)
        return attention_map(call.query, call.key, operator="sparse", alpha=alpha, temperature=temperature, **scores)

    value, unit = call.value.float(), call.module.pladis_unit
    dense = map_of(1.0, "temperature")
    sparse = map_of(settings["alpha"], "temperature", "sparse_temperature")
    residual = sparse - dense
    with torch.autocast(value.device.type, enabled=False):
        if call.module.pladis_operator == "anderson_least_squares":
            low = map_of(settings["alpha_low"], "temperature", "sparse_temperature")
            share, share_low = weights_of_three(sparse @ value, low @ value, dense @ value, call.query, unit)
            return dense + share * residual + share_low * (low - dense)
        split = Projection.of(sparse @ value, residual @ value).over(unit)
    zeta, parallel = settings["zeta"], settings["parallel"]
    along = split.along.float().unsqueeze(-1) * sparse
    gain = (settings["eta"] / split.length(zeta, parallel).clamp_min(1e-30)).clamp_max(1.0).float().unsqueeze(-1)
    return sparse + settings["scale"] * gain * (parallel * along + zeta * (residual - along))
