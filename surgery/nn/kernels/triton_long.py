"""The Triton kernel for texts of any length, over tiles of their keys.

It goes over the keys once for the largest score and the sum of exponentials, once for each step of the solver and once
for the output. Up to 320 keys in half precision the scores of the first pass are kept (PAIRS); else it keeps none, as
flash attention, and computes them again on the tensor cores. Where the output is one product (all operators but GAG)
the sparse weights are t^r plus a share of t^(r-1) that makes their sum one, by the sums of the last step: a Newton step
in the weights, so no pass is spent on their sum.

In joint attention (JOINED) the kernel also takes the dense attention of the same rows to the other keys, and mixes it
with its own by their log-sum-exps while its output is still in registers.
"""

from .triton_held import held_rows
from .triton_solver import (
    exponents_of,
    lse_of_rows,
    pass_tile,
    scores_of_tile,
    share_of_rows,
    shifted_tile,
    sparse_long,
    store_rows,
    weights_of_tile,
)
from .triton_tiles import (
    dot_tiles,
    fast_reciprocal,
    geometry_of_sums,
    load_tile,
    store_sums,
    sums_of_tokens,
    tile_function,
    tl,
)

MOST_HELD_KEYS = 320


@tile_function
def product_long(w, value, value_n, at, keys, out0, out1, sizes: tl.constexpr):
    """Weights of the W keys from `at` on, times their values, added to both tiles of the output."""
    D: tl.constexpr = sizes[0]
    D0: tl.constexpr = sizes[1]
    D1: tl.constexpr = sizes[2]
    W: tl.constexpr = sizes[3]
    WHOLE_M: tl.constexpr = sizes[4]
    TF32X3: tl.constexpr = sizes[8]
    m = tl.arange(0, W)
    value += tl.cast(at, tl.int64) * value_n
    v0 = load_tile(value, m, tl.arange(0, D0), value_n, 1, keys - at, D, WHOLE_M, D0 <= D)
    out0 = dot_tiles(w, v0, out0, TF32X3)
    if D1 > 0:
        v1 = load_tile(value, m, D0 + tl.arange(0, D1), value_n, 1, keys - at, D, WHOLE_M, D0 + D1 <= D)
        out1 = dot_tiles(w, v1, out1, TF32X3)
    return out0, out1


@tile_function
def gag_of_tile(
    x,
    back,
    maps,
    value,
    value_n,
    at,
    keys,
    out0,
    out1,
    residual0,
    residual1,
    sparse_sum,
    like,
    sizes: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Both maps of a tile times its values, not normed, and the sparse map's sum so far. back: as in `stream_rows`."""
    tau, alpha, r, unit = maps
    g, p = weights_of_tile(x, tau, alpha, r, unit, EXACT)
    sparse_sum += tl.sum(p, 1)
    out0, out1 = product_long(p.to(like), value, value_n, at, keys, out0, out1, sizes)
    e = tl.exp2(x * back[:, None]).to(like)
    residual0, residual1 = product_long(e, value, value_n, at, keys, residual0, residual1, sizes)
    return out0, out1, residual0, residual1, sparse_sum


@tile_function
def mix_of_tile(
    x,
    back,
    of_dense,
    maps,
    low_maps,
    value,
    value_n,
    at,
    keys,
    out0,
    out1,
    like,
    sizes: tl.constexpr,
    EXACT: tl.constexpr,
    ANDERSON: tl.constexpr,
):
    """One product of a tile's mixed maps with its values, added to the output. back: as in `stream_rows`."""
    tau, alpha, r, unit, of_power, of_slope = maps
    g, p = weights_of_tile(x, tau, alpha, r, unit, EXACT)
    w = tl.exp2(x * back[:, None]) * of_dense[:, None] + p * of_power[:, None] + g * of_slope[:, None]
    if ANDERSON:
        tau, alpha, r, unit, of_power, of_slope = low_maps
        g, p = weights_of_tile(x, tau, alpha, r, unit, EXACT)
        w = w + p * of_power[:, None] + g * of_slope[:, None]
    return product_long(w.to(like), value, value_n, at, keys, out0, out1, sizes)


@tile_function
def stream_rows(
    held,
    sizes: tl.constexpr,
    places,
    numbers,
    rest,
    like: tl.constexpr,
    OPERATOR: tl.constexpr,
    WHOLE: tl.constexpr,
    WITH_LSE: tl.constexpr,
    JOINED: tl.constexpr,
    HALF_BITS: tl.constexpr,
):
    """A block of rows from scores to output, keeping no scores."""
    D: tl.constexpr = sizes[0]
    D0: tl.constexpr = sizes[1]
    D1: tl.constexpr = sizes[2]
    W: tl.constexpr = sizes[3]
    SCALED: tl.constexpr = sizes[7]
    MORE: tl.constexpr = D1 > 0
    GAG: tl.constexpr = OPERATOR >= 3
    EXACT: tl.constexpr = HALF_BITS == 24
    ROWS: tl.constexpr = held[0].shape[0]
    to_log2, temperature, qk_scale, scale = numbers
    alpha, sparse_temperature, sums, first_at, second_at, parallel_at, batch, first, queries = rest
    value = places[0]
    value_n = places[1]
    rows = held[7]
    left = held[8]
    keys = held[9]
    over_temperature = to_log2 / temperature
    r, unit = exponents_of(alpha, EXACT)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    dense_sum = tl.zeros((ROWS,), tl.float32)
    lse_sum = tl.zeros((ROWS,), tl.float32)
    for at in tl.range(0, keys, W):
        z = scores_of_tile(held, sizes, at)
        top, safe, x, dense_sum, lse_sum = pass_tile(
            z, top, dense_sum, lse_sum, over_temperature, to_log2, temperature, WITH_LSE or JOINED
        )
    top = tl.where(top == float("-inf"), 0.0, top)
    own_lse = lse_of_rows(top, lse_sum, dense_sum, temperature, qk_scale, SCALED, WITH_LSE or JOINED)
    dense_sum = tl.where(dense_sum == 0.0, 1.0, dense_sum)  # zeros where a row has no key
    out0 = tl.zeros((ROWS, D0), tl.float32)
    out1 = tl.zeros((ROWS, D1 if MORE else D0), tl.float32)
    # Where scores over temperature are huge their differences are below rounding: the product must not overflow.
    most = 1048576.0 / tl.maximum(tl.abs(top), 1e-30)
    # x is of the sparse map's own temperature from here on; times `back` it is that of the dense one.
    sharpness = tl.minimum(over_temperature / sparse_temperature, most)
    back = tl.minimum(over_temperature, most) / sharpness
    shift = top * sharpness

    sharp_sum = dense_sum
    if sparse_temperature != 1.0:
        sharp_sum = tl.zeros_like(dense_sum)
        for at in tl.range(0, keys, W):
            sharp_sum += tl.sum(tl.exp2(shifted_tile(held, sizes, at, sharpness, shift)), 1)
        sharp_sum = tl.where(sharp_sum == 0.0, 1.0, sharp_sum)
    if OPERATOR > 0 or scale != 0.0:
        tau, of_power, of_slope = sparse_long(
            held, sizes, sharpness, shift, sharp_sum, alpha, r, unit, not GAG, HALF_BITS
        )
    else:  # dense attention alone: nothing to solve
        tau = tl.zeros_like(shift)
        of_power = tl.zeros_like(shift)
        of_slope = tl.zeros_like(shift)
    if GAG:
        residual0 = out0
        residual1 = out1
        sparse_sum = tl.zeros((ROWS,), tl.float32)
        maps = (tau, alpha, r, unit)
        for at in tl.range(0, keys, W):
            x = shifted_tile(held, sizes, at, sharpness, shift)
            out0, out1, residual0, residual1, sparse_sum = gag_of_tile(
                x,
                back,
                maps,
                value,
                value_n,
                at,
                keys,
                out0,
                out1,
                residual0,
                residual1,
                sparse_sum,
                like,
                sizes,
                EXACT,
            )
        sparse_sum = tl.where(sparse_sum == 0.0, 1.0, sparse_sum)
        over_sparse = fast_reciprocal(sparse_sum)[:, None]
        over_dense = fast_reciprocal(dense_sum)[:, None]
        out0 = out0 * over_sparse  # T_s
        residual0 = out0 - residual0 * over_dense  # T_s - T_d
        along = tl.sum(out0 * residual0, 1)
        length = tl.sum(out0 * out0, 1)
        square = tl.sum(residual0 * residual0, 1)
        if MORE:
            out1 = out1 * over_sparse
            residual1 = out1 - residual1 * over_dense
            along += tl.sum(out1 * residual1, 1)
            length += tl.sum(out1 * out1, 1)
            square += tl.sum(residual1 * residual1, 1)
        if OPERATOR == 4:
            store_sums(sums, batch, first + rows, rows < left, queries, along, length, square)
        else:
            if OPERATOR == 5:  # over whole tokens: all heads' sums, found before
                along, length, square = sums_of_tokens(sums, batch, first + rows, rows < left, queries, ROWS)
            of_sparse, of_residual = geometry_of_sums(
                along, length, square, scale, tl.load(first_at), tl.load(second_at), tl.load(parallel_at)
            )
            out0 = out0 * of_sparse[:, None] + residual0 * of_residual[:, None]
            if MORE:
                out1 = out1 * of_sparse[:, None] + residual1 * of_residual[:, None]
    else:
        of_dense = 1.0 - scale
        maps = (tau, alpha, r, unit, of_power * scale, of_slope * scale)
        low_maps = maps
        if OPERATOR == 2:  # anderson
            alpha_low = tl.load(first_at)
            r_low, unit_low = exponents_of(alpha_low, EXACT)
            tau_low, power_low, slope_low = sparse_long(
                held, sizes, sharpness, shift, sharp_sum, alpha_low, r_low, unit_low, True, HALF_BITS
            )
            scale_low = tl.load(second_at)
            of_dense = of_dense - scale_low
            low_maps = (tau_low, alpha_low, r_low, unit_low, power_low * scale_low, slope_low * scale_low)
        of_dense = of_dense / dense_sum
        for at in tl.range(0, keys, W):
            x = shifted_tile(held, sizes, at, sharpness, shift)
            out0, out1 = mix_of_tile(
                x,
                back,
                of_dense,
                maps,
                low_maps,
                value,
                value_n,
                at,
                keys,
                out0,
                out1,
                like,
                sizes,
                EXACT,
                OPERATOR == 2,
            )
    if OPERATOR != 4:
        share = share_of_rows(places, own_lse, held, WITH_LSE, JOINED)
        store_rows(places, out0, tl.arange(0, D0), share, held, D, WHOLE, D0 <= D, JOINED)
        if MORE:
            store_rows(places, out1, D0 + tl.arange(0, D1), share, held, D, WHOLE, D0 + D1 <= D, JOINED)


@tile_function
def long_kernel(
    query,
    key,
    value,
    mask,
    output,
    lse,
    sums,
    dense,
    dense_lse,
    alpha_at,
    scale_at,
    temperature_at,
    first_at,
    second_at,
    sparse_temperature_at,
    parallel_at,
    query_b,
    query_h,
    query_n,
    key_b,
    key_h,
    key_n,
    value_b,
    value_h,
    value_n,
    output_b,
    output_h,
    output_n,
    dense_b,
    dense_h,
    dense_n,
    mask_b,
    mask_h,
    mask_n,
    mask_k,
    queries,
    keys,
    qk_scale,
    UNIT: tl.constexpr,
    GROUP: tl.constexpr,
    OPERATOR: tl.constexpr,
    MASKED: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    SCALED: tl.constexpr,
    WITH_LSE: tl.constexpr,
    JOINED: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    WHOLE: tl.constexpr,
    WHOLE_M: tl.constexpr,
    TF32X3: tl.constexpr,
    HALF_BITS: tl.constexpr,
):
    MORE: tl.constexpr = D1 > 0
    C0: tl.constexpr = D0 <= D
    C1: tl.constexpr = D0 + D1 <= D
    like: tl.constexpr = query.dtype.element_ty
    batch = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    key_head = head // GROUP  # heads in a row share one of keys
    start = tl.program_id(0) * ROWS
    first = start.to(tl.int64)
    rows = tl.arange(0, ROWS)
    left = queries - start
    # Strides count UNITs of elements, so that the compiler sees that addresses allow wide loads.
    query_n = query_n * UNIT
    key_n = key_n * UNIT
    value_n = value_n * UNIT
    output_n = output_n * UNIT
    query += batch * (query_b * UNIT) + head * (query_h * UNIT) + first * query_n
    key += batch * (key_b * UNIT) + key_head * (key_h * UNIT)
    value += batch * (value_b * UNIT) + key_head * (value_h * UNIT)
    output += batch * (output_b * UNIT) + head * (output_h * UNIT) + first * output_n
    dense_n = dense_n * UNIT
    dense += batch * (dense_b * UNIT) + head * (dense_h * UNIT) + first * dense_n
    lse += (batch * tl.num_programs(1) + head) * queries + first  # of (batch, heads, queries)
    dense_lse += (batch * tl.num_programs(1) + head) * queries + first
    if MASKED > 0:
        mask += batch * mask_b + head * mask_h + first * mask_n
    d0 = tl.arange(0, D0)
    d1 = D0 + tl.arange(0, D1 if MORE else D0)
    q0 = load_tile(query, rows, d0, query_n, 1, left, D, WHOLE, C0)
    q1 = q0
    if MORE:
        q1 = load_tile(query, rows, d1, query_n, 1, left, D, WHOLE, C1)
    qk_scale = tl.cast(qk_scale, tl.float32)  # inductor hands a Python float over as float64
    held = (q0, q1, key, key_n, mask, mask_n, mask_k, rows, left, keys, qk_scale)
    sizes: tl.constexpr = (D, D0, D1, W, WHOLE_M, MASKED, MASK_ROWS, SCALED, TF32X3)
    alpha = tl.load(alpha_at)
    temperature = tl.load(temperature_at)
    to_log2 = 1.4426950408889634
    if not SCALED:  # scores are scaled where they are shifted, by the same product
        to_log2 = to_log2 * qk_scale
    scale = 1.0
    sparse_temperature = 1.0
    if OPERATOR != 1:
        scale = tl.load(scale_at)
        sparse_temperature = tl.load(sparse_temperature_at)
    places = (value, value_n, output, output_n, dense, lse, dense_lse, dense_n)
    numbers = (to_log2, temperature, qk_scale, scale)
    rest = (alpha, sparse_temperature, sums, first_at, second_at, parallel_at, batch, first, queries)
    if PAIRS > 0:
        if alpha == 1.5 and sparse_temperature == 1.0:
            half: tl.constexpr = (D, D0, D1, 32, WHOLE_M, MASKED, MASK_ROWS, SCALED, False)
            held_rows(held, half, places, numbers, like, WHOLE, PAIRS, WITH_LSE, JOINED, HALF_BITS)
        else:
            stream_rows(held, sizes, places, numbers, rest, like, OPERATOR, WHOLE, WITH_LSE, JOINED, HALF_BITS)
    else:
        stream_rows(held, sizes, places, numbers, rest, like, OPERATOR, WHOLE, WITH_LSE, JOINED, HALF_BITS)
