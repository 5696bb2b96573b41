"""The attention weights that an operator gave every key: what its output is a weighted sum of values by.

pladis, sparse and anderson combine maps, so their weights are their output for the identity in place of the values.
That is how they are computed here: by the operator's own code, so no second formula can drift from the first. Above
scale 1 pladis's weights may be negative; they sum to one all the same.

gag has no map of its own: it bends the sparse output T_s by a step that depends on the values. But it bends it along
T_s and T_s - T_d alone, so for each query

    output = (1 + g (1 - zeta) c) T_s + g zeta (T_s - T_d),   c = <r, T_s> / |T_s|^2,   g = scale min(1, eta / |r~|)

and the same two numbers on the maps instead of the outputs give weights w with w V = output. They are what is recorded
for gag. At its default zeta of 0 that is the sparse map, each query's row times 1 + g c: its rows do not sum to one.
"""

import torch

from surgery.nn import attention, is_pladis
from surgery.nn.operators import OPERATORS
from surgery.nn.reference import without_autocast


def module_weights(module, query, key, value, mask=None):
    """The weights of one call of a cross-attention module: (batch, heads, queries, keys) in float32.

    module: a PladisAttention, with the hyperparameters that its buffers have now, or diffusers' Attention, whose
    weights are softmax. query, key, value: (batch, heads, length, head_dim), of any floating dtype. mask: additive,
    (batch, heads, 1 or queries, keys), or None.
    """
    scores = {"mask": mask, "qk_scale": module.scale, "implementation": "blocked"}
    if not is_pladis(module):
        return attention_map(query, key, operator="pladis", scale=0.0, **scores)
    operator = module.pladis_operator
    settings = {name: module._buffers[f"pladis_{name}"] for name in OPERATORS[operator]}
    if operator == "gag":
        return _gag_weights(query, key, value, settings, module.pladis_unit, scores)
    return attention_map(query, key, operator=operator, **settings, **scores)


def attention_map(query, key, **arguments):
    """The weights of an operator without a value's part: its output for the identity, (batch, heads, queries, keys).

    arguments: as `surgery.nn.attention` takes them.
    """
    keys = key.shape[2]
    identity = torch.eye(keys, dtype=torch.float32, device=key.device).expand(*key.shape[:2], keys, keys)
    return attention(query, key, identity, **arguments)


@without_autocast
def _gag_weights(query, key, value, settings, unit, scores):
    temperature = settings["temperature"]
    sparse = attention_map(query, key, operator="sparse", alpha=settings["alpha"], temperature=temperature, **scores)
    residual = sparse - attention_map(query, key, operator="pladis", scale=0.0, temperature=temperature, **scores)
    value = value.float()
    sparse_output, residual_output = sparse @ value, residual @ value
    dims = (-1,) if unit == "head" else (1, 3)
    length = sparse_output.square().sum(dims, keepdim=True)
    tiny = torch.finfo(length.dtype).tiny
    along = (residual_output * sparse_output).sum(dims, keepdim=True) / length.clamp_min(tiny)

    def bent(part, base):  # r~ = r_par + zeta r_orth
        return along * base + settings["zeta"] * (part - along * base)

    norm = bent(residual_output, sparse_output).square().sum(dims, keepdim=True).sqrt()
    gain = (settings["eta"] / norm.clamp_min(tiny)).clamp_max(1.0)
    return sparse + settings["scale"] * gain * bent(residual, sparse)
