"""What both Triton kernels do with a tile of scores: maps in powers of two, the entmax threshold by Newton's method.

A row of scores is x = log2(e) (scores / temperature - their largest), so x <= 0. Its dense weights are e = 2^x over
their sum; its sparse ones p = max(x - tau, 0)^r over theirs, of an x that is over the sparse map's own temperature too.
There r = 1 / (alpha - 1), and tau is such that the norm (sum p)^(1/r) is unit = r log2(e). In these units tau / unit is
the usual threshold of (alpha - 1) scores (Peters et al. 2019, arXiv 1905.05702, eq. 10), and exp2 needs no product.

The norm is convex in tau, so Newton's method rises to the root from tau = -unit, where the threshold cannot lie above
it. Every step but the first adds what the inverse cubic through the last two norms and slopes says beyond Newton's
step: no work for a score, and three steps then do what four did. Weights are over their own sum, so a threshold that is
a little off loses no mass.

KIND is the way that an alpha wants: 1.5 (15), 2 (20) and 1.25 (125), whose powers are products, or any other (99),
whose power is exp2(r log2). A kernel holds all of them, reads alpha and takes the right one. Of KIND 99 the threshold
is kept as lift = tau + unit and scores over unit, b = 1 + (x - lift) / unit: near alpha 1, where unit is huge, tau
itself would have no digits left. EXACT is float32: its sums are of float32 weights, its logarithms to the last bit.

These functions are Triton's, but not before it is imported (`triton_kernel.jitted_kernels`): an artifact imports
neither Triton nor a compiler where it is loaded.
"""

import types

# Stands for triton.language until that is imported; the functions need no more of it when they are defined.
tl = types.SimpleNamespace(constexpr="constexpr")
libdevice = None
INTERPRETED = False  # TRITON_INTERPRET=1, which has neither libdevice nor products of bfloat16

TILE_FUNCTIONS = []


def tile_function(function):
    """Mark a function as Triton's; it becomes so when Triton is first needed."""
    TILE_FUNCTIONS.append(function)
    return function


@tile_function
def fast_log2(x):
    """log2 of x >= 0 in one instruction, to 2^-22; of zero it is -inf. tl.log2 takes twenty."""
    if INTERPRETED:
        return tl.log2(x)
    else:
        return libdevice.fast_log2f(x)


@tile_function
def fast_reciprocal(x):
    """1 / x of x > 0, in two instructions; a division takes eight."""
    y = tl.rsqrt(x)
    return y * y


@tile_function
def dot_tiles(left, right, sum_so_far, TF32X3: tl.constexpr):
    """left @ right + sum_so_far in float32. TF32X3: of float32, by three products on the tensor cores."""
    if INTERPRETED:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    if TF32X3:
        return tl.dot(left, right, sum_so_far, input_precision="tf32x3")
    else:
        return tl.dot(left, right, sum_so_far, input_precision="ieee")


@tile_function
def sum_of_rows(tile, more, TWO: tl.constexpr):
    """Row sums over two column tiles: folded within a thread first, then across a warp once."""
    if TWO:
        folded = tl.reshape(tile, (tile.shape[0], tile.shape[1] // more.shape[1], more.shape[1]))
        return tl.sum(tl.sum(folded, 1) + more, 1)
    else:
        return tl.sum(tile, 1)


@tile_function
def max_of_rows(tile, more, TWO: tl.constexpr):
    """Row maxima over two column tiles."""
    if TWO:
        folded = tl.reshape(tile, (tile.shape[0], tile.shape[1] // more.shape[1], more.shape[1]))
        return tl.max(tl.maximum(tl.max(folded, 1), more), 1)
    else:
        return tl.max(tile, 1)


@tile_function
def sum_of_weights(tile, more, TWO: tl.constexpr, TENSOR: tl.constexpr):
    """Row sums of weights as they meet the values; TENSOR: by a product with ones, which costs the tensor cores little.

    Of weights that are rounded to half precision that is the sum of what is left of them.
    """
    if TENSOR:
        total = tl.zeros((tile.shape[0], 8), tl.float32)
        total = dot_tiles(tile, tl.full((tile.shape[1], 8), 1.0, tile.dtype), total, False)
        if TWO:
            total = dot_tiles(more, tl.full((more.shape[1], 8), 1.0, tile.dtype), total, False)
        return tl.max(total, 1)  # every column is the sum
    else:
        return sum_of_rows(tile, more, TWO)


@tile_function
def exponent_of(alpha, EXACT: tl.constexpr):
    """r = 1 / (alpha - 1), as far as the logarithms carry it: half precision sees no difference at 1000."""
    if EXACT:
        return 1.0 / tl.minimum(tl.maximum(alpha - 1.0, 1.1920929e-07), 0.999999)
    else:
        return 1.0 / tl.minimum(tl.maximum(alpha - 1.0, 1e-3), 0.99999)


@tile_function
def newton_steps_of(alpha, keys, HALF_BITS: tl.constexpr, LONG: tl.constexpr):
    """Steps after which a row's weights are right to the dtype, whatever the scores (tests/nn/test_triton_steps.py).

    HALF_BITS: 8 for bfloat16, 11 for float16, 24 for float32.
    """
    steps = 6
    if alpha <= 1.07:
        steps = 1
    elif alpha <= 1.2:
        steps = 2
    elif alpha <= 1.5:
        steps = 3
    elif alpha <= 1.75:
        steps = 4
    elif alpha <= 1.9:
        steps = 5
    if LONG:
        steps += 1
        if keys > 1024:
            steps += 1
    if HALF_BITS == 24:
        steps += 2
    elif HALF_BITS == 11:
        if alpha <= 1.07 or (alpha <= 1.5 and keys > 80):
            steps += 1
    return steps


@tile_function
def power_tiles(x, tau, r, unit, KIND: tl.constexpr, EXACT: tl.constexpr):
    """t^(r-1) and t^r of t = max(x - tau, 0); of KIND 99 b^(r-1) and b^r, which are both over their unit."""
    if KIND == 15:
        t = tl.maximum(x - tau[:, None], 0.0)
        return t, t * t
    elif KIND == 20:
        t = tl.maximum(x - tau[:, None], 0.0)
        return tl.where(t > 0.0, 1.0, 0.0), t
    elif KIND == 125:
        t = tl.maximum(x - tau[:, None], 0.0)
        square = t * t
        return square * t, square * square
    elif EXACT:
        d = (x - tau[:, None]) / unit
        b = tl.maximum(1.0 + d, 0.0)
        inside = tl.maximum(b, 1.1754944e-38)
        # log(1 + d): what rounding lost in 1 + d is put back to first order, or alpha near 1 would lose all.
        lost = tl.where(b > 0.0, d - (inside - 1.0), 0.0)
        g = tl.where(b > 0.0, tl.exp((r - 1.0) * (tl.log(inside) + lost * (2.0 - inside))), 0.0)
        return g, g * b
    else:
        over = 1.0 / unit
        b = tl.maximum(x * over + (1.0 - tau * over)[:, None], 0.0)
        g = tl.exp2((r - 1.0) * fast_log2(b))
        return g, g * b


@tile_function
def near_softmax(x, log_sum, alpha):
    """b^r up to a factor of the row, where alpha - 1 is at most 0.001, at alpha = 1 softmax. log_sum: log2 sum 2^x.

    r log(b) by its series in 1 / r, with the threshold that alpha = 1 would have, which is off by as little. At
    alpha = 1 it is 2^x to the last bit, so that GAG's residual is zero.
    """
    x = tl.maximum(x, -200.0)  # a masked score times zero would be no number
    y = x - log_sum[:, None]
    a = 0.6931471805599453 * (alpha - 1.0)
    return tl.exp2(x - a * y * y * (0.5 - a * y * (1.0 / 3.0)))


@tile_function
def power_sums(x0, x1, tau, r, unit, KIND: tl.constexpr, EXACT: tl.constexpr, TWO: tl.constexpr):
    """Row sums of both powers."""
    WIDTH: tl.constexpr = x0.shape[1] + (x1.shape[1] if TWO else 0)
    if not EXACT and (KIND == 15 or KIND == 20):
        # By max(x, tau), which saves the subtraction and costs some 1e-5; what is no key counts as tau.
        m0 = tl.maximum(x0, tau[:, None])
        m1 = tl.maximum(x1, tau[:, None])
        total = sum_of_rows(m0, m1, TWO)
        above = total - WIDTH * tau
        if KIND == 15:
            return above, sum_of_rows(m0 * m0, m1 * m1, TWO) - tau * (total + above)
        else:
            count0 = tl.where(x0 > tau[:, None], 1.0, 0.0)
            count1 = tl.where(x1 > tau[:, None], 1.0, 0.0)
            return sum_of_rows(count0, count1, TWO), above
    else:
        g0, p0 = power_tiles(x0, tau, r, unit, KIND, EXACT)
        g1, p1 = power_tiles(x1, tau, r, unit, KIND, EXACT)
        return sum_of_rows(g0, g1, TWO), sum_of_rows(p0, p1, TWO)


@tile_function
def expm1_of(y):
    """exp(y) - 1, with the digits that the difference would lose where it is small."""
    return tl.where(tl.abs(y) < 0.02, y * (1.0 + y * (0.5 + y * (1.0 / 6.0 + y / 24.0))), tl.exp(y) - 1.0)


@tile_function
def norm_of_sums(slope, total, r, unit, KIND: tl.constexpr):
    """The norm less what it shall be, and -d tau / d norm, from the row sums of t^(r-1) and t^r."""
    if KIND == 15:
        norm = total * tl.rsqrt(total)
        return norm - unit, norm * fast_reciprocal(slope)
    elif KIND == 20:
        return total - unit, fast_reciprocal(slope)
    elif KIND == 125:
        root = total * tl.rsqrt(total)
        norm = root * tl.rsqrt(root)
        return norm - unit, total * fast_reciprocal(norm * slope)
    else:
        above = expm1_of(tl.log(total) / r)
        return unit * above, total / ((1.0 + above) * slope)


@tile_function
def beyond_newton(norm, rate, tau, last_norm, last_rate, last_tau):
    """What the inverse cubic through two thresholds, their norms and rates adds to Newton's step norm * rate.

    At most as much again and never back: without these bounds it can run in circles near alpha 2.
    """
    over = fast_reciprocal(tl.maximum(last_norm - norm, 1e-4))
    secant = (tau - last_tau) * over
    more = norm * norm * over * (rate - secant - last_norm * over * (2.0 * secant - rate - last_rate))
    return tl.maximum(tl.minimum(more, norm * rate), 0.0)


@tile_function
def next_threshold(slope, total, tau, low, last_tau, last_norm, last_rate, step, highest, r, unit, KIND: tl.constexpr):
    """One step: (tau, low, norm, rate). low: the best end of Newton's own steps, each below the root as n is convex."""
    norm, rate = norm_of_sums(slope, total, r, unit, KIND)
    new = tau + norm * rate
    low = tl.maximum(low, new)
    more = beyond_newton(norm, rate, tau, last_norm, last_rate, last_tau)
    new = tl.maximum(new + tl.where(step > 0, more, 0.0), low)
    return tl.minimum(new, highest), low, norm, rate


@tile_function
def start_of(r, unit, keys, KIND: tl.constexpr):
    """(tau to start from, the highest it can be: where all scores are equal)."""
    highest = -unit * tl.exp2(-tl.log2(tl.cast(keys, tl.float32)) / r)
    if KIND == 99:
        return 0.0, -unit * expm1_of(-tl.log(tl.cast(keys, tl.float32)) / r)  # the same and unit more
    else:
        return -unit, highest


@tile_function
def add_mask(scores, at, inside, BOOLEAN: tl.constexpr):
    """Scores with what a mask, boolean or additive, adds; -inf where there is no key.

    at: where its elements are, of each score, or of each key for all rows.
    """
    if BOOLEAN:
        keep = tl.load(at, mask=inside, other=0) != 0
        if len(at.shape) == 1:
            keep = keep[None, :]
        return tl.where(keep, scores, float("-inf"))
    else:
        bias = tl.load(at, mask=inside, other=float("-inf")).to(tl.float32)
        if len(at.shape) == 1:
            bias = bias[None, :]
        return scores + bias


@tile_function
def load_tile(
    at, rows, columns, row_stride, column_stride, all_rows, all_columns, WHOLE_R: tl.constexpr, WHOLE_C: tl.constexpr
):
    """The tile at `rows` and `columns`; zero outside all_rows x all_columns."""
    at = at + rows[:, None] * row_stride + columns[None, :] * column_stride
    if WHOLE_R and WHOLE_C:
        return tl.load(at)
    elif WHOLE_R:
        return tl.load(at, mask=(columns < all_columns)[None, :], other=0.0)
    elif WHOLE_C:
        return tl.load(at, mask=(rows < all_rows)[:, None], other=0.0)
    else:
        return tl.load(at, mask=(rows < all_rows)[:, None] & (columns < all_columns)[None, :], other=0.0)


@tile_function
def store_tile(
    at, tile, rows, columns, row_stride, all_rows, all_columns, WHOLE_R: tl.constexpr, WHOLE_C: tl.constexpr
):
    """Write a tile; channels lie side by side."""
    at = at + rows[:, None] * row_stride + columns[None, :]
    tile = tile.to(at.dtype.element_ty)
    if WHOLE_R and WHOLE_C:
        tl.store(at, tile)
    elif WHOLE_R:
        tl.store(at, tile, mask=(columns < all_columns)[None, :])
    elif WHOLE_C:
        tl.store(at, tile, mask=(rows < all_rows)[:, None])
    else:
        tl.store(at, tile, mask=(rows < all_rows)[:, None] & (columns < all_columns)[None, :])


@tile_function
def log_sum_exp(top, total, qk_scale, SCALED: tl.constexpr):
    """log sum exp of each row, from its largest score and the sum of exponentials below it; -inf without a key."""
    if not SCALED:
        top = top * qk_scale
    return tl.where(total > 0.0, top + tl.log(tl.where(total > 0.0, total, 1.0)), float("-inf"))


@tile_function
def geometry_of_sums(along, length, square, scale, zeta, eta, of_parallel):
    """GAG's output is a T_s + b (T_s - T_d): (a, b) of each row (GAG, arXiv 2603.02531, eq. 11-13).

    along, length, square: <r, T_s>, |T_s|^2 and |r|^2, r = T_s - T_d. u = zeta r + (of_parallel - zeta) c T_s with
    c = <r, T_s> / |T_s|^2, and its two parts, of_parallel r_par and zeta r_orth, are orthogonal.
    """
    share = along / tl.where(length > 0.0, length, 1.0)
    parallel = tl.abs(of_parallel) * tl.sqrt(tl.maximum(share * along, 0.0))
    orthogonal = tl.abs(zeta) * tl.sqrt(tl.maximum(square - share * along, 0.0))
    longer = tl.maximum(parallel, orthogonal)
    ratio = tl.minimum(parallel, orthogonal) / tl.where(longer > 0.0, longer, 1.0)
    norm = longer * tl.sqrt(1.0 + ratio * ratio)
    gain = scale * tl.where(norm > eta, eta / tl.where(norm > eta, norm, 1.0), 1.0)
    return 1.0 + gain * share * (of_parallel - zeta), gain * zeta


@tile_function
def store_sums(sums, batch, rows, is_row, queries, along, length, square):
    """Write a head's part of what `sums_of_tokens` reads."""
    heads = tl.num_programs(1)
    plane = tl.num_programs(2).to(tl.int64) * heads * queries
    at = sums + (batch * heads + tl.program_id(1)) * queries + rows
    tl.store(at, along, mask=is_row)
    tl.store(at + plane, length, mask=is_row)
    tl.store(at + 2 * plane, square, mask=is_row)


@tile_function
def sums_of_tokens(sums, batch, rows, is_row, queries, ROWS: tl.constexpr):
    """<r, T_s>, |T_s|^2 and |r|^2 of whole tokens, from those of each head, (3, batch, heads, queries)."""
    heads = tl.num_programs(1)
    plane = tl.num_programs(2).to(tl.int64) * heads * queries
    along = tl.zeros((ROWS,), tl.float32)
    length = tl.zeros((ROWS,), tl.float32)
    square = tl.zeros((ROWS,), tl.float32)
    for head in tl.range(0, heads):
        at = sums + (batch * heads + head) * queries + rows
        along += tl.load(at, mask=is_row, other=0.0)
        length += tl.load(at + plane, mask=is_row, other=0.0)
        square += tl.load(at + 2 * plane, mask=is_row, other=0.0)
    return along, length, square
