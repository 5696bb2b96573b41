"""`torch.ops.pladis.attention_v2`: the operators as one node of a graph, and which code computes it where.

torch.compile, torch.export and AOTInductor see this one node (on a GPU attention_triton_v2, the kernel's own) and need
not trace the solver; `decompositions` turns it into plain operations for a backend that does not know it (TensorRT,
ONNX, a C++ program without Python). Its version is part of its name: a graph that was exported with it finds what it
was made for, or nothing.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .cpu_kernel import WORTH_COMPILING, compiler_is_available, fused_on_cpu
from .operators import OPERATORS, UNITS
from .reference import blocked, empty_results, entmax_by_package, no_gradient, reference
from .triton_kernel import fused_by_triton, triton_is_ready, triton_refusal

# "auto" is the fused operator; the others are for comparison, or for a backend that wants plain operations.
IMPLEMENTATIONS = ("auto", "reference", "entmax", "blocked", "cpp", "triton")

_NAME = "pladis::attention_v2"
_IN_ONE_PASS = 1 << 16  # scores


def choice_problem(operator, unit, implementation):
    """What is wrong with these names, as one sentence; None if they are all known."""
    for kind, name, known in (
        ("operator", operator, OPERATORS),
        ("unit", unit, UNITS),
        ("implementation", implementation, IMPLEMENTATIONS),
    ):
        if name not in known:
            return f"unknown {kind} {name!r}; there are {', '.join(known)}"
    return None


def attention_by(implementation, query, key, value, settings, *, operator, unit, mask, qk_scale, with_lse):
    """(output, log-sum-exp or None) by one of IMPLEMENTATIONS; settings as scalar tensors in the order of OPERATORS."""
    how = {"operator": operator, "unit": unit, "mask": mask, "qk_scale": qk_scale, "with_lse": with_lse}
    arguments = (query, key, value, settings)
    tracks_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value, *settings))
    if implementation == "reference" or (implementation == "auto" and tracks_gradient):
        return reference(*arguments, **how)  # plain operations, which autograd follows
    if implementation == "entmax":
        return reference(*arguments, **how, sparse_map=entmax_by_package)
    if tracks_gradient:
        raise RuntimeError(f"implementation={implementation!r} has no gradient; use 'reference' or 'auto' for training")
    if implementation == "auto" and query.is_cuda and triton_refusal(query, key, value) is None:
        return fused_by_triton(*arguments, **how)
    if implementation == "auto":
        output, lse = torch.ops.pladis.attention_v2(
            query, key, value, mask, settings, operator, unit, qk_scale, with_lse
        )
        return output, lse if with_lse else None
    return {"blocked": blocked, "cpp": _on_cpu, "triton": _on_triton}[implementation](*arguments, **how)


def choose_implementation(query, key, value):
    """What "auto" runs for these tensors: "triton", "cpp", "blocked" or "reference"."""
    batch, heads, queries, _ = query.shape
    scores = batch * heads * queries * key.shape[2]
    if query.is_cuda and triton_refusal(query, key, value) is None:
        return "triton"
    if query.device.type == "cpu" and scores >= WORTH_COMPILING and _dtype_is_fused(query, value):
        return "cpp" if compiler_is_available() else "blocked"
    # One pass over small inputs; pieces where all the scores at once would be the largest thing in memory.
    return "reference" if scores <= _IN_ONE_PASS else "blocked"


def attention_decompositions():
    """{operator: plain torch function} of the fused operator, for surgery.nn.decompositions."""
    fused = [torch.ops.pladis.attention_v2]
    if triton_is_ready():
        fused.append(torch.ops.pladis.attention_triton_v2)
    return {operator.default: _decomposed for operator in fused}


def _on_cpu(query, key, value, settings, **how):
    if query.device.type != "cpu" or not _dtype_is_fused(query, value):
        raise ValueError(f"implementation='cpp' is for float32, float16 and bfloat16 on a CPU, not {query.dtype}")
    if not compiler_is_available():
        raise RuntimeError("implementation='cpp' needs a C++ compiler, such as g++")
    return fused_on_cpu(query, key, value, settings, **how)


def _on_triton(query, key, value, settings, **how):
    reason = triton_refusal(query, key, value)
    if reason:
        raise ValueError(f"implementation='triton' cannot take this: {reason}")
    return fused_by_triton(query, key, value, settings, **how)


def _dtype_is_fused(query, value):
    return query.dtype in (torch.float32, torch.float16, torch.bfloat16) and query.dtype == value.dtype


def _dispatch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    settings: Sequence[Tensor],
    operator: str,
    unit: str,
    qk_scale: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    chosen = {"reference": reference, "blocked": blocked, "cpp": fused_on_cpu, "triton": fused_by_triton}[
        choose_implementation(query, key, value)
    ]
    output, lse = chosen(
        query,
        key,
        value,
        list(settings),
        operator=operator,
        unit=unit,
        mask=mask,
        qk_scale=qk_scale,
        with_lse=with_lse,
    )
    wanted, wanted_lse = empty_results(query, key, value, mask, settings, operator, unit, qk_scale, with_lse)
    if output.stride() != wanted.stride():  # what the compiler was told to expect
        output = wanted.copy_(output)
    return output, wanted_lse if lse is None else lse.contiguous()


def _decomposed(query, key, value, mask, settings, operator, unit, qk_scale, with_lse):
    output, lse = reference(
        query,
        key,
        value,
        settings,
        operator=operator,
        unit=unit,
        mask=mask,
        qk_scale=qk_scale,
        with_lse=with_lse,
    )
    return output, query.new_empty(0, dtype=torch.float32) if lse is None else lse


# A process may hold several copies of this file; the first one registers.
if not hasattr(torch.ops.pladis, "attention_v2"):
    _operator = torch.library.custom_op(_NAME, _dispatch, mutates_args=())
    _operator.register_fake(empty_results)
    _operator.register_autograd(no_gradient)
