"""Joint attention (MMDiT): an operator where image queries meet text keys, in a sequence that holds both.

With p the dense map over all keys, an image query's share of text is m = sum of p over the text keys, and

    output = sum over image keys of p V  +  m * operator(the query, the text keys)

so text keeps its share of every row, the text's own queries stay dense, and scale 0 is the base model. Sparsifying the
whole row would sparsify attention between image tokens. The papers give no formula for joint attention; this is ours.

Computed in three parts that together cost one dense attention and the operator's map: image to image on the fast
kernel, which returns its log-sum-exp, image to text by the operator's kernel, which does too, and the text's rows. Then
m = sigmoid(lse_text - lse_image), whatever the temperature of the operator. On a GPU the operator's kernel mixes them.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from .compat import cudnn_attention, flash_attention, flash_attention_on_cpu, fused_choice
from .functional import checked_settings, dense_attention, fitting, mask_block, text_and_image
from .joint_additions import attend_jointly_with_additions
from .kernels.combined import is_combined, of_one_step
from .kernels.cpu import fused_on_cpu, joins_on_cpu
from .kernels.entmax import entmax_of_shifted, shift_by_row_max, softmax_of_shifted
from .kernels.fused import (
    Implementation,
    attention_by,
    attention_decompositions,
    choice_problem,
    choose_implementation,
    computed,
    gradient_is_wanted,
    is_traced,
)
from .kernels.reference import (
    attention_scores,
    empty_outputs,
    entmax_by_package,
    no_gradient,
    of_one_dtype,
    product_of_groups,
    reference,
    without_autocast,
)
from .kernels.triton_kernel import launch_by_triton, triton_refusal
from .module import PladisModule, split_sequence
from .operators import OPERATORS, OperatorName, Unit, has_no

_JOINT_NAME = "pladis::joint_attention_v3"
_HALVES = (torch.float16, torch.bfloat16)


class _Joint(NamedTuple):
    """What a call is told beside its tensors, as in `joint_attention`; in the order in which the operator takes it."""

    operator: str
    unit: str
    qk_scale: float
    text_length: int
    text_first: bool
    only_text_is_masked: bool


def joint_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    text_length: int,
    text_first: bool = True,
    operator: OperatorName = "pladis",
    unit: Unit = "head",
    mask: Tensor | None = None,
    only_text_is_masked: bool = False,
    qk_scale: float | None = None,
    implementation: Implementation = "auto",
    **hyperparameters: float | Tensor | None,
) -> Tensor:
    """Attention over text and image together, with one of OPERATORS where image queries meet text keys.

    query, key, value: (batch, heads, length, head_dim), text and image one after the other; heads of keys may be fewer,
        as in `attention`. text_length: how many tokens are text: the first ones, or with text_first=False the last.
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
    if unknown := sorted(hyperparameters.keys() - OPERATORS[operator].defaults.keys()):
        raise ValueError(has_no(operator, unknown[0]))
    _check_lengths(query, key, text_length)
    settings = checked_settings(query, key, value, mask, operator, hyperparameters)
    key, value = fitting(query, key, value)
    factor = query.shape[-1] ** -0.5 if qk_scale is None else float(qk_scale)
    how = _Joint(operator, unit, factor, text_length, text_first, only_text_is_masked)
    return _joint_attention_by(implementation, query, key, value, mask, settings, how)


def attend_jointly(
    module: PladisModule,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_length: int,
    text_first: bool,
    mask: Tensor | None = None,
    only_text_is_masked: bool = False,
) -> Tensor:
    """`joint_attention` by the operator of a patched `module`. query: (batch, heads, length, head_dim).

    query, key and value are of one shape, but that keys may have fewer heads. Raises ValueError where context
    parallelism was switched on after the module was patched, and for a text_length that is not between 0 and length.
    """
    reason = split_sequence(module)
    if reason:
        raise ValueError(reason)
    _check_lengths(query, key, text_length)
    setting = (module.pladis_operator, module.pladis_unit, query.shape[3] ** -0.5)
    settings = module.hyperparameter_tensors()
    then = None if module.pladis_history is None else module.accelerated

    if not module.pladis_additions:  # without the closure: a call of small tensors is timed by its Python
        how = _Joint(*setting, text_length, text_first, only_text_is_masked)
        return _joint_attention_by(module.pladis_implementation, query, key, value, mask, settings, how, then)

    def attend(query, key, value, mask, text_length, only_text_is_masked):
        how = _Joint(*setting, text_length, text_first, only_text_is_masked)
        return _joint_attention_by(module.pladis_implementation, query, key, value, mask, settings, how, then)

    given = (query, key, value, text_length, text_first, mask, only_text_is_masked)
    return attend_jointly_with_additions(module, attend, *given)


def _check_lengths(query, key, text_length):
    queries, keys = query.shape[2], key.shape[2]
    if not (queries == keys and 0 <= text_length <= keys):
        raise ValueError(f"{text_length} text tokens do not fit {queries} queries and {keys} keys")


def _joint_attention_by(implementation, query, key, value, mask, settings, how, then=None):
    """By one of IMPLEMENTATIONS, of what was checked before; settings as scalar tensors in the order of OPERATORS.

    then: (query, output) -> output, of the operator's part: what keeps a history, which no node of a graph does.
    """
    query, key, value = of_one_dtype(query, key, value)
    operator, settings = of_one_step(how.operator, settings)
    if operator != how.operator:
        how = how._replace(operator=operator)
    arguments = (query, key, value, mask, settings)
    if implementation == "auto":
        if gradient_is_wanted(query, key, value, *settings):
            return _whole(*arguments, how, "reference", then)
        if is_traced(query, key, value, mask, *settings):
            if then is not None:
                return _whole(*arguments, how, "reference", then)
            return torch.ops.pladis.joint_attention_v3(*arguments, *how)
    elif implementation in ("reference", "entmax"):
        return _whole(*arguments, how, implementation, then)
    return _in_parts(*arguments, how, implementation, then)


def dense_with_lse(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, qk_scale: float
) -> tuple[Tensor, Tensor]:
    """(softmax attention, log-sum-exp of its scores in float32) on the fastest kernel that returns both.

    mask: boolean or additive, broadcastable to the scores, or None. The log-sum-exp: (batch, heads, queries), -inf
    where every key is masked.
    """
    if query.is_cpu and query.shape[3] == value.shape[3] and query.shape[2] and key.shape[2]:
        return _dense_on_cpu(query, key, value, mask, qk_scale)
    if query.is_cuda and mask is None and query.dtype in _HALVES:
        # The kernel that the unpatched model would run: on an H100 cuDNN's, which is a third faster than flash.
        stock = fused_choice(query, key, value, qk_scale)
        if stock == SDPBackend.CUDNN_ATTENTION.value:
            return cudnn_attention(query, key, value, qk_scale)
        if stock == SDPBackend.FLASH_ATTENTION.value:
            return flash_attention(query, key, value, qk_scale)
    # No other kernel of torch's takes every mask, float32 and odd channels: our own does, at scale 0.
    off = {**OPERATORS["pladis"].defaults, **OPERATORS["pladis"].off}
    settings = [query.new_full((), number, dtype=torch.float32) for number in off.values()]
    output, lse = attention_by("auto", query, key, value, mask, settings, "pladis", "head", qk_scale, True)
    assert lse is not None
    return output, lse


def _dense_on_cpu(query, key, value, mask, qk_scale):
    if mask is None:
        return flash_attention_on_cpu(query, key, value, None, qk_scale)
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
    whole = mask.expand(*query.shape[:3], key.shape[2])
    output, lse = flash_attention_on_cpu(query, key, value, whole, qk_scale)
    return output, lse.masked_fill(mask.amax(-1) == float("-inf"), float("-inf"))  # where that kernel says 0


@without_autocast
def _in_parts(query, key, value, mask, settings, how, by, then=None):
    output, _ = empty_outputs(query, value, False)
    operator, unit, qk_scale, text_length, text_first, only_text_is_masked = how
    length = key.shape[2]
    if text_length == 0 or text_length == length:  # one of the two kinds of token alone: dense
        return output.copy_(dense_attention(query, key, value, mask, qk_scale))
    text_mask = image_mask = to_text_mask = None
    if mask is not None:
        text, image = text_and_image(length, text_length, text_first)
        text_mask, to_text_mask = mask_block(mask, text, slice(None)), mask_block(mask, image, text)
        image_mask = None if only_text_is_masked else mask_block(mask, image, image)
    parts = _split(text_length, text_first, query, key, value, output)
    (text_query, query), (text_key, image_key), (text_value, image_value), (text_output, image_output) = parts
    # The longest kernel first: a GPU runs it while Python launches the others.
    dense, dense_lse = dense_with_lse(query, image_key, image_value, image_mask, qk_scale)
    text_output.copy_(dense_attention(text_query, key, value, text_mask, qk_scale))
    if (
        then is None and not is_combined(operator, unit) and _kernel_joins(by, query, text_key, text_value)
    ):  # the kernel mixes both while its part is in registers
        joined = {"dense": dense, "dense_lse": dense_lse.contiguous(), "output": image_output}
        launch_by_triton(query, text_key, text_value, to_text_mask, settings, operator, unit, qk_scale, False, **joined)
        return output
    if then is None and by in ("auto", "cpp") and _is_joined_on_cpu(query, text_key, text_value, operator, unit):
        how = {"operator": operator, "unit": unit, "mask": to_text_mask, "qk_scale": qk_scale}
        fused_on_cpu(query, text_key, text_value, settings, **how, joined=(dense, dense_lse, image_output))
        return output
    arguments = (query, text_key, text_value, to_text_mask, settings, operator, unit, qk_scale, True)
    changed, changed_lse = computed(*arguments) if by == "auto" else attention_by(by, *arguments)
    changed = changed if then is None else then(query, changed)
    if image_mask is not None:  # a row without any key is zero in both, and so in whatever share
        dense_lse = dense_lse.clamp_min(torch.finfo(dense_lse.dtype).min)
    _merge(dense, dense_lse, changed, changed_lse, image_output)
    return output


def _kernel_joins(by, query, key, value):
    wanted = by == "triton" or (by == "auto" and query.is_cuda)
    return wanted and triton_refusal(query, key, value) is None


def _is_joined_on_cpu(query, key, value, operator, unit):
    chosen = query.is_cpu and not is_combined(operator, unit) and choose_implementation(query, key, value) == "cpp"
    return chosen and joins_on_cpu(query, key, value, operator, unit)


def _split(text_length, text_first, *tensors):
    """(text's part, image's part) of each tensor, (batch, heads, length, channels)."""
    image_length = tensors[0].shape[2] - text_length
    if text_first:
        return [tensor.split_with_sizes((text_length, image_length), 2) for tensor in tensors]
    return [tensor.split_with_sizes((image_length, text_length), 2)[::-1] for tensor in tensors]


def _merge(dense, dense_lse, changed, changed_lse, out):
    """Write attention over two sets of keys as one into `out`: `changed` has the share of its keys in the softmax.

    dense, changed, out: (batch, heads, queries, channels); dense_lse, changed_lse: (batch, heads, queries), not both
    infinite.
    """
    share = (changed_lse - dense_lse).sigmoid_().unsqueeze(-1)
    share = share if share.dtype == dense.dtype else share.to(dense.dtype)
    torch.lerp(dense, changed, share, out=out)


@without_autocast
def _whole(query, key, value, mask, settings, how, by, then=None):
    """The same in plain operations over all the scores at once: the definition, differentiable, and what a graph is
    decomposed into.
    """
    operator, unit, qk_scale, text_length, text_first, _ = how
    text, image = text_and_image(key.shape[2], text_length, text_first)
    dense = softmax_of_shifted(shift_by_row_max(attention_scores(query, key, mask, qk_scale)))
    output = product_of_groups(dense.to(value.dtype), value)
    if text_length == 0 or text_length == key.shape[2]:  # one of the two kinds of token alone: dense
        return output
    to_text = dense[:, :, image, text]
    named = {"operator": operator, "unit": unit, "mask": mask_block(mask, image, text), "qk_scale": qk_scale}
    arguments = (query[:, :, image], key[:, :, text], value[:, :, text], settings)
    changed, _ = reference(*arguments, **named, sparse_map=entmax_by_package if by == "entmax" else entmax_of_shifted)
    changed = changed if then is None else then(query[:, :, image], changed)
    share = to_text.sum(dim=-1, keepdim=True).to(value.dtype)
    to_image = product_of_groups(dense[:, :, image, image].to(value.dtype), value[:, :, image])
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
    how = _Joint(operator, unit, qk_scale, text_length, text_first, text_only)
    return _in_parts(query, key, value, mask, list(settings), how, "auto")


def _empty_joint(query, key, value, *more):
    return empty_outputs(query, value, False)[0]


def _joint_decomposed(query, key, value, mask, settings, *how):
    return _whole(query, key, value, mask, settings, _Joint(*how), "reference")


def joint_decompositions() -> dict[Callable, Callable]:
    """{operator: plain torch function} of the joint operator, for surgery.nn.decompositions."""
    return {torch.ops.pladis.joint_attention_v3.default: _joint_decomposed}


# A process may hold several copies of this file; the first one registers.
if not hasattr(torch.ops.pladis, "joint_attention_v3"):
    _joint_operator = torch.library.custom_op(_JOINT_NAME, _joint_dispatch, mutates_args=())
    _joint_operator.register_fake(_empty_joint)
    _joint_operator.register_autograd(no_gradient)


def decompositions() -> dict[Callable, Callable]:
    """{operator: plain torch function}, for `exported_program.run_decompositions` and the like.

    Everything but the operators of this package stays as it is; merge it into a backend's own table.
    """
    return {**attention_decompositions(), **joint_decompositions()}
