"""The weights by which an operator mixes the values of one call, (batch, heads, queries, keys) in float32."""

from typing import Any

import torch
from torch import Tensor

from surgery.nn import attention, is_pladis
from surgery.nn.operators import OPERATORS

from ..geometry import Projection
from ..observing import AttentionCall


def module_weights(call: AttentionCall) -> Tensor:
    """The weights of a call: of a patched module with the hyperparameters that its buffers have now, else softmax."""
    module = call.module
    scores = {"mask": call.mask, "qk_scale": call.qk_scale, "implementation": "blocked"}
    if not is_pladis(module):
        return attention_map(call.query, call.key, operator="pladis", scale=0.0, **scores)
    operator = module.pladis_operator
    settings = {name: module._buffers[f"pladis_{name}"] for name in OPERATORS[operator].defaults}
    if operator == "gag":
        return _gag_weights(call, settings, scores)
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


def _gag_weights(call, settings, scores):
    """GAG is linear in the values once its projection and bound are known, and those the values decide."""
    temperature, zeta = settings["temperature"], settings["zeta"]
    parts = {"sparse": {"alpha": settings["alpha"]}, "pladis": {"scale": 0.0}}
    sparse, dense = (
        attention_map(call.query, call.key, operator=operator, temperature=temperature, **given, **scores)
        for operator, given in parts.items()
    )
    residual, value = sparse - dense, call.value.float()
    with torch.autocast(value.device.type, enabled=False):
        split = Projection.of(sparse @ value, residual @ value).over(call.module.pladis_unit)
    along = split.along.float().unsqueeze(-1)
    gain = (settings["eta"] / split.length(zeta).clamp_min(1e-30)).clamp_max(1.0).float().unsqueeze(-1)
    step = along * sparse + zeta * (residual - along * sparse)
    return sparse + settings["scale"] * gain * step
