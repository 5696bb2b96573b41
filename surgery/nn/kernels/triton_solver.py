"""The entmax threshold of rows that are longer than one tile, for the long Triton kernel.

No scores are kept: each pass computes them again from query and keys, tile by tile, so there may be any number of keys.
"""

from .triton_tiles import (
    add_mask,
    dot_tiles,
    exponent_of,
    load_tile,
    log_sum_exp,
    near_softmax,
    newton_steps_of,
    next_threshold,
    power_tiles,
    start_of,
    store_tile,
    tile_function,
    tl,
)


@tile_function
def scores_of_tile(held, sizes: tl.constexpr, start):
    """Scores of the W keys from `start` on, -inf where there is no key; without qk_scale unless SCALED."""
    q0, q1, key, key_n, mask, mask_n, mask_k, rows, left, keys, qk_scale = held
    D: tl.constexpr = sizes[0]
    D0: tl.constexpr = sizes[1]
    D1: tl.constexpr = sizes[2]
    W: tl.constexpr = sizes[3]
    WHOLE_M: tl.constexpr = sizes[4]
    MASKED: tl.constexpr = sizes[5]
    MASK_ROWS: tl.constexpr = sizes[6]
    SCALED: tl.constexpr = sizes[7]
    TF32X3: tl.constexpr = sizes[8]
    m = tl.arange(0, W)
    here = keys - start
    key += tl.cast(start, tl.int64) * key_n
    z = tl.zeros((q0.shape[0], W), tl.float32)
    z = dot_tiles(q0, load_tile(key, tl.arange(0, D0), m, 1, key_n, D, here, D0 <= D, WHOLE_M), z, TF32X3)
    if D1 > 0:
        k1 = load_tile(key, D0 + tl.arange(0, D1), m, 1, key_n, D, here, D0 + D1 <= D, WHOLE_M)
        z = dot_tiles(q1, k1, z, TF32X3)
    if SCALED:
        z = z * qk_scale
    if MASKED > 0:
        mask += tl.cast(start, tl.int64) * mask_k
        if MASK_ROWS:
            at = mask + rows[:, None] * mask_n + m[None, :] * mask_k
            return add_mask(z, at, (rows < left)[:, None] & (m < here)[None, :], MASKED == 1)
        else:
            return add_mask(z, mask + m * mask_k, m < here, MASKED == 1)
    elif WHOLE_M:
        return z
    else:
        return tl.where((m < here)[None, :], z, float("-inf"))


@tile_function
def shifted_tile(held, sizes: tl.constexpr, start, sharpness, shift):
    """x of the W keys from `start` on."""
    z = scores_of_tile(held, sizes, start)
    return tl.minimum(z * sharpness[:, None] - shift[:, None], 0.0, propagate_nan=tl.PropagateNan.ALL)


@tile_function
def weights_of_tile(x, tau, alpha, r, unit, EXACT: tl.constexpr):
    """t^(r-1) and t^r of a tile, by the way that alpha wants."""
    if alpha == 1.5:
        g, p = power_tiles(x, tau, r, unit, 15, EXACT)
    elif alpha == 2.0:
        g, p = power_tiles(x, tau, r, unit, 20, EXACT)
    elif alpha == 1.25:
        g, p = power_tiles(x, tau, r, unit, 125, EXACT)
    elif alpha < 1.001 and not EXACT:
        p = near_softmax(x, tau, alpha)
        g = p
    else:
        g, p = power_tiles(x, tau, r, unit, 99, EXACT)
    return g, p


@tile_function
def solve_long(
    held,
    sizes: tl.constexpr,
    sharpness,
    shift,
    alpha,
    r,
    unit,
    KIND: tl.constexpr,
    LINEAR: tl.constexpr,
    HALF_BITS: tl.constexpr,
):
    """(tau, sum t^(r-1), sum t^r) of each row.

    LINEAR: the sums are those at tau, whose last step is left to the weights. That is worth a step of the threshold,
    but up to alpha 1.5 (bfloat16: below it).
    """
    EXACT: tl.constexpr = HALF_BITS == 24
    keys = held[9]
    steps = newton_steps_of(alpha, keys, HALF_BITS, True)
    if LINEAR:
        if alpha < 1.5 or (alpha == 1.5 and HALF_BITS > 8):
            steps += 1
    start, highest = start_of(r, unit, keys, KIND)
    tau = tl.zeros_like(shift) + start
    low = tau
    last_tau = tau
    norm = tau
    rate = tau
    slope = tau
    total = tau
    for step in tl.range(0, steps):
        slope = tl.zeros_like(shift)
        total = tl.zeros_like(shift)
        for at in tl.range(0, keys, sizes[3]):
            x = shifted_tile(held, sizes, at, sharpness, shift)
            g, p = power_tiles(x, tau, r, unit, KIND, EXACT)
            slope += tl.sum(g, 1)
            total += tl.sum(p, 1)
        slope = tl.maximum(slope, 1e-6)  # a row may have no key at all
        total = tl.maximum(total, 1e-6)
        if not LINEAR or step < steps - 1:
            new, low, norm, rate = next_threshold(
                slope, total, tau, low, last_tau, norm, rate, step, highest, r, unit, KIND
            )
            last_tau = tau
            tau = new
    return tau, slope, total


@tile_function
def sparse_long(
    held,
    sizes: tl.constexpr,
    sharpness,
    shift,
    sharp_sum,
    alpha,
    r,
    unit,
    LINEAR: tl.constexpr,
    HALF_BITS: tl.constexpr,
):
    """(tau, factor of t^r, factor of t^(r-1)): the sparse weights, whose sum is one; the factors mean LINEAR alone.

    sharp_sum: sum 2^x.
    """
    EXACT: tl.constexpr = HALF_BITS == 24
    near_one = alpha < 1.001 and not EXACT
    goal = 1.0
    if alpha == 1.5:
        tau, slope, total = solve_long(
            held, sizes, sharpness, shift, 1.5, 2.0, 2.8853900817779268, 15, LINEAR, HALF_BITS
        )
        goal = 8.325475924022431
    elif alpha == 2.0:
        tau, slope, total = solve_long(
            held, sizes, sharpness, shift, 2.0, 1.0, 1.4426950408889634, 20, LINEAR, HALF_BITS
        )
        goal = 1.4426950408889634
    elif alpha == 1.25:
        tau, slope, total = solve_long(
            held, sizes, sharpness, shift, 1.25, 4.0, 5.7707801635558537, 125, LINEAR, HALF_BITS
        )
        goal = 1109.0167897836345
    elif near_one:
        tau = tl.log2(sharp_sum)
        slope = tl.zeros_like(shift)
        total = tl.zeros_like(shift) + 1.0
        for at in tl.range(0, held[9], sizes[3]):
            slope += tl.sum(near_softmax(shifted_tile(held, sizes, at, sharpness, shift), tau, alpha), 1)
    else:
        tau, slope, total = solve_long(held, sizes, sharpness, shift, alpha, r, unit, 99, LINEAR, HALF_BITS)
    slope = tl.maximum(slope, 1e-6)
    of_power = tl.zeros_like(shift) + 1.0 / goal
    if near_one:
        of_power = 1.0 / slope
    return tau, of_power, (goal - total) / (goal * slope)


@tile_function
def exponents_of(alpha, EXACT: tl.constexpr):
    """(r, unit); of the alphas whose powers are products to the last bit."""
    r = exponent_of(alpha, EXACT)
    r = tl.where(alpha == 1.5, 2.0, tl.where(alpha == 2.0, 1.0, tl.where(alpha == 1.25, 4.0, r)))
    return r, r * 1.4426950408889634


@tile_function
def pass_tile(z, top, dense_sum, lse_sum, over_temperature, to_log2, temperature, WITH_LSE: tl.constexpr):
    """A tile of scores in the first pass: (largest so far, the same or 0, x by it, both sums so far)."""
    new = tl.maximum(top, tl.max(z, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)  # a row without keys has no largest score
    below = z - safe[:, None]
    before = top - safe
    x = tl.minimum(below * over_temperature, 0.0, propagate_nan=tl.PropagateNan.ALL)
    dense_sum = dense_sum * tl.exp2(before * over_temperature) + tl.sum(tl.exp2(x), 1)
    if WITH_LSE:
        if temperature != 1.0:
            lse_sum = lse_sum * tl.exp2(before * to_log2) + tl.sum(tl.exp2(tl.minimum(below * to_log2, 0.0)), 1)
    return new, safe, x, dense_sum, lse_sum


@tile_function
def lse_of_rows(top, lse_sum, dense_sum, temperature, qk_scale, SCALED: tl.constexpr, WANTED: tl.constexpr):
    """log sum exp of the scores not over temperature; -inf where no key is left."""
    if WANTED:
        if temperature == 1.0:
            lse_sum = dense_sum
        return log_sum_exp(top, lse_sum, qk_scale, SCALED)
    else:
        return top


@tile_function
def share_of_rows(places, own_lse, held, WITH_LSE: tl.constexpr, JOINED: tl.constexpr):
    """Store the log-sum-exp; how much of a joint row is its own keys': sigmoid(own - the others'), 0 without any."""
    lse = places[5]
    dense_lse = places[6]
    rows = held[7]
    left = held[8]
    if WITH_LSE:
        tl.store(lse + rows, own_lse, mask=rows < left)
    if JOINED:
        other = tl.load(dense_lse + rows, mask=rows < left, other=0.0)
        return tl.where(own_lse == float("-inf"), 0.0, 1.0 / (1.0 + tl.exp(other - own_lse)))
    else:
        return own_lse


@tile_function
def store_rows(
    places,
    out,
    channels,
    share,
    held,
    D: tl.constexpr,
    WHOLE_R: tl.constexpr,
    WHOLE_C: tl.constexpr,
    JOINED: tl.constexpr,
):
    """Write channels of the output, in joint attention mixed with the dense attention to the other keys."""
    value, value_n, output, output_n, dense, lse, dense_lse, dense_n = places
    rows = held[7]
    left = held[8]
    if JOINED:
        there = load_tile(dense, rows, channels, dense_n, 1, left, D, WHOLE_R, WHOLE_C).to(tl.float32)
        out = there + share[:, None] * (out - there)
    store_tile(output, out, rows, channels, output_n, left, D, WHOLE_R, WHOLE_C)
