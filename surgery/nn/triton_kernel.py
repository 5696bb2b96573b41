"""The fused operators on GPUs: one Triton kernel from query, key and value to the output.

A program holds one block of queries of one head: it reads Q, K and V, keeps the scores in registers, solves for the
entmax threshold by Newton's method on them (entmax.py; alpha is read from memory, so one compiled kernel serves every
alpha), combines the maps, multiplies with V and writes the output. All keys are one tile, up to 512 of them; a longer
text takes the blocked form. Triton is imported at the first call, not before. TRITON_INTERPRET=1 runs the same code
without a GPU.
"""

import functools
import importlib
import importlib.util
import os
import types
from collections.abc import Sequence

import torch
from torch import Tensor

from .entmax import newton_steps
from .operators import OPERATORS
from .reference import empty_outputs, empty_results, no_gradient

# Stands for triton.language until the first call puts that here; the kernels below need no more of it when defined.
tl = types.SimpleNamespace(constexpr="constexpr")

MOST_KEYS = 512
MOST_CHANNELS = 256
_KINDS = {"pladis": 0, "sparse": 1, "anderson": 2, "gag": 3}
_GAG_SUMS, _GAG_ROWS = 4, 5  # gag over whole tokens: first the sums of each head, then the output
_find_spec = functools.cache(importlib.util.find_spec)  # a search of the disk where it fails; asked at every call


def triton_refusal(query, key, value):
    """Why the kernel cannot take these tensors, as one sentence; None if it can."""
    keys, channels = key.shape[2], query.shape[3]
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{query.dtype} is not float32, float16 or bfloat16"
    if not query.dtype == key.dtype == value.dtype:
        return "query, key and value differ in dtype"
    if not 1 <= keys <= MOST_KEYS:
        return f"{keys} keys are not 1 to {MOST_KEYS}"
    if channels > MOST_CHANNELS or value.shape[3] != channels:
        return f"head_dim {channels} and {value.shape[3]} are not the same number up to {MOST_CHANNELS}"
    if not query.is_cuda and not _is_interpreted():
        return f"the tensors are on {query.device}, not on a GPU"
    if not triton_is_ready():
        return "Triton is not installed"
    return None


def tile_sizes(keys, head_dim, dtype):
    """(queries, keys, channels at a time, warps) of a program for this many keys and channels.

    A thread holds 16 scores, 32 beyond 256 keys: the solver keeps four or five numbers for each in registers, and more
    would spill (benchmarks/triton_registers.py shows what the compiler makes of each configuration).
    """
    keys = max(16, 1 << (keys - 1).bit_length())  # tl.dot needs powers of two of at least 16
    rows = 16 if keys > 256 else 32 if keys > 128 or dtype == torch.float32 else 64
    warps = 8 if keys > 256 else min(16, max(4, rows * keys // 512))
    most_channels = 32 if dtype == torch.float32 else 64
    return rows, keys, min(most_channels, max(16, 1 << (head_dim - 1).bit_length())), warps


def fused_by_triton(query, key, value, settings, *, operator, unit, mask, qk_scale, with_lse=False):
    """As `reference`, by the kernel."""
    arguments = (query, key, value, mask, list(settings), operator, unit, qk_scale, with_lse)
    output, lse = torch.ops.pladis.attention_triton_v2(*arguments)
    return output, lse if with_lse else None


def _launch(
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
    kernel = torch.library.wrap_triton(_jitted())
    batch, heads, queries, head_dim = query.shape
    keys = key.shape[2]
    rows, columns, channels, warps = tile_sizes(keys, head_dim, query.dtype)
    output, lse = empty_outputs(query, value, with_lse)
    lse = query.new_empty(0, dtype=torch.float32) if lse is None else lse
    values = {
        name: setting.to(device=query.device, dtype=torch.float32)
        for name, setting in zip(OPERATORS[operator], settings, strict=True)
    }
    more = {"gag": ("zeta", "eta"), "anderson": ("alpha_low", "scale_low")}
    first, second = more.get(operator, ("alpha", "alpha"))  # the others have no more; the pointers are not read
    boolean = mask is not None and mask.dtype == torch.bool
    if mask is not None:
        mask = mask.expand(batch, heads, queries, keys)
        mask = mask.view(torch.uint8) if boolean else mask

    def run(kind, row_sums, row_sparse, row_residual):
        kernel[(batch * heads * -(-queries // rows),)](
            query,
            key,
            value,
            query if mask is None else mask,
            output,
            lse,
            row_sums,
            row_sparse,
            row_residual,
            values["alpha"],
            values.get("scale", values["alpha"]),
            values["temperature"],
            values[first],
            values[second],
            *query.stride(),
            *key.stride(),
            *value.stride(),
            *((0, 0, 0, 0) if mask is None else mask.stride()),
            *output.stride(),
            heads,
            queries,
            keys,
            head_dim,
            qk_scale,
            KIND=kind,
            HAS_MASK=mask is not None,
            BOOLEAN_MASK=boolean,
            HAS_LSE=with_lse,
            STEPS=newton_steps(keys),
            ROWS=rows,
            COLUMNS=columns,
            CHANNELS=channels,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            WIDEN=query.dtype == torch.bfloat16 and _is_interpreted(),
            num_warps=warps,
            num_stages=1,
        )

    if operator != "gag" or unit == "head":
        run(_KINDS[operator], query, query, query)
        return output, lse
    sums = query.new_empty(3, batch, heads, queries, dtype=torch.float32)
    run(_GAG_SUMS, sums, query, query)
    run(_GAG_ROWS, query, *_row_weights(sums.sum(2), values))
    return output, lse


def _row_weights(sums, values):
    """GAG's output is a T_s + b (T_s - T_d) with a and b of each token: (batch, queries) each.

    sums: (3, batch, queries), <r, T_s>, |T_s|^2 and |r|^2 over a whole token. r~ = zeta r + (1 - zeta) c T_s with
    c = <r, T_s> / |T_s|^2, and its parts are orthogonal.
    """
    along, length, square = sums
    share = along / torch.where(length > 0, length, torch.ones_like(length))
    parallel = share * along
    norm = (parallel + values["zeta"] ** 2 * (square - parallel).clamp_min(0.0)).clamp_min(0.0).sqrt()
    gain = values["scale"] * torch.where(norm > values["eta"], values["eta"] / norm, torch.ones_like(norm))
    return (1.0 + gain * share * (1.0 - values["zeta"])).contiguous(), (gain * values["zeta"]).contiguous()


def _attention_tile(
    query,
    key,
    value,
    mask,
    output,
    lse,
    row_sums,
    row_sparse,
    row_residual,
    alpha_pointer,
    scale_pointer,
    temperature_pointer,
    first_pointer,
    second_pointer,
    query_b,
    query_h,
    query_n,
    query_d,
    key_b,
    key_h,
    key_n,
    key_d,
    value_b,
    value_h,
    value_n,
    value_d,
    mask_b,
    mask_h,
    mask_q,
    mask_k,
    output_b,
    output_h,
    output_n,
    output_d,
    heads,
    queries,
    keys,
    head_dim,
    qk_scale,
    KIND: tl.constexpr,  # noqa: N803  Triton's own spelling for what is fixed at compile time
    HAS_MASK: tl.constexpr,  # noqa: N803
    BOOLEAN_MASK: tl.constexpr,  # noqa: N803
    HAS_LSE: tl.constexpr,  # noqa: N803
    STEPS: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    CHANNELS: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
    WIDEN: tl.constexpr,  # noqa: N803
):
    row_blocks = tl.cdiv(queries, ROWS)
    program = tl.program_id(0)
    head_index = program // row_blocks
    batch = (head_index // heads).to(tl.int64)
    head = (head_index % heads).to(tl.int64)
    rows = (program % row_blocks) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    is_row = rows < queries
    is_key = columns < keys
    row_index = head_index.to(tl.int64) * queries + rows  # of (batch, heads, queries)
    long_rows = rows.to(tl.int64)
    query_rows = query + batch * query_b + head * query_h + long_rows[:, None] * query_n
    key_rows = key + batch * key_b + head * key_h + columns[None, :] * key_n
    value_rows = value + batch * value_b + head * value_h + columns[:, None] * value_n
    output_rows = output + batch * output_b + head * output_h + long_rows[:, None] * output_n

    scores = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, head_dim, CHANNELS):
        channels = start + tl.arange(0, CHANNELS)
        is_channel = channels < head_dim
        q = tl.load(query_rows + channels[None, :] * query_d, mask=is_row[:, None] & is_channel[None, :], other=0.0)
        k = tl.load(key_rows + channels[:, None] * key_d, mask=is_channel[:, None] & is_key[None, :], other=0.0)
        scores += _product_tile(q, k, PRECISION, WIDEN)
    scores = scores * qk_scale
    if HAS_MASK:
        masking = tl.load(
            mask + batch * mask_b + head * mask_h + long_rows[:, None] * mask_q + columns[None, :] * mask_k,
            mask=is_row[:, None] & is_key[None, :],
            other=0,
        )
        if BOOLEAN_MASK:  # noqa: SIM108
            scores = tl.where(masking != 0, scores, float("-inf"))
        else:
            scores = scores + masking.to(tl.float32)
    # What overflows upwards counts as the largest float32, so that inf - inf never makes a NaN.
    scores = tl.where(is_key[None, :], tl.minimum(scores, 3.4028234e38), float("-inf"))
    top = tl.max(scores, 1)
    top = tl.where(top == float("-inf"), 0.0, top)
    temperature = tl.load(temperature_pointer)
    scores = scores - top[:, None]
    if HAS_LSE:
        total = tl.sum(tl.exp(scores), 1)
        row_lse = tl.where(total > 0.0, top + tl.log(tl.maximum(total, 1.0)), float("-inf"))
        tl.store(lse + row_index, row_lse, mask=is_row)
    scores = scores / temperature
    dense = tl.exp(scores)
    dense = dense / tl.maximum(tl.sum(dense, 1), 1.0)[:, None]
    sparse = _entmax_tile(scores, tl.load(alpha_pointer), STEPS)

    if KIND == 1:
        weights = sparse
    elif KIND >= 3:
        residual = sparse - dense  # GAG works with T_s and T_s - T_d
        if KIND == 5:
            at = batch * queries + rows
            of_sparse = tl.load(row_sparse + at, mask=is_row, other=0.0)
            of_residual = tl.load(row_residual + at, mask=is_row, other=0.0)
        else:
            along = tl.zeros((ROWS,), dtype=tl.float32)
            length = tl.zeros((ROWS,), dtype=tl.float32)
            square = tl.zeros((ROWS,), dtype=tl.float32)
            for start in range(0, head_dim, CHANNELS):
                channels = start + tl.arange(0, CHANNELS)
                is_channel = channels < head_dim
                v = tl.load(
                    value_rows + channels[None, :] * value_d, mask=is_key[:, None] & is_channel[None, :], other=0.0
                )
                t_sparse = _product_tile(sparse.to(v.dtype), v, PRECISION, WIDEN)
                t_residual = _product_tile(residual.to(v.dtype), v, PRECISION, WIDEN)
                along += tl.sum(t_sparse * t_residual, 1)
                length += tl.sum(t_sparse * t_sparse, 1)
                square += tl.sum(t_residual * t_residual, 1)
            if KIND == 4:
                plane = tl.num_programs(0).to(tl.int64) // row_blocks * queries
                tl.store(row_sums + row_index, along, mask=is_row)
                tl.store(row_sums + plane + row_index, length, mask=is_row)
                tl.store(row_sums + 2 * plane + row_index, square, mask=is_row)
            else:
                # As _row_weights: the output is of_sparse T_s + of_residual (T_s - T_d).
                share = along / tl.where(length > 0.0, length, 1.0)
                zeta = tl.load(first_pointer)
                parallel = share * along
                norm = tl.sqrt(tl.maximum(parallel + zeta * zeta * tl.maximum(square - parallel, 0.0), 0.0))
                eta = tl.load(second_pointer)
                gain = tl.load(scale_pointer) * tl.where(norm > eta, eta / tl.where(norm > eta, norm, 1.0), 1.0)
                of_sparse = 1.0 + gain * share * (1.0 - zeta)
                of_residual = gain * zeta
        if KIND != 4:
            weights = of_sparse[:, None] * sparse + of_residual[:, None] * residual
    else:
        weights = dense + tl.load(scale_pointer) * (sparse - dense)
        if KIND == 2:
            low = _entmax_tile(scores, tl.load(first_pointer), STEPS)
            weights = weights + tl.load(second_pointer) * (low - dense)

    if KIND != 4:
        for start in range(0, head_dim, CHANNELS):
            channels = start + tl.arange(0, CHANNELS)
            is_channel = channels < head_dim
            v = tl.load(value_rows + channels[None, :] * value_d, mask=is_key[:, None] & is_channel[None, :], other=0.0)
            result = _product_tile(weights.to(v.dtype), v, PRECISION, WIDEN)
            tl.store(
                output_rows + channels[None, :] * output_d,
                result.to(output.dtype.element_ty),
                mask=is_row[:, None] & is_channel[None, :],
            )


def _product_tile(left, right, PRECISION: tl.constexpr, WIDEN: tl.constexpr):  # noqa: N803
    """left @ right in float32. WIDEN: through float32 operands, since Triton's interpreter cannot multiply bfloat16."""
    if WIDEN:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, input_precision=PRECISION)


def _entmax_tile(shifted, alpha, STEPS: tl.constexpr):  # noqa: N803
    """entmax.py's solver on a tile (rows, keys) of max-shifted scores in registers."""
    alpha_minus_1 = tl.maximum(alpha - 1.0, 1.1920929e-07)
    r = 1.0 / alpha_minus_1
    x = shifted * alpha_minus_1
    lift = tl.zeros_like(tl.max(x, 1))
    for _ in range(STEPS):
        depth = x - lift[:, None]
        power = _power_tile(depth, r - 1.0)
        total = tl.maximum(tl.sum(power * tl.maximum(1.0 + depth, 0.0), 1), 1.0)
        norm = tl.exp(tl.log(total) * alpha_minus_1)
        lift = lift + (norm - 1.0) * total / norm / tl.maximum(tl.sum(power, 1), 1.0)
    depth = x - lift[:, None]
    power = _power_tile(depth, r - 1.0)
    base = tl.maximum(1.0 + depth, 0.0)
    slope = tl.sum(power, 1)
    # The last Newton step is taken in the weights: what is left of the residual is the threshold's own rounding.
    correction = (1.0 - tl.sum(power * base, 1)) / tl.where(slope > 0.0, slope, 1.0)
    return tl.maximum(power * (base + correction[:, None]), 0.0)


def _power_tile(depth, r_minus_1):
    """`(1 + depth)^(r-1)`, zero where depth <= -1; whole exponents without the power function."""
    base = tl.maximum(1.0 + depth, 0.0)
    if r_minus_1 == 1.0:  # alpha = 1.5
        power = base
    elif r_minus_1 == 0.0:  # alpha = 2
        power = tl.where(base > 0.0, 1.0, 0.0)
    elif r_minus_1 == 3.0:  # alpha = 1.25
        power = base * base * base
    else:
        # log1p(depth): what rounding lost in 1 + depth is put back to first order, or alpha near 1 would lose all.
        inside = tl.maximum(base, 1.1754944e-38)
        lost = tl.where(base > 0.0, depth - (inside - 1.0), 0.0)
        power = tl.where(base > 0.0, tl.exp(r_minus_1 * (tl.log(inside) + lost * (2.0 - inside))), 0.0)
    return power


def triton_is_ready():
    """Whether Triton is installed; if so, the operator is registered from here on.

    torch.compile and AOTInductor take the kernel out of that operator, torch.export keeps it whole. Not at import:
    torch.library.triton_op imports torch's compiler and Triton, which takes seconds.
    """
    if _find_spec("triton") is None:
        return False
    if not hasattr(torch.ops.pladis, "attention_triton_v2"):  # another copy of this file may have registered it
        operator = torch.library.triton_op("pladis::attention_triton_v2", _launch, mutates_args=())
        operator.register_fake(empty_results)
        operator.register_autograd(no_gradient)
    return True


# What torch.compiler.assume_constant_result sets; that function itself would import the compiler here and now.
triton_is_ready._dynamo_marked_constant = True


def _is_interpreted():
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _jitted():
    """The kernel, compiled by Triton at its first launch for a shape."""
    triton = importlib.import_module("triton")
    names = globals()
    names["tl"] = importlib.import_module("triton.language")
    for name in ("_power_tile", "_entmax_tile", "_product_tile"):  # the kernel finds these under their names
        names[name] = triton.jit(names[name])
    return triton.jit(_attention_tile)
