"""The Triton kernel for short texts, up to 128 keys: scores stay in registers, queries are read from memory once.

A program takes one block of queries of one head, 16 rows to a warp, so that a row never leaves its warp and no step of
the solver waits for shared memory. Keys and channels are two tiles each where that saves
padding (77 keys as 64 + 16). Neither map is normed before its product with the values: outputs are scaled instead.
"""

from .triton_tiles import (
    add_mask,
    dot_tiles,
    exponent_of,
    fast_reciprocal,
    geometry_of_sums,
    load_tile,
    log_sum_exp,
    max_of_rows,
    near_softmax,
    newton_steps_of,
    next_threshold,
    power_sums,
    power_tiles,
    start_of,
    store_sums,
    store_tile,
    sum_of_rows,
    sum_of_weights,
    sums_of_tokens,
    tile_function,
    tl,
)

MOST_SHORT_KEYS = 128


@tile_function
def solve_short(x0, x1, alpha, keys, KIND: tl.constexpr, TWO: tl.constexpr, HALF_BITS: tl.constexpr):
    """tau of each row, for KIND 99 less -unit (triton_tiles.py)."""
    EXACT: tl.constexpr = HALF_BITS == 24
    WIDE: tl.constexpr = x0.shape[1] > 64  # more than 80 keys
    if KIND == 15:
        r = 2.0
        steps = 5 if EXACT else 4 if WIDE else 3
    elif KIND == 20:
        r = 1.0
        steps = 8 if EXACT else 6 if WIDE or HALF_BITS == 11 else 5
    elif KIND == 125:
        r = 4.0
        steps = 5 if EXACT else 3
    else:
        r = exponent_of(alpha, EXACT)
        steps = newton_steps_of(alpha, keys, HALF_BITS, False)
    unit = r * 1.4426950408889634
    start, highest = start_of(r, unit, keys, KIND)
    tau = tl.zeros((x0.shape[0],), tl.float32) + start
    low = tau
    last_tau = tau
    norm = tau
    rate = tau
    for step in tl.range(0, steps):
        slope, total = power_sums(x0, x1, tau, r, unit, KIND, EXACT, TWO)
        slope = tl.maximum(slope, 1e-6)  # a row may have no key at all
        total = tl.maximum(total, 1e-6)
        new, low, norm, rate = next_threshold(
            slope, total, tau, low, last_tau, norm, rate, step, highest, r, unit, KIND
        )
        last_tau = tau
        tau = new
    return tau


@tile_function
def weigh_short(x0, x1, tau, alpha, like, KIND: tl.constexpr, EXACT: tl.constexpr):
    """Both tiles of the sparse weights, not normed, in the dtype of `like`."""
    r = exponent_of(alpha, EXACT)  # which KIND 99 alone reads
    unit = r * 1.4426950408889634
    g0, p0 = power_tiles(x0, tau, r, unit, KIND, EXACT)
    g1, p1 = power_tiles(x1, tau, r, unit, KIND, EXACT)
    return p0.to(like), p1.to(like)


@tile_function
def sparse_short(x0, x1, alpha, keys, like, TWO: tl.constexpr, HALF_BITS: tl.constexpr):
    """Both tiles of the sparse weights, not normed, by the way that alpha wants."""
    EXACT: tl.constexpr = HALF_BITS == 24
    if alpha == 1.5:
        tau = solve_short(x0, x1, alpha, keys, 15, TWO, HALF_BITS)
        p0, p1 = weigh_short(x0, x1, tau, alpha, like, 15, EXACT)
    elif alpha == 2.0:
        tau = solve_short(x0, x1, alpha, keys, 20, TWO, HALF_BITS)
        p0, p1 = weigh_short(x0, x1, tau, alpha, like, 20, EXACT)
    elif alpha == 1.25:
        tau = solve_short(x0, x1, alpha, keys, 125, TWO, HALF_BITS)
        p0, p1 = weigh_short(x0, x1, tau, alpha, like, 125, EXACT)
    elif alpha < 1.001 and not EXACT:
        log_sum = tl.log2(tl.maximum(sum_of_rows(tl.exp2(x0), tl.exp2(x1), TWO), 1.0))
        p0 = near_softmax(x0, log_sum, alpha).to(like)
        p1 = near_softmax(x1, log_sum, alpha).to(like)
    else:
        tau = solve_short(x0, x1, alpha, keys, 99, TWO, HALF_BITS)
        p0, p1 = weigh_short(x0, x1, tau, alpha, like, 99, EXACT)
    return p0, p1


@tile_function
def product_short(w0, w1, v0, v1, sum_so_far, TWO: tl.constexpr, TF32X3: tl.constexpr):
    """weights @ values + sum_so_far over both tiles of keys."""
    sum_so_far = dot_tiles(w0, v0, sum_so_far, TF32X3)
    if TWO:
        sum_so_far = dot_tiles(w1, v1, sum_so_far, TF32X3)
    return sum_so_far


@tile_function
def short_kernel(
    query,
    key,
    value,
    mask,
    output,
    lse,
    sums,
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
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    M0: tl.constexpr,
    M1: tl.constexpr,
    ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
    TF32X3: tl.constexpr,
    HALF_BITS: tl.constexpr,
):
    TWO: tl.constexpr = M1 > 0
    MORE: tl.constexpr = D1 > 0
    C0: tl.constexpr = D0 <= D
    C1: tl.constexpr = D0 + D1 <= D
    EXACT: tl.constexpr = HALF_BITS == 24
    like: tl.constexpr = query.dtype.element_ty
    batch = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    key_head = head // GROUP  # heads in a row share one of keys
    # Strides count UNITs of elements, so that the compiler sees that addresses allow wide loads.
    query_n = query_n * UNIT
    key_n = key_n * UNIT
    value_n = value_n * UNIT
    output_n = output_n * UNIT
    query += batch * (query_b * UNIT) + head * (query_h * UNIT)
    key += batch * (key_b * UNIT) + key_head * (key_h * UNIT)
    value += batch * (value_b * UNIT) + key_head * (value_h * UNIT)
    output += batch * (output_b * UNIT) + head * (output_h * UNIT)
    m0 = tl.arange(0, M0)
    m1 = M0 + tl.arange(0, M1 if TWO else M0)
    d0 = tl.arange(0, D0)
    d1 = D0 + tl.arange(0, D1 if MORE else D0)
    # k10: the second tile of channels with the first of keys
    k00 = load_tile(key, d0, m0, 1, key_n, D, keys, C0, TWO)
    v00 = load_tile(value, m0, d0, value_n, 1, keys, D, TWO, C0)
    k01 = k00
    k10 = k00
    k11 = k00
    v01 = v00
    v10 = v00
    v11 = v00
    if MORE:
        k10 = load_tile(key, d1, m0, 1, key_n, D, keys, C1, TWO)
        v01 = load_tile(value, m0, d1, value_n, 1, keys, D, TWO, C1)
    if TWO:
        k01 = load_tile(key, d0, m1, 1, key_n, D, keys, C0, False)
        v10 = load_tile(value, m1, d0, value_n, 1, keys, D, False, C0)
        if MORE:
            k11 = load_tile(key, d1, m1, 1, key_n, D, keys, C1, False)
            v11 = load_tile(value, m1, d1, value_n, 1, keys, D, False, C1)
    if MASKED > 0:
        mask += batch * mask_b + head * mask_h
    alpha = tl.load(alpha_at)
    temperature = tl.load(temperature_at)
    qk_scale = tl.cast(qk_scale, tl.float32)  # inductor hands a Python float over as float64
    over_temperature = 1.4426950408889634 / temperature
    if not SCALED:  # scores are scaled where they are shifted, by the same product
        over_temperature = over_temperature * qk_scale
    rows = tl.arange(0, ROWS)

    start = tl.program_id(0) * ROWS
    first = start.to(tl.int64)
    left = queries - start
    query_at = query + first * query_n
    output_at = output + first * output_n
    z0 = tl.zeros((ROWS, M0), tl.float32)
    q0 = load_tile(query_at, rows, d0, query_n, 1, left, D, WHOLE, C0)
    z0 = dot_tiles(q0, k00, z0, TF32X3)
    z1 = z0
    if TWO:
        z1 = dot_tiles(q0, k01, tl.zeros((ROWS, M1 if TWO else M0), tl.float32), TF32X3)
    if MORE:
        q1 = load_tile(query_at, rows, d1, query_n, 1, left, D, WHOLE, C1)
        z0 = dot_tiles(q1, k10, z0, TF32X3)
        if TWO:
            z1 = dot_tiles(q1, k11, z1, TF32X3)
    if SCALED:
        z0 = z0 * qk_scale
        z1 = z1 * qk_scale
    if MASKED > 0:
        mask_at = mask + first * mask_n
        if MASK_ROWS:
            is_row = (rows < left)[:, None]
            z0 = add_mask(
                z0, mask_at + rows[:, None] * mask_n + m0[None, :] * mask_k, is_row & (m0 < keys)[None, :], MASKED == 1
            )
            z1 = add_mask(
                z1, mask_at + rows[:, None] * mask_n + m1[None, :] * mask_k, is_row & (m1 < keys)[None, :], MASKED == 1
            )
        else:
            z0 = add_mask(z0, mask + m0 * mask_k, m0 < keys, MASKED == 1)
            z1 = add_mask(z1, mask + m1 * mask_k, m1 < keys, MASKED == 1)
    elif TWO:
        z1 = tl.where((m1 < keys)[None, :], z1, float("-inf"))
    else:
        z0 = tl.where((m0 < keys)[None, :], z0, float("-inf"))
    if not TWO:
        z1 = z0

    top = max_of_rows(z0, z1, TWO)
    top = tl.where(top == float("-inf"), 0.0, top)  # a row without keys has no largest score
    if WITH_LSE:  # of the scores not over temperature
        to_log2 = 1.4426950408889634
        if not SCALED:
            to_log2 = to_log2 * qk_scale
        total = sum_of_rows(
            tl.exp2(tl.minimum(z0 - top[:, None], 0.0) * to_log2),
            tl.exp2(tl.minimum(z1 - top[:, None], 0.0) * to_log2),
            TWO,
        )
        at = (batch * tl.num_programs(1) + head) * queries + first
        tl.store(lse + at + rows, log_sum_exp(top, total, qk_scale, SCALED), mask=rows < left)
    # Where scores over temperature are huge their differences are below rounding: the product must not overflow.
    most = 1048576.0 / tl.maximum(tl.abs(top), 1e-30)
    sharpness = tl.minimum(over_temperature, most)
    if OPERATOR != 1:  # x is of the sparse map's own temperature; times `back` it is that of the dense one
        dense_sharpness = sharpness
        sharpness = tl.minimum(over_temperature / tl.load(sparse_temperature_at), most)
        back = dense_sharpness / sharpness
    x0 = tl.minimum(z0 * sharpness[:, None] - (top * sharpness)[:, None], 0.0, propagate_nan=tl.PropagateNan.ALL)
    x1 = tl.minimum(z1 * sharpness[:, None] - (top * sharpness)[:, None], 0.0, propagate_nan=tl.PropagateNan.ALL)

    p0, p1 = sparse_short(x0, x1, alpha, keys, like, TWO, HALF_BITS)
    sparse_sum = sum_of_weights(p0, p1, TWO, not EXACT)
    sparse_sum = tl.where(sparse_sum == 0.0, 1.0, sparse_sum)  # zeros where a row has no key
    if OPERATOR == 2:  # anderson
        low0, low1 = sparse_short(x0, x1, tl.load(first_at), keys, like, TWO, HALF_BITS)
        low_sum = sum_of_weights(low0, low1, TWO, not EXACT)
        low_sum = tl.where(low_sum == 0.0, 1.0, low_sum)
    if OPERATOR != 1:
        x0 = x0 * back[:, None]
        x1 = x1 * back[:, None]
    e0 = tl.exp2(x0).to(like)
    e1 = tl.exp2(x1).to(like)
    dense_sum = sum_of_weights(e0, e1, TWO, not EXACT)
    dense_sum = tl.where(dense_sum == 0.0, 1.0, dense_sum)

    zeros = tl.zeros((ROWS, D0), tl.float32)
    if OPERATOR >= 3:  # gag: T_s and T_s - T_d
        over_sparse = fast_reciprocal(sparse_sum)[:, None]
        over_dense = fast_reciprocal(dense_sum)[:, None]
        t_sparse = product_short(p0, p1, v00, v10, zeros, TWO, TF32X3) * over_sparse
        residual = t_sparse - product_short(e0, e1, v00, v10, zeros, TWO, TF32X3) * over_dense
        along = tl.sum(t_sparse * residual, 1)
        length = tl.sum(t_sparse * t_sparse, 1)
        square = tl.sum(residual * residual, 1)
        t_sparse1 = t_sparse
        residual1 = residual
        if MORE:
            zeros1 = tl.zeros((ROWS, D1 if MORE else D0), tl.float32)
            t_sparse1 = product_short(p0, p1, v01, v11, zeros1, TWO, TF32X3) * over_sparse
            residual1 = t_sparse1 - product_short(e0, e1, v01, v11, zeros1, TWO, TF32X3) * over_dense
            along += tl.sum(t_sparse1 * residual1, 1)
            length += tl.sum(t_sparse1 * t_sparse1, 1)
            square += tl.sum(residual1 * residual1, 1)
        if OPERATOR == 4:
            store_sums(sums, batch, first + rows, rows < left, queries, along, length, square)
        else:
            if OPERATOR == 5:  # over whole tokens: all heads' sums, found before
                along, length, square = sums_of_tokens(sums, batch, first + rows, rows < left, queries, ROWS)
            of_sparse, of_residual = geometry_of_sums(
                along, length, square, tl.load(scale_at), tl.load(first_at), tl.load(second_at), tl.load(parallel_at)
            )
            of_sparse = of_sparse[:, None]
            of_residual = of_residual[:, None]
            if D > 128:  # so many channels are not kept: both products once more, as one
                over_sparse = over_sparse * (of_sparse + of_residual)
                over_dense = over_dense * of_residual
                w0 = (p0.to(tl.float32) * over_sparse - e0.to(tl.float32) * over_dense).to(like)
                w1 = (p1.to(tl.float32) * over_sparse - e1.to(tl.float32) * over_dense).to(like)
                t_sparse = product_short(w0, w1, v00, v10, zeros, TWO, TF32X3)
                store_tile(output_at, t_sparse, rows, d0, output_n, left, D, WHOLE, C0)
                t_sparse1 = product_short(w0, w1, v01, v11, zeros1, TWO, TF32X3)
                store_tile(output_at, t_sparse1, rows, d1, output_n, left, D, WHOLE, C1)
            else:
                out = t_sparse * of_sparse + residual * of_residual
                store_tile(output_at, out, rows, d0, output_n, left, D, WHOLE, C0)
                if MORE:
                    out = t_sparse1 * of_sparse + residual1 * of_residual
                    store_tile(output_at, out, rows, d1, output_n, left, D, WHOLE, C1)
    elif OPERATOR == 2:
        scale = tl.load(scale_at)
        scale_low = tl.load(second_at)
        of_sparse = (scale / sparse_sum)[:, None]
        of_low = (scale_low / low_sum)[:, None]
        of_dense = ((1.0 - scale - scale_low) / dense_sum)[:, None]
        w0 = (p0.to(tl.float32) * of_sparse + low0.to(tl.float32) * of_low + e0.to(tl.float32) * of_dense).to(like)
        w1 = (p1.to(tl.float32) * of_sparse + low1.to(tl.float32) * of_low + e1.to(tl.float32) * of_dense).to(like)
        out = product_short(w0, w1, v00, v10, zeros, TWO, TF32X3)
        store_tile(output_at, out, rows, d0, output_n, left, D, WHOLE, C0)
        if MORE:
            zeros1 = tl.zeros((ROWS, D1 if MORE else D0), tl.float32)
            out = product_short(w0, w1, v01, v11, zeros1, TWO, TF32X3)
            store_tile(output_at, out, rows, d1, output_n, left, D, WHOLE, C1)
    else:
        # (1 - scale) e V / sum e + scale p V / sum p, in one accumulator: the first product is scaled so that
        # what the second leaves is the output times (sum p / scale).
        scale = 1.0
        if OPERATOR == 0:
            scale = tl.load(scale_at)
            scale = tl.where(tl.abs(scale) < 1e-15, 1e-15, scale)
        of_sparse = scale * fast_reciprocal(sparse_sum)
        of_dense = (1.0 - scale) / (dense_sum * of_sparse)
        out = dot_scaled(e0, e1, p0, p1, v00, v10, zeros, of_dense, of_sparse, TWO, TF32X3)
        store_tile(output_at, out, rows, d0, output_n, left, D, WHOLE, C0)
        if MORE:
            zeros1 = tl.zeros((ROWS, D1 if MORE else D0), tl.float32)
            out = dot_scaled(e0, e1, p0, p1, v01, v11, zeros1, of_dense, of_sparse, TWO, TF32X3)
            store_tile(output_at, out, rows, d1, output_n, left, D, WHOLE, C1)


@tile_function
def dot_scaled(e0, e1, p0, p1, v0, v1, zeros, of_dense, of_sparse, TWO: tl.constexpr, TF32X3: tl.constexpr):
    """((e V) of_dense + p V) of_sparse."""
    out = product_short(e0, e1, v0, v1, zeros, TWO, TF32X3) * of_dense[:, None]
    return product_short(p0, p1, v0, v1, out, TWO, TF32X3) * of_sparse[:, None]
