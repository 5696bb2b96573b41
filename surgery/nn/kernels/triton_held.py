"""Rows whose scores the long Triton kernel keeps in registers: up to 320 keys, half precision, alpha 1.5, one product.

What is kept is x (triton_tiles.py) as float16, two tiles to one of 32 bits. float16 holds x to 2^-11 of itself, so that
what is near the row's largest, which is what the sparse map is made of, is nearly exact. The compiler would unpack all
of them before the solver's loop and hold twice as many registers, so packing and unpacking are instructions that it may
not move (inline assembly, NVIDIA's).
"""

from .triton_solver import lse_of_rows, pass_tile, scores_of_tile, share_of_rows, store_rows
from .triton_tiles import (
    INTERPRETED,
    dot_tiles,
    load_tile,
    newton_steps_of,
    next_threshold,
    start_of,
    tile_function,
    tl,
)


@tile_function
def pack_tiles(low, high, like: tl.constexpr):
    """Two float32 tiles as one of 32 bits, each rounded to float16 or, if `like` is that, bfloat16."""
    if INTERPRETED:
        low = low.to(like).to(tl.uint16, bitcast=True).to(tl.uint32)
        high = high.to(like).to(tl.uint16, bitcast=True).to(tl.uint32)
        return ((high << 16) | low).to(tl.int32, bitcast=True)
    elif like == tl.float16:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1
        )


@tile_function
def halves_of(packed, like: tl.constexpr):
    """Both tiles of a packed one, in the dtype that they were packed in, here and now."""
    if INTERPRETED:
        bits = packed.to(tl.uint32, bitcast=True)
        low = (bits & 0xFFFF).to(tl.uint16).to(like, bitcast=True)
        high = (bits >> 16).to(tl.uint16).to(like, bitcast=True)
        return low, high
    else:
        low, high = tl.inline_asm_elementwise(
            "mov.b32 {$0, $1}, $2;", "=h,=h,r", [packed], dtype=(tl.int16, tl.int16), is_pure=False, pack=1
        )
        return low.to(like, bitcast=True), high.to(like, bitcast=True)


@tile_function
def unpack_x(packed):
    """Both tiles of x in float32, here and now."""
    if INTERPRETED:
        low, high = halves_of(packed, tl.float16)
        return low.to(tl.float32), high.to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }",
            "=f,=f,r",
            [packed],
            dtype=(tl.float32, tl.float32),
            is_pure=False,
            pack=1,
        )


@tile_function
def depths_of(packed, tau_pair):
    """max(x - tau, 0) of both tiles in float32, subtracted as float16. tau_pair: tau twice, packed."""
    if INTERPRETED:
        low, high = halves_of(packed, tl.float16)
        tau, _ = halves_of(tau_pair, tl.float16)
        return tl.maximum(low - tau, 0.0).to(tl.float32), tl.maximum(high - tau, 0.0).to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; .reg .b16 l, h; sub.rn.f16x2 t, $2, $3; max.f16x2 t, t, $4;"
            " mov.b32 {l, h}, t; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }",
            "=f,=f,r,r,r",
            [packed, tau_pair, tau_pair ^ tau_pair],
            dtype=(tl.float32, tl.float32),
            is_pure=False,
            pack=1,
        )


@tile_function
def sums_of_held(xs, tau, PAIRS: tl.constexpr):
    """Row sums of t and of t^2 over all keys, added within a thread first."""
    tau_pair = pack_tiles(tau, tau, tl.float16)[:, None]
    slope = tl.zeros(xs[0].shape, tl.float32)
    total = tl.zeros(xs[0].shape, tl.float32)
    for i in tl.static_range(PAIRS):
        low, high = depths_of(xs[i], tau_pair)
        slope += low + high
        total += low * low + high * high
    return tl.sum(slope, 1), tl.sum(total, 1)


@tile_function
def solve_held(xs, like_row, keys, PAIRS: tl.constexpr, HALF_BITS: tl.constexpr):
    """(tau, sum t, sum t^2) of each row at alpha 1.5, the sums at tau: the last step is left to the weights."""
    unit = 2.8853900817779268
    steps = newton_steps_of(1.5, keys, HALF_BITS, True)
    if keys > 256 or HALF_BITS == 11:  # the last one, in the weights, is worth one of the threshold up to here
        steps += 1
    start, highest = start_of(2.0, unit, keys, 15)
    # tau is kept as the float16 at which the sums are taken.
    tau = (tl.zeros_like(like_row) + start).to(tl.float16).to(tl.float32)
    low = tau
    last_tau = tau
    norm = tau
    rate = tau
    slope = tau
    total = tau
    for step in tl.range(0, steps):
        slope, total = sums_of_held(xs, tau, PAIRS)
        slope = tl.maximum(slope, 1e-6)  # a row may have no key at all
        total = tl.maximum(total, 1e-6)
        if step < steps - 1:
            new, low, norm, rate = next_threshold(
                slope, total, tau, low, last_tau, norm, rate, step, highest, 2.0, unit, 15
            )
            last_tau = tau
            tau = new.to(tl.float16).to(tl.float32)
    return tau, slope, total


@tile_function
def mix_held(xs, scale, dense_sum, tau, slope, total, like: tl.constexpr, PAIRS: tl.constexpr):
    """(1 - scale) dense + scale sparse weights in place of the x that are kept, packed likewise in the dtype `like`."""
    goal = 8.325475924022431
    of_power = scale / goal
    of_slope = (of_power * (goal - total) / slope)[:, None]
    off = tl.log2(dense_sum)[:, None]
    of_dense = 1.0 - scale
    ws = ()
    for i in tl.static_range(PAIRS):
        low, high = unpack_x(xs[i])
        t0 = tl.maximum(low - tau[:, None], 0.0)
        t1 = tl.maximum(high - tau[:, None], 0.0)
        low = tl.exp2(low - off) * of_dense + t0 * (t0 * of_power + of_slope)
        high = tl.exp2(high - off) * of_dense + t1 * (t1 * of_power + of_slope)
        ws = ws + (pack_tiles(low, high, like),)
    return ws


@tile_function
def first_pass_held(
    held, sizes: tl.constexpr, over_temperature, to_log2, temperature, PAIRS: tl.constexpr, WITH_LSE: tl.constexpr
):
    """(x of all keys, largest score, sum of exponentials over temperature, and not) of each row."""
    W: tl.constexpr = sizes[3]
    ROWS: tl.constexpr = held[0].shape[0]
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    dense_sum = tl.zeros((ROWS,), tl.float32)
    lse_sum = tl.zeros((ROWS,), tl.float32)
    # A loop that is one, and what it finds put where it belongs by selection: unrolled, the compiler would compute all
    # products first, and could not keep them.
    nothing = tl.full((ROWS, W), float("-inf"), tl.float32)
    nothing = pack_tiles(nothing, nothing, tl.float16)
    xs = ()
    tops = ()
    for _ in tl.static_range(PAIRS):
        xs = xs + (nothing,)
        tops = tops + (top,)
    for pair in tl.range(0, PAIRS):
        at = 2 * pair * W
        z = scores_of_tile(held, sizes, at)
        top, before, x0, dense_sum, lse_sum = pass_tile(
            z, top, dense_sum, lse_sum, over_temperature, to_log2, temperature, WITH_LSE
        )
        z = scores_of_tile(held, sizes, at + W)
        top, safe, x1, dense_sum, lse_sum = pass_tile(
            z, top, dense_sum, lse_sum, over_temperature, to_log2, temperature, WITH_LSE
        )
        packed = pack_tiles(x0 + ((before - safe) * over_temperature)[:, None], x1, tl.float16)
        new_xs = ()
        new_tops = ()
        for i in tl.static_range(PAIRS):
            new_xs = new_xs + (tl.where(pair == i, packed, xs[i]),)
            new_tops = new_tops + (tl.where(pair == i, safe, tops[i]),)
        xs = new_xs
        tops = new_tops
    top = tl.where(top == float("-inf"), 0.0, top)
    moved = ()  # x less the row's largest of all keys
    for i in tl.static_range(PAIRS):
        x0, x1 = unpack_x(xs[i])
        back = ((tops[i] - top) * over_temperature)[:, None]
        moved = moved + (pack_tiles(x0 + back, x1 + back, tl.float16),)
    return moved, top, dense_sum, lse_sum


@tile_function
def held_rows(
    held,
    sizes: tl.constexpr,
    places,
    numbers,
    like: tl.constexpr,
    WHOLE: tl.constexpr,
    PAIRS: tl.constexpr,
    WITH_LSE: tl.constexpr,
    JOINED: tl.constexpr,
    HALF_BITS: tl.constexpr,
):
    """A block of rows from scores to output. places, numbers: as the long kernel has them."""
    D: tl.constexpr = sizes[0]
    D0: tl.constexpr = sizes[1]
    D1: tl.constexpr = sizes[2]
    SCALED: tl.constexpr = sizes[7]
    HALF: tl.constexpr = 64 if D0 > 64 else D0
    to_log2, temperature, qk_scale, scale = numbers
    keys = held[9]
    xs, top, dense_sum, lse_sum = first_pass_held(
        held, sizes, to_log2 / temperature, to_log2, temperature, PAIRS, WITH_LSE or JOINED
    )
    own_lse = lse_of_rows(top, lse_sum, dense_sum, temperature, qk_scale, SCALED, WITH_LSE or JOINED)
    dense_sum = tl.where(dense_sum == 0.0, 1.0, dense_sum)  # zeros where a row has no key
    tau, slope, total = solve_held(xs, dense_sum, keys, PAIRS, HALF_BITS)
    ws = mix_held(xs, scale, dense_sum, tau, slope, total, like, PAIRS)
    share = share_of_rows(places, own_lse, held, WITH_LSE, JOINED)
    # So many channels at a time as there are registers for, in a loop that is one: unrolled, the compiler would keep
    # all addresses and weights of the first half for the second.
    for at in tl.range(0, D0, HALF, num_stages=1):
        write_held(ws, at, HALF, D0 <= D, held, sizes, places, share, like, WHOLE, PAIRS, JOINED)
    if D1 > 0:
        write_held(ws, D0, D1, D0 + D1 <= D, held, sizes, places, share, like, WHOLE, PAIRS, JOINED)


@tile_function
def write_held(
    ws,
    channel,
    COUNT: tl.constexpr,
    WHOLE_C: tl.constexpr,
    held,
    sizes: tl.constexpr,
    places,
    share,
    like: tl.constexpr,
    WHOLE: tl.constexpr,
    PAIRS: tl.constexpr,
    JOINED: tl.constexpr,
):
    """The output's COUNT channels from `channel` on."""
    D: tl.constexpr = sizes[0]
    W: tl.constexpr = sizes[3]
    WHOLE_M: tl.constexpr = sizes[4]
    keys = held[9]
    value = places[0]
    value_n = places[1]
    d = channel + tl.arange(0, COUNT)
    m = tl.arange(0, W)
    out = tl.zeros((held[0].shape[0], COUNT), tl.float32)
    for pair in tl.range(0, PAIRS):
        chosen = ws[0]
        for i in tl.static_range(1, PAIRS):
            chosen = tl.where(pair == i, ws[i], chosen)
        low, high = halves_of(chosen, like)
        at = 2 * pair * W
        place = value + tl.cast(at, tl.int64) * value_n
        v = load_tile(place, m, d, value_n, 1, keys - at, D, WHOLE_M, WHOLE_C)
        out = dot_tiles(low, v, out, False)
        place += W * value_n
        v = load_tile(place, m, d, value_n, 1, keys - at - W, D, WHOLE_M, WHOLE_C)
        out = dot_tiles(high, v, out, False)
    store_rows(places, out, d, share, held, D, WHOLE, WHOLE_C, JOINED)
