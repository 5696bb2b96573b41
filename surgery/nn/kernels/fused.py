"""Which code computes an attention where, and `torch.ops.pladis.attention_v4`: the operators as one node of a graph.

torch.compile, torch.export and AOTInductor see this one node (on a GPU attention_triton_v5, the kernel's own) and need
not trace the solver; `decompositions` turns it into plain operations for a backend that does not know it (TensorRT,
ONNX, a C++ program without Python). Its version is part of its name: a graph that was exported with it finds what it
was made for, or nothing. Where nothing traces, a call goes straight to the kernel's Python: torch.library's own way
there costs more than a small attention.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from ..compat import is_dispatched
from ..operators import OPERATORS, UNITS, OperatorName, Unit, unknown_name
from .combined import from_outputs, is_combined, of_one_step
from .cpu import compiler_is_available, fused_on_cpu
from .reference import blocked, empty_results, entmax_by_package, no_gradient, reference
from .triton_kernel import fused_by_triton, launch_by_triton, triton_is_ready, triton_refusal

# "auto" is the fused operator; the others are for comparison, or for a backend that wants plain operations.
Implementation = Literal["auto", "reference", "entmax", "blocked", "cpp", "triton"]
IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)

_NAME = "pladis::attention_v4"
_IN_ONE_PASS = 1 << 16  # scores
# From so many scores on "auto" is the C++ kernel wherever it can be built: only toys have fewer. The limit is low, and
# nothing asks whether the kernel happens to be built already, because the two forms differ in the last bits: if a
# model's first large layer switched its small ones from one to the other, a seed would not draw the same image twice.
_WORTH_A_KERNEL = 1 << 10

_FUSED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None)))


def choice_problem(operator: str, unit: str, implementation: str) -> str | None:
    """What is wrong with these names, as one sentence; None if they are all known."""
    return (
        unknown_name("operator", operator, OPERATORS)
        or unknown_name("unit", unit, UNITS)
        or unknown_name("implementation", implementation, IMPLEMENTATIONS)
    )


def attention_by(
    implementation: Implementation,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    settings: list[Tensor],
    operator: OperatorName,
    unit: Unit,
    qk_scale: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """(output, log-sum-exp or None) by one of IMPLEMENTATIONS, of tensors and names that were checked before.

    As in `attention`, but key and value have query's batch. settings: scalar tensors in the order of
    OPERATORS. Raises RuntimeError where gradients are wanted of an implementation that has none.
    """
    operator, settings = of_one_step(operator, settings)
    arguments = (query, key, value, mask, settings, operator, unit, qk_scale, with_lse)
    if implementation == "auto":
        if gradient_is_wanted(query, key, value, *settings):
            return _by(reference, arguments)  # plain operations, which autograd follows
        return _as_a_node(arguments) if is_traced(query, key, value, mask, *settings) else computed(*arguments)
    if implementation == "reference":
        return _by(reference, arguments)
    if implementation == "entmax":
        return _by(reference, arguments, sparse_map=entmax_by_package)
    if gradient_is_wanted(query, key, value, *settings):
        raise RuntimeError(f"implementation={implementation!r} has no gradient; use 'reference' or 'auto' for training")
    if implementation == "triton":
        return _on_triton(arguments)
    return _by_kernel(blocked if implementation == "blocked" else _on_cpu, arguments)


def gradient_is_wanted(*tensors: Tensor) -> bool:
    """Whether autograd follows a call on these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def is_traced(*tensors: Tensor | None) -> bool:
    """Whether a call on these tensors (or None) has to be an operator's, because something records or reroutes it.

    dynamo and torch.export answer is_compiling(), and so never look at what runs otherwise. make_fx, FakeTensorMode and
    every other mode of torch_dispatch are on a stack, torch.func's transforms on another (`is_dispatched`). Tensor
    subclasses have a torch_dispatch of their own.
    """
    return (
        torch.compiler.is_compiling()
        or is_dispatched()
        or torch.jit.is_tracing()
        or not _PLAIN.issuperset(map(type, tensors))
    )


def choose_implementation(query: Tensor, key: Tensor, value: Tensor) -> Implementation:
    """What "auto" runs for these tensors: "triton", "cpp", "blocked" or "reference"."""
    if query.is_cuda and triton_refusal(query, key, value) is None:
        return "triton"
    batch, heads, queries, _ = query.shape
    scores = batch * heads * queries * key.shape[2]
    if scores >= _WORTH_A_KERNEL and query.is_cpu and _dtype_is_fused(query, value) and compiler_is_available():
        return "cpp"
    # One pass over small inputs; pieces where all the scores at once would be the largest thing in memory.
    return "reference" if scores <= _IN_ONE_PASS else "blocked"


def attention_decompositions() -> dict[Callable, Callable]:
    """{operator: plain torch function} of the fused operator, for surgery.nn.decompositions."""
    fused = [torch.ops.pladis.attention_v4]
    if triton_is_ready():
        fused.append(torch.ops.pladis.attention_triton_v5)
    return {operator.default: _decomposed for operator in fused}


def _by(function, arguments, **more):
    """Call one of the implementations, which take by name what makes no difference to how they are chosen."""
    query, key, value, mask, settings, operator, unit, qk_scale, with_lse = arguments
    how = {"operator": operator, "unit": unit, "mask": mask, "qk_scale": qk_scale, "with_lse": with_lse}
    return function(query, key, value, settings, **how, **more)


def _by_kernel(function, arguments):
    """As `_by`, of a form that has its operators one unit of `unit` at a time; the rest is combined of its outputs."""
    query, key, value, mask, settings, operator, unit, qk_scale, with_lse = arguments
    if not is_combined(operator, unit):
        return _by(function, arguments)
    exact = value.to(torch.promote_types(value.dtype, torch.float32))
    of_one_dtype = (query.to(exact.dtype), key.to(exact.dtype), exact, mask)

    def run(numbers, with_lse):
        return _by(function, (*of_one_dtype, numbers, "sparse", "head", qk_scale, with_lse))

    output, lse = from_outputs(run, query, settings, operator, unit, with_lse)
    return output.to(value.dtype), lse


def _as_a_node(arguments):
    """By an operator of torch.library, which a graph holds as one node."""
    if arguments[0].is_cuda and triton_refusal(*arguments[:3]) is None:
        return _by(fused_by_triton, arguments)
    output, lse = torch.ops.pladis.attention_v4(*arguments)
    return output, lse if arguments[-1] else None


def computed(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    """`attention_by` "auto" where nothing traces and no gradient is wanted: its other arguments, in that order."""
    chosen = choose_implementation(*arguments[:3])
    if chosen == "triton":
        return launch_by_triton(*arguments)
    if chosen == "reference":
        return _by(reference, arguments)
    return _by_kernel(fused_on_cpu if chosen == "cpp" else blocked, arguments)


def _on_cpu(query, key, value, settings, **how):
    if query.device.type != "cpu" or not _dtype_is_fused(query, value):
        raise ValueError(f"implementation='cpp' is for float32, float16 and bfloat16 on a CPU, not {query.dtype}")
    if not compiler_is_available():
        raise RuntimeError("implementation='cpp' needs a C++ compiler, such as g++")
    return fused_on_cpu(query, key, value, settings, **how)


def _on_triton(arguments):
    reason = triton_refusal(*arguments[:3])
    if reason:
        raise ValueError(f"implementation='triton' cannot take this: {reason}")
    if is_traced(*arguments[:4], *arguments[4]):
        return _by(fused_by_triton, arguments)
    return launch_by_triton(*arguments)


def _dtype_is_fused(query, value):
    return query.dtype in _FUSED_DTYPES and query.dtype == value.dtype


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
    names = cast("OperatorName", operator), cast("Unit", unit)  # a schema has no Literal
    arguments = (query, key, value, mask, list(settings), *names, qk_scale, with_lse)
    output, lse = computed(*arguments)
    wanted, wanted_lse = empty_results(*arguments)
    if output.stride() != wanted.stride():  # what the compiler was told to expect
        output = wanted.copy_(output)
    return output, wanted_lse if lse is None else lse.contiguous()


def _decomposed(*arguments):
    output, lse = _by(reference, arguments)
    return output, arguments[0].new_empty(0, dtype=torch.float32) if lse is None else lse


# A process may hold several copies of this file; the first one registers.
if not hasattr(torch.ops.pladis, "attention_v4"):
    _operator = torch.library.custom_op(_NAME, _dispatch, mutates_args=())
    _operator.register_fake(empty_results)
    _operator.register_autograd(no_gradient)
