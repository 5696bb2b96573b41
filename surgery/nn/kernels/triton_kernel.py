"""The fused operators on GPUs: which of two Triton kernels, with which tiles, and how they are launched.

Up to 128 keys take the short kernel, more the long one, and there is no most. alpha, like every hyperparameter, is read
from memory by the kernel: one compiled kernel serves every value, and a value that changes between two replays of a
CUDA graph acts. What is fixed when a kernel is compiled are tiles, dtype, operator and kind of mask.

Eager calls launch directly and keep what they found out about a shape; torch.library's operator is for what traces.
Triton is imported at the first call, not before. TRITON_INTERPRET=1 runs the same code without a GPU.
"""

import contextlib
import functools
import importlib
import importlib.util
import operator as operators
import os
import types
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..compat import set_constant
from ..operators import OPERATORS, OperatorName, Unit
from .combined import from_outputs, is_combined
from .reference import empty_outputs, empty_results, no_gradient
from .triton_long import MOST_HELD_KEYS, long_kernel
from .triton_short import MOST_SHORT_KEYS, short_kernel
from .triton_tiles import TILE_FUNCTIONS

MOST_CHANNELS = 256
MOST_HEADS = 65535  # of a grid's second and third dimension
_CODES = {name: operator.code for name, operator in OPERATORS.items()}  # the kernels' OPERATOR
_GAG_SUMS, _GAG_ROWS = 4, 5  # gag over whole tokens: first the sums of each head, then the output
_MORE_OF = {"gag": ("zeta", "eta"), "anderson": ("alpha_low", "scale_low")}  # what two of their arguments are
_BITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}
_MOST_LAUNCHES = 1024  # that are kept: a few for each shape that a process meets
_find_spec = functools.cache(importlib.util.find_spec)  # a search of the disk where it fails; asked at every call


def triton_refusal(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why the kernels cannot take these tensors, as one sentence; None if they can."""
    batch, heads, _, channels = query.shape
    if query.dtype not in _BITS:
        return f"{query.dtype} is not float32, float16 or bfloat16"
    if not query.dtype == key.dtype == value.dtype:
        return "query, key and value differ in dtype"
    if key.shape[2] == 0:
        return "there are no keys"
    if channels > MOST_CHANNELS or value.shape[3] != channels:
        return f"head_dim {channels} and {value.shape[3]} are not the same number up to {MOST_CHANNELS}"
    if any(isinstance(n, int) and n > MOST_HEADS for n in (batch, heads)):
        return f"a batch of {batch} with {heads} heads is more than {MOST_HEADS} of one"
    if not query.is_cuda and not _is_interpreted():
        return f"the tensors are on {query.device}, not on a GPU"
    if not triton_is_ready():
        return "Triton is not installed"
    return None


def tiles_of(
    keys: int,
    head_dim: int,
    dtype: torch.dtype,
    code: int,
    short: bool,
    mask_rows: bool = False,
    capability: int = 9,
    traced: bool = False,
) -> tuple[dict[str, int], int, int]:
    """(tile sizes, warps, stages) of a program: a block of rows and all keys where `short`, or W of them at a time.

    code: the kernels' OPERATOR. mask_rows: that there is a mask with rows of its own. capability: the GPU's major
    compute capability. traced: for a graph. benchmarks/triton_registers.py shows what the compiler makes of each; in
    half precision none spills. No program of 64 rows has 8 warps: with tiles 16 wide Triton 3.6 then reads shared
    memory out of bounds.
    """
    exact = dtype == torch.float32
    d0, d1 = _in_two(head_dim, (16, 32, 48, 64, 80, 128, 160, 256))
    heavy = head_dim > 128 or mask_rows  # more numbers for each row than there are registers for 64 rows
    if short:
        m0, m1 = _in_two(keys, (16, 32, 64, 80, 128))
        few = exact or heavy or (capability < 9 and (keys > 80 or head_dim > 80))
        return {"D0": d0, "D1": d1, "M0": m0, "M1": m1, "ROWS": 32 if few else 64}, 4, 1
    if exact or heavy or capability < 9:
        rows = 16 if code == _CODES["anderson"] and head_dim > 80 else 32
        d0, d1 = _in_two(head_dim, (16, 32, 64, 128, 160, 256))
        return {"D0": d0, "D1": d1, "W": 32, "ROWS": rows, "PAIRS": 0}, 4, 2
    held = code in (_CODES["pladis"], _CODES["sparse"]) and torch.version.hip is None
    # What a kernel writes is found from its code, where inline assembly counts as writing to every tensor.
    held = held and not traced and keys <= MOST_HELD_KEYS
    return {"D0": d0, "D1": d1, "W": 64, "ROWS": 64, "PAIRS": -(-keys // 64) if held else 0}, 4, 3


def _in_two(length, sizes):
    """The smallest of `sizes` that holds `length`, as one or two powers of two, the first of them at most 128."""
    whole = next(size for size in sizes if size >= length)
    first = min(128, 1 << (whole.bit_length() - 1))
    return first, whole - first


def is_short(keys: int, code: int) -> bool:
    """Whether the short kernel takes so many keys. A number that a graph leaves open takes the long one."""
    most = 80 if code == _CODES["anderson"] else MOST_SHORT_KEYS  # three maps at once
    return isinstance(keys, int) and keys <= most


class _Launch:
    """One launch of a kernel: its grid and all of its arguments that are not tensors.

    Those are found from shapes, strides and dtypes, so eager calls of one shape share them, and `direct` with them: how
    Triton launches what it compiled, without looking at every argument again.
    """

    def __init__(self, query, key, value, mask, output, dense, code, qk_scale, with_lse, capability=None, traced=False):
        batch, heads, queries, head_dim = query.shape
        keys = key.shape[2]
        self.short = dense is None and is_short(keys, code)
        mask_rows = mask is not None and mask.stride(2) != 0
        tiles, warps, stages = tiles_of(
            keys, head_dim, query.dtype, code, self.short, mask_rows, capability or _capability(query), traced
        )
        rows = tiles["ROWS"]
        self.grid = (-(-queries // rows), heads, batch)
        read = [query, key, value, output]
        if not self.short:
            read.append(query if dense is None else dense)
        strides = [stride for tensor in read for stride in tensor.stride()[:3]]
        unit = 4 if query.dtype == torch.float32 else 8  # 16 bytes
        unit = unit if all(_divides(unit, stride) for stride in strides) else 1
        mask_strides = (0, 0, 0, 0) if mask is None else mask.stride()
        self.numbers = (*(stride // unit for stride in strides), *mask_strides, queries, keys, qk_scale)
        kind = 0 if mask is None else 1 if mask.dtype == torch.uint8 else 2
        fixed = {
            "UNIT": unit,
            "GROUP": heads // max(1, key.shape[1]),
            "OPERATOR": code,
            "MASKED": kind,
            "MASK_ROWS": mask_rows,
            "SCALED": kind > 0 or qk_scale <= 0.0,  # the largest score is then not that of the largest product
            "WITH_LSE": with_lse,
            "D": head_dim,
            "WHOLE": _divides(rows, queries),
            "TF32X3": query.dtype == torch.float32,
            "HALF_BITS": _BITS[query.dtype],
            **tiles,
        }
        if not self.short:
            fixed["JOINED"] = dense is not None
            fixed["WHOLE_M"] = _divides(tiles["W"], keys)
        self.fixed = {**fixed, "num_warps": warps, "num_stages": stages}
        self.direct, self.tail = None, ()

    def trace(self, tensors: list[Tensor]) -> None:
        """Launch through torch, which puts the launch into the graph that it makes."""
        kernel = torch.library.wrap_triton(jitted_kernels()[0 if self.short else 1])
        kernel[self.grid](*tensors, *self.numbers, **self.fixed)

    def now(self, tensors: list[Tensor]) -> None:
        """Launch. tensors: those that the kernel takes, in its order."""
        pointers = [tensor.data_ptr() for tensor in tensors]
        # What is compiled takes addresses to be multiples of 16 where the first ones were.
        aligned = not functools.reduce(operators.or_, pointers) & 15
        if aligned and self.direct is not None:
            return self.direct(*pointers, *self.tail)
        kernel = jitted_kernels()[0 if self.short else 1]
        compiled = kernel[self.grid](*tensors, *self.numbers, **self.fixed)
        if aligned and compiled is not None:  # interpreted it is None
            self.tail = (*self.numbers, *(self.fixed[name] for name in kernel.arg_names if name in self.fixed))
            self.direct = compiled[self.grid]
        return None


def _capability(tensor):
    """The major compute capability of the tensor's GPU; without one that of an H100."""
    return torch.cuda.get_device_capability(tensor.device)[0] if tensor.is_cuda and torch.cuda.is_available() else 9


def _divides(divisor, number):
    """Whether a number is a multiple of another; of one that a graph leaves open, whether every value is."""
    if isinstance(number, int):
        return number % divisor == 0
    return torch.fx.experimental.symbolic_shapes.statically_known_true(number % divisor == 0)


def _arguments(query, key, value, mask, output, lse, sums, dense, dense_lse, settings, operator, short):
    """All tensors that a kernel takes, in its order; one that is not read is the query."""
    more = [query if tensor is None else tensor for tensor in (mask, output, lse, sums)]
    if not short:
        more += [query if tensor is None else tensor for tensor in (dense, dense_lse)]
    named = dict(zip(OPERATORS[operator].defaults, settings, strict=True))
    first, second = _MORE_OF.get(operator, ("alpha", "alpha"))
    taken = ("alpha", "scale", "temperature", first, second, "sparse_temperature", "parallel")
    return [query, key, value, *more, *(named.get(name, settings[0]) for name in taken)]


def _prepared(query, key, value, mask):
    """The tensors as the kernels read them: channels side by side, a mask of all rows and keys, booleans as bytes."""
    query, key, value = (t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous() for t in (query, key, value))
    if mask is not None:
        mask = _as_bytes(mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2]))
    return query, key, value, mask


def _as_bytes(mask):
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


def _codes(operator, unit):
    return (_GAG_SUMS, _GAG_ROWS) if operator == "gag" and unit == "token" else (_CODES[operator],)


def _sums(query, codes):
    """Uninitialised sums of each head, for gag over whole tokens; None for what has none."""
    return query.new_empty(3, *query.shape[:3], dtype=torch.float32) if _GAG_SUMS in codes else None


def launch_by_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    settings: list[Tensor],
    operator: OperatorName,
    unit: Unit,
    qk_scale: float,
    with_lse: bool,
    dense: Tensor | None = None,
    dense_lse: Tensor | None = None,
    output: Tensor | None = None,
    wanted: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(output, log-sum-exp or None) by a kernel, launched here and now, of tensors that `triton_refusal` passes.

    dense, dense_lse: attention of the same queries to other keys, (batch, heads, queries, head_dim), and its
    log-sum-exp, float32 and contiguous; the output is then attention to both, as joint attention has it (joint.py).
    output: where to write instead of a tensor of its own, its channels side by side; then without a log-sum-exp.
    wanted: the dtype of its own, value's unless given.
    """
    if query.numel() == 0:
        return empty_outputs(query, value, with_lse, wanted)
    if is_combined(operator, unit):

        def run(numbers, with_lse):
            how = ("sparse", "head", qk_scale, with_lse)
            return launch_by_triton(query, key, value, mask, numbers, *how, wanted=torch.float32)

        output, lse = from_outputs(run, query, settings, operator, unit, with_lse)
        return output.to(value.dtype), lse
    query, key, value, mask = _prepared(query, key, value, mask)
    device = query.device
    settings = [
        s if s.dtype is torch.float32 and s.device == device else s.to(device=device, dtype=torch.float32)
        for s in settings
    ]
    codes = _codes(operator, unit)
    lse = None
    if output is None:
        output, lse = empty_outputs(query, value, with_lse, wanted)
    sums = _sums(query, codes)
    found = (
        query.shape,
        query.stride(),
        key.shape,
        key.stride(),
        value.stride(),
        query.dtype,
        device,
        None if mask is None else (mask.stride(), mask.dtype),
        output.stride(),
        output.dtype,
        None if dense is None else dense.stride(),
        operator,
        unit,
        qk_scale,
        with_lse,
    )
    launches = _LAUNCHES.get(found)
    if launches is None:
        if len(_LAUNCHES) >= _MOST_LAUNCHES:
            _LAUNCHES.clear()
        launches = _LAUNCHES[found] = [
            _Launch(query, key, value, mask, output, dense, code, qk_scale, with_lse) for code in codes
        ]
    with _on_device_of(query):
        for launch in launches:
            launch.now(
                _arguments(
                    query, key, value, mask, output, lse, sums, dense, dense_lse, settings, operator, launch.short
                )
            )
    return output, lse


_LAUNCHES = {}


def _on_device_of(tensor):
    """A context in which the tensor's GPU is the current one, which is where Triton launches."""
    if not tensor.is_cuda or torch.cuda.current_device() == tensor.device.index:
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def fused_by_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    settings: list[Tensor],
    *,
    operator: OperatorName,
    unit: Unit,
    mask: Tensor | None,
    qk_scale: float,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As `reference`, by a kernel, as one node of a graph."""
    arguments = (query, key, value, mask, list(settings), operator, unit, qk_scale, with_lse)
    output, lse = torch.ops.pladis.attention_triton_v5(*arguments)
    return output, lse if with_lse else None


def _traced(
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
    # The kernel gets the mask as it is, not expanded: inductor may lay an expanded tensor out anew, and by then the
    # kernel has its strides.
    given = mask if mask is None else _as_bytes(mask.contiguous())
    query, key, value, mask = _prepared(query, key, value, given)
    settings = [setting.to(device=query.device, dtype=torch.float32) for setting in settings]

    def run(operator, unit, settings, with_lse, wanted=None):
        codes = _codes(operator, unit)
        output, lse = empty_outputs(query, value, with_lse, wanted)
        sums = _sums(query, codes)
        more = (given, output, lse, sums, None, None, settings, operator)
        for code in codes:
            launch = _Launch(query, key, value, mask, output, None, code, qk_scale, with_lse, traced=True)
            launch.trace(_arguments(query, key, value, *more, launch.short))
        return output, lse

    if is_combined(operator, unit):
        part = functools.partial(run, "sparse", "head", wanted=torch.float32)
        whole, lse = from_outputs(part, query, settings, operator, unit, with_lse)
        output = empty_outputs(query, value, False)[0].copy_(whole)
    else:
        output, lse = run(operator, unit, settings, with_lse)
    return output, query.new_empty(0, dtype=torch.float32) if lse is None else lse


@set_constant
def triton_is_ready() -> bool:
    """Whether Triton is installed; if so, the operator is registered from here on.

    torch.compile and AOTInductor take the kernel out of that operator, torch.export keeps it whole. Not at import:
    torch.library.triton_op imports torch's compiler and Triton, which takes seconds.
    """
    if _find_spec("triton") is None:
        return False
    if not hasattr(torch.ops.pladis, "attention_triton_v5"):  # another copy of this file may have registered it
        operator = torch.library.triton_op("pladis::attention_triton_v5", _traced, mutates_args=())
        operator.register_fake(empty_results)
        operator.register_autograd(no_gradient)
    return True


def _is_interpreted():
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def jitted_kernels() -> tuple[Callable, Callable]:
    """(short, long): the kernels as Triton's, each compiled at its first launch for a kind of arguments.

    Every function of the tiles becomes Triton's under the name by which the others of its module find it.
    """
    triton = importlib.import_module("triton")
    language = importlib.import_module("triton.language")
    libdevice = importlib.import_module("triton.language.extra.libdevice")
    made = {function: triton.jit(function) for function in TILE_FUNCTIONS}
    for names in {id(function.__globals__): function.__globals__ for function in TILE_FUNCTIONS}.values():
        names.update(tl=language, libdevice=libdevice, INTERPRETED=language.constexpr(_is_interpreted()))
        names.update({name: made[value] for name, value in names.items() if _is_made(value, made)})
    return made[short_kernel], made[long_kernel]


def _is_made(value, made):
    return isinstance(value, types.FunctionType) and value in made
