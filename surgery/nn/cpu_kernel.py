"""The fused operators on CPUs: one C++ kernel from query, key and value to the output.

Its source (cpu_source.py) is compiled once by the machine's own C++ compiler through torch, which keeps the result on
disk. Where there is none, `compiler_is_available` is False and the blocked torch form is used.
"""

import ctypes
import functools
import platform
import warnings

import torch

from .cpu_source import CPU_SOURCE
from .entmax import newton_steps
from .operators import OPERATORS
from .reference import empty_outputs

WORTH_COMPILING = 1 << 14  # scores in a call: under that, plain torch is about as fast; SD1.5 has only larger layers


@functools.cache
def compiler_is_available():
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


@functools.cache
def _library():
    # torch's own compile cache, which inductor uses for its CPU code: keyed by source, flags and machine.
    from torch._inductor.codecache import CppCodeCache

    flags = []
    if platform.system() != "Windows":
        # inductor vectorises by hand and tells the compiler not to; this source is written for the compiler to do it.
        flags = ["-ftree-loop-vectorize", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
        if platform.machine() in ("x86_64", "AMD64"):
            flags.append("-mprefer-vector-width=512")
    library = CppCodeCache.load(CPU_SOURCE, extra_flags=tuple(flags))
    library.pladis_attention.argtypes = [ctypes.c_void_p]
    library.pladis_attention.restype = None
    return library


class _Call(ctypes.Structure):
    """The C++ source's struct Call."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "mask", "output", "lse")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "queries", "keys", "channels", "value_channels")),
        *((f"{tensor}_{dim}", ctypes.c_int64) for tensor in ("query", "key", "value") for dim in "bhn"),
        *((f"mask_{dim}", ctypes.c_int64) for dim in "bhqk"),
        *((f"output_{dim}", ctypes.c_int64) for dim in "bhn"),
        ("qk_scale", ctypes.c_float),
        *((n, ctypes.c_float) for n in ("alpha", "scale", "temperature", "zeta", "eta", "alpha_low", "scale_low")),
        *((name, ctypes.c_int32) for name in ("kind", "whole_token", "steps", "threads")),
    ]


_KINDS_IN_C = ("pladis", "sparse", "anderson", "gag")


def fused_on_cpu(query, key, value, settings, *, operator, unit, mask, qk_scale, with_lse=False):
    """As `reference`, with nothing beyond the output in memory. float32; float16 and bfloat16 by way of float32."""
    numbers = {name: float(setting) for name, setting in zip(OPERATORS[operator], settings, strict=True)}
    output, lse = empty_outputs(query, value, with_lse)
    batch, heads, queries, channels = query.shape
    if output.numel() == 0 or key.shape[2] == 0:
        return output.zero_(), None if lse is None else lse.fill_(-torch.inf)
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
        mask = mask.float().expand(batch, heads, queries, key.shape[2])
    # A batch entry at a time where a dtype has to be converted, so that a copy of a part is all that is held.
    entries = [slice(None)] if query.dtype == torch.float32 else [slice(i, i + 1) for i in range(batch)]
    for entry in entries:
        parts = [_with_channels_last(tensor[entry].float()) for tensor in (query, key, value)]
        part = output[entry] if output.dtype == torch.float32 else empty_outputs(parts[0], parts[2], False)[0]
        call = _Call(
            *(tensor.data_ptr() for tensor in parts),
            None if mask is None else mask[entry].data_ptr(),
            part.data_ptr(),
            None if lse is None else lse[entry].data_ptr(),
            *(part.shape[0], heads, queries, key.shape[2], channels, value.shape[3]),
            *(stride for tensor in parts for stride in tensor.stride()[:3]),
            *((0, 0, 0, 0) if mask is None else mask.stride()),
            *part.stride()[:3],
            qk_scale,
            *(numbers.get(name, 0.0) for name in ("alpha", "scale", "temperature", "zeta", "eta")),
            *(numbers.get(name, 0.0) for name in ("alpha_low", "scale_low")),
            kind=_KINDS_IN_C.index(operator),
            whole_token=operator == "gag" and unit == "token",
            steps=newton_steps(key.shape[2]),
            threads=torch.get_num_threads(),
        )
        _library().pladis_attention(ctypes.byref(call))
        if part.dtype != output.dtype:
            output[entry] = part
    return output, lse


def _with_channels_last(tensor):
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
