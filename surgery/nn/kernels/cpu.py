"""The fused operators on CPUs: one C++ kernel from query, key and value to the output.

Its source (cpu.cpp) is compiled once by the machine's own C++ compiler through torch, which keeps the result on
disk. Where there is none, `compiler_is_available` is False and the blocked torch form is used.
"""

import ctypes
import functools
import platform
import warnings

import torch

from ..compat import compiled_cpp
from ..operators import OPERATORS
from ..shipped import cpp_source
from .entmax import newton_steps


@functools.cache
def compiler_is_available() -> bool:
    """Whether the kernel compiles and loads here; tries it, once a process. Says why not in a warning."""
    try:
        _library()
    except Exception as error:  # whatever a missing or broken tool chain raises
        reason = str(error).strip().splitlines()
        warnings.warn(
            f"the C++ attention kernel cannot be built ({type(error).__name__}: {reason[0] if reason else 'no message'}"
            "); using the slower torch form. A C++ compiler such as g++ is what it needs",
            stacklevel=2,
        )
        return False
    return True


def library_is_loaded() -> bool:
    """Whether the kernel has been built and loaded in this process already. Never builds it."""
    return _library.cache_info().currsize > 0


@functools.cache
def _library():
    """The C++ source's pladis_attention."""
    function = compiled_cpp(cpp_source(), compiler_flags()).pladis_attention
    function.argtypes = [ctypes.c_void_p] * 10
    function.restype = None
    return function


def compiler_flags() -> tuple[str, ...]:
    """What the compiler is told beside what torch tells it for code of its own."""
    if platform.system() == "Windows":
        return ()
    # inductor vectorises by hand and tells the compiler not to; what is left to do here is the compiler's.
    flags = ("-ftree-loop-vectorize", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
    return (*flags, "-mprefer-vector-width=512") if platform.machine() in ("x86_64", "AMD64") else flags


_SIZES = ("batch", "heads", "key_heads", "queries", "keys", "channels", "value_channels")


class _Plan(ctypes.Structure):
    """The C++ source's struct Plan."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _SIZES),
        *((f"{tensor}_{dim}", ctypes.c_int64) for tensor in ("query", "key", "value") for dim in "bhn"),
        *((f"mask_{dim}", ctypes.c_int64) for dim in "bhqk"),
        *((f"{tensor}_{dim}", ctypes.c_int64) for tensor in ("output", "dense", "dense_lse") for dim in "bhn"),
        ("qk_scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("kind", "whole_token", "steps", "threads", "dtype", "mask_kind")),
    ]


_DTYPES_IN_C = (torch.float32, torch.float16, torch.bfloat16)
_MOST_PLANS = 512

# What a call has in common with the next of its kind: {everything that _planned reads: its result}. A plan is never
# changed once it is made, so threads may share it.
_plans = {}


def fused_on_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    settings: list[torch.Tensor],
    *,
    operator: str,
    unit: str,
    mask: torch.Tensor | None,
    qk_scale: float,
    with_lse: bool = False,
    joined: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `reference`, with nothing beyond the output in memory. float32; float16 and bfloat16, computed in float32.

    query: (batch, heads, queries, head_dim); key, value: (batch, key_heads, keys, head_dim). Returns (output,
    log-sum-exp or None), (batch, heads, queries, head_dim) and (batch, heads, queries).
    joined: (attention of the same queries to other keys, its log-sum-exp in float32, where to write the attention to
    both), for what `joins_on_cpu` passes.
    """
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.float()
    # Small calls take a few microseconds, of which Python should not add many: what is asked of tensors is kept.
    kind = (
        query.shape,
        query.stride(),
        key.shape,
        key.stride(),
        value.shape,
        value.stride(),
        query.dtype,
        key.dtype,
        value.dtype,
        None if mask is None else (mask.shape, mask.stride(), mask.dtype),
        None if joined is None else tuple(tensor.stride() for tensor in joined),
        operator,
        unit,
        qk_scale,
        torch.get_num_threads(),
    )
    planned = _plans.get(kind)
    if planned is None:
        planned = _planned(query, key, value, mask, joined, operator, unit, qk_scale)
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        _plans[kind] = planned
    plan, address, shape, strides = planned
    if plan is None or shape is None or strides is None:
        tensors = _for_c(query, key, value)
        output, lse = fused_on_cpu(
            *tensors, settings, operator=operator, unit=unit, mask=mask, qk_scale=qk_scale, with_lse=with_lse
        )
        return output.to(value.dtype), lse
    dense, dense_lse, output = joined or (None, None, torch.empty_strided(shape, strides, dtype=value.dtype))
    lse = torch.empty(shape[:3]) if with_lse else None
    if plan.keys == 0 or 0 in shape:
        return output.zero_(), None if lse is None else lse.fill_(-torch.inf)
    numbers = [s if s.dtype is torch.float32 and s.is_cpu else s.to("cpu", torch.float32) for s in settings]
    _library()(
        address,
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        None if mask is None else mask.data_ptr(),
        output.data_ptr(),
        None if lse is None else lse.data_ptr(),
        None if dense is None else dense.data_ptr(),
        None if dense_lse is None else dense_lse.data_ptr(),
        _ADDRESSES[len(numbers)](*[number.data_ptr() for number in numbers]),
    )
    return output, lse


_ADDRESSES = [ctypes.c_void_p * count for count in range(8)]


def joins_on_cpu(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, operator: str, unit: str) -> bool:
    """Whether `fused_on_cpu` takes `joined`: tensors as they are, and a head of an operator at a time."""
    as_they_are = all(new is old for new, old in zip(_for_c(query, key, value), (query, key, value), strict=True))
    return as_they_are and key.shape[2] > 0 and not (operator == "gag" and unit == "token")


def _planned(query, key, value, mask, joined, operator, unit, qk_scale):
    """(plan, its address, output shape, output strides); a plan of None where the tensors have to be copied first."""
    if any(new is not old for new, old in zip(_for_c(query, key, value), (query, key, value), strict=True)):
        return None, None, None, None
    batch, heads, queries, channels = query.shape
    shape = (batch, heads, queries, value.shape[3])
    # As empty_outputs lays it out: (batch, queries, heads, head_dim), transposed.
    row = max(1, shape[3])
    strides = (row * max(1, heads) * max(1, queries), row, row * max(1, heads), 1)
    plan = _Plan(
        *(batch, heads, key.shape[1], queries, key.shape[2], channels, value.shape[3]),
        *(stride for tensor in (query, key, value) for stride in tensor.stride()[:3]),
        *((0, 0, 0, 0) if mask is None else mask.expand(batch, heads, queries, key.shape[2]).stride()),
        *(joined[2].stride() if joined else strides)[:3],
        *((*joined[0].stride()[:3], *joined[1].stride()) if joined else (0,) * 6),
        qk_scale,
        kind=OPERATORS[operator].code,
        whole_token=operator == "gag" and unit == "token",
        steps=4 * newton_steps(key.shape[2]),  # it stops when it is there: no row is known that needs half as many
        threads=torch.get_num_threads(),
        dtype=_DTYPES_IN_C.index(query.dtype),
        mask_kind=0 if mask is None else 1 if mask.dtype == torch.bool else 2,
    )
    return plan, ctypes.addressof(plan), shape, strides


def _for_c(*tensors):
    """The tensors in a form that the kernel reads: of one dtype, each with its channels side by side."""
    if len({tensor.dtype for tensor in tensors}) > 1:
        tensors = [tensor.float() for tensor in tensors]
    return [t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous() for t in tensors]
