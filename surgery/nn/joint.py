"""Joint attention (MMDiT): an operator where image queries meet text keys, in a sequence that holds both.

With p the dense map over all keys, an image query's share of text is m = sum of p over the text keys, and

    output = sum over image keys of p V  +  m * operator(the query, the text keys)

so text keeps its share of every row, the text's own queries stay dense, and scale 0 is the base model. Sparsifying the
whole row would sparsify attention between image tokens. The papers give no formula for joint attention; this is ours.

Computed in three parts that together cost one dense attention and the operator's map: image to image on the fast
kernel, which returns its log-sum-exp, image to text by the operator's kernel, which does too, and the text's rows. Then
m = sigmoid(lse_text - lse_image), whatever the temperature of the operator.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import checked_settings
from .entmax import shift_by_row_max, softmax_of_shifted
from .fused import attention_by, choice_problem
from .module import split_sequence
from .operators import OPERATORS
from .reference import attention_scores, blocked, empty_outputs, no_gradient, reference

_JOINT_NAME = "pladis::joint_attention_v1"


def joint_attention(
    query,
    key,
    value,
    *,
    text_length,
    text_first=True,
    operator="pladis",
    unit="head",
    mask=None,
    only_text_is_masked=False,
    qk_scale=None,
    implementation="auto",
    **hyperparameters,
):
    """Attention over text and image together, with one of OPERATORS where image queries meet text keys.

    query, key, value: (batch, heads, length, head_dim), text and image one after the other. text_length: how many of
        them are text: the first ones, or with text_first=False the last.
    mask: boolean (True keeps a key) or additive, broadcastable to (batch, heads, length, length). A text key that is
        masked is none of the operator's keys either. only_text_is_masked: that it keeps every image key, which spares
        image to image the slower kernels for masks; not checked.
    operator, unit, qk_scale, implementation, hyperparameters: as in `attention`. The temperature is the text block's;
        the share of text is the dense map's at temperature 1.
    Returns (batch, heads, length, head_dim) in value's dtype. Raises as `attention`, and ValueError for a text_length
    that is not between 0 and length.
    """
    problem = choice_problem(operator, unit, implementation)
    if problem:
        raise ValueError(problem)
    unknown = sorted(set(hyperparameters) - set(OPERATORS[operator]))
    if unknown:
        raise ValueError(f"{operator} has no {unknown[0]}; it has {', '.join(OPERATORS[operator])}")
    if not (query.shape[2] == key.shape[2] and 0 <= text_length <= key.shape[2]):
        raise ValueError(f"{text_length} text tokens do not fit {query.shape[2]} queries and {key.shape[2]} keys")
    settings = checked_settings(query, key, value, mask, operator, hyperparameters)
    qk_scale = query.shape[-1] ** -0.5 if qk_scale is None else float(qk_scale)
    tracks_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value, *settings))
    how = (operator, unit, qk_scale, text_length, text_first, only_text_is_masked)
    if implementation in ("reference", "entmax") or (implementation == "auto" and tracks_gradient):
        return _whole(query, key, value, mask, settings, *how, "entmax" if implementation == "entmax" else "reference")
    if implementation != "auto":
        return _in_parts(query, key, value, mask, settings, *how, implementation)
    return torch.ops.pladis.joint_attention_v1(query, key, value, mask, settings, *how)


def attend_jointly(module, query, key, value, text_length, text_first, mask=None, only_text_is_masked=False):
    """`joint_attention` by the operator of a patched `module`. query: (batch, heads, length, head_dim).

    Raises ValueError where context parallelism was switched on after the module was patched.
    """
    reason = split_sequence(module)
    if reason:
        raise ValueError(reason)
    return joint_attention(
        query,
        key,
        value,
        text_length=text_length,
        text_first=text_first,
        mask=mask,
        only_text_is_masked=only_text_is_masked,
        unit=module.pladis_unit,
        **module.operation(),
    )


def dense_with_lse(query, key, value, mask, qk_scale):
    """(softmax attention, log-sum-exp of its scores in float32) on the fastest kernel that returns both.

    mask: boolean or additive, broadcastable to the scores, or None. The log-sum-exp: (batch, heads, queries).
    """
    operations = torch.ops.aten
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
    if query.device.type == "cpu" and query.shape[3] == value.shape[3] and query.shape[2] and key.shape[2]:
        mask = None if mask is None else mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        return operations._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=mask, scale=qk_scale
        )
    if query.is_cuda and mask is None and query.dtype != torch.float32 and _flash_takes(query, value):
        return operations._scaled_dot_product_flash_attention(query, key, value, 0.0, False, scale=qk_scale)[:2]
    if query.is_cuda and query.dtype in (torch.float32, torch.float16, torch.bfloat16):
        mask = None if mask is None else _aligned(mask, query, key)
        output, lse = operations._scaled_dot_product_efficient_attention(
            query, key, value, mask, True, 0.0, False, scale=qk_scale
        )[:2]
        return output, lse[:, :, : query.shape[2]]  # padded to whole tiles
    settings = [query.new_full((), number, dtype=torch.float32) for number in (1.0, 0.0, 1.0)]
    return blocked(
        query, key, value, settings, operator="pladis", unit="head", mask=mask, qk_scale=qk_scale, with_lse=True
    )


def _aligned(mask, query, key):
    """A mask as the kernel wants it: (batch, heads, queries, keys), the rows of its memory multiples of 16 long."""
    keys = key.shape[2]
    padded = F.pad(mask.to(query.dtype), (0, -keys % 16)) if mask.shape[-1] > 1 else mask.to(query.dtype)
    return padded[..., :keys].expand(*query.shape[:3], keys)


def _flash_takes(query, value):
    return query.shape[3] == value.shape[3] and query.shape[3] % 8 == 0 and query.shape[3] <= 256


def text_and_image(length, text_length, text_first):
    """(slice of the text, slice of the image) in a joint sequence."""
    if text_first:
        return slice(0, text_length), slice(text_length, length)
    return slice(length - text_length, length), slice(0, length - text_length)


def _part(mask, rows, columns):
    """The rows and columns of a mask that may have one of either."""
    if mask is None:
        return None
    if mask.ndim >= 2 and mask.shape[-2] > 1:
        mask = mask[..., rows, :]
    return mask[..., columns] if mask.shape[-1] > 1 else mask


def _in_parts(query, key, value, mask, settings, operator, unit, qk_scale, text_length, text_first, text_only, by):
    text, image = text_and_image(key.shape[2], text_length, text_first)
    output, _ = empty_outputs(query, value, False)
    if text_length == 0 or text_length == key.shape[2]:  # one of the two kinds of token alone: dense
        return output.copy_(_dense(query, key, value, mask, qk_scale))
    output[:, :, text] = _dense(query[:, :, text], key, value, _part(mask, text, slice(None)), qk_scale)
    rows = query[:, :, image]
    image_mask = None if text_only else _part(mask, image, image)
    dense, dense_lse = dense_with_lse(rows, key[:, :, image], value[:, :, image], image_mask, qk_scale)
    changed, text_lse = attention_by(
        by,
        rows,
        key[:, :, text],
        value[:, :, text],
        settings,
        operator=operator,
        unit=unit,
        mask=_part(mask, image, text),
        qk_scale=qk_scale,
        with_lse=True,
    )
    # Where one of the two has no key that is not masked its log-sum-exp is -inf; where neither has, the row is zero.
    share = torch.sigmoid(text_lse - dense_lse).nan_to_num(0.0).to(value.dtype)[..., None]
    torch.lerp(dense, changed, share, out=output[:, :, image])
    return output


def _dense(query, key, value, mask, qk_scale):
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=qk_scale)


def _whole(query, key, value, mask, settings, operator, unit, qk_scale, text_length, text_first, text_only, by):
    """The same in plain operations over all the scores at once: the definition, differentiable, and what a graph is
    decomposed into.
    """
    text, image = text_and_image(key.shape[2], text_length, text_first)
    dense = softmax_of_shifted(shift_by_row_max(attention_scores(query, key, mask, qk_scale)))
    output = torch.matmul(dense.to(value.dtype), value)
    if text_length == 0 or text_length == key.shape[2]:  # one of the two kinds of token alone: dense
        return output
    to_text = dense[:, :, image, text]
    how = {"operator": operator, "unit": unit, "mask": _part(mask, image, text), "qk_scale": qk_scale}
    arguments = (query[:, :, image], key[:, :, text], value[:, :, text], settings)
    if by == "entmax":
        changed, _ = attention_by("entmax", *arguments, **how, with_lse=False)
    else:
        changed, _ = reference(*arguments, **how)
    share = to_text.sum(dim=-1, keepdim=True).to(value.dtype)
    to_image = torch.matmul(dense[:, :, image, image].to(value.dtype), value[:, :, image])
    parts = [output[:, :, text], to_image + share * changed]
    return torch.cat(parts if text_first else parts[::-1], dim=2)


def _joint_dispatch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    settings: Sequence[Tensor],
    operator: str,
    unit: str,
    qk_scale: float,
    text_length: int,
    text_first: bool,
    text_only: bool,
) -> Tensor:
    how = (operator, unit, qk_scale, text_length, text_first, text_only)
    return _in_parts(query, key, value, mask, list(settings), *how, "auto")


def _empty_joint(query, key, value, mask, settings, operator, unit, qk_scale, text_length, text_first, text_only):
    return empty_outputs(query, value, False)[0]


def _joint_decomposed(*arguments):
    return _whole(*arguments, "reference")


def joint_decompositions():
    """{operator: plain torch function} of the joint operator, for surgery.nn.decompositions."""
    return {torch.ops.pladis.joint_attention_v1.default: _joint_decomposed}


# A process may hold several copies of this file; the first one registers.
if not hasattr(torch.ops.pladis, "joint_attention_v1"):
    _joint_operator = torch.library.custom_op(_JOINT_NAME, _joint_dispatch, mutates_args=())
    _joint_operator.register_fake(_empty_joint)
    _joint_operator.register_autograd(no_gradient)
