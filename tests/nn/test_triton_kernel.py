"""The Triton kernels, interpreted, against the plain torch form in float64: everything that they branch on."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from surgery.nn import attention
from surgery.nn.joint import dense_with_lse, joint_attention
from surgery.nn.kernels.cpu import compiler_is_available
from surgery.nn.kernels.reference import empty_outputs
from surgery.nn.kernels.triton_kernel import launch_by_triton, tiles_of
from surgery.nn.operators import OPERATORS

from ..quick import one_in
from .oracle import float32

pytest.importorskip("triton")

# L2 error over the output's own L2 length: the dtype's rounding. Triton's interpreter cuts to bfloat16, a GPU rounds.
LIMITS = {torch.float32: 1e-5, torch.float16: 1.5e-3, torch.bfloat16: 1.5e-2}
DTYPES = tuple(LIMITS)
KEYS = (1, 13, 16, 20, 50, 77, 80, 81, 128, 129, 200, 300, 512, 513, 600)
HEAD_DIMS = (1, 16, 20, 40, 64, 72, 128, 160, 256)
ALPHAS = (1.0, 1.0001, 1.0009, 1.0011, 1.05, 1.25, 1.5, 1.75, 1.9999, 2.0)
OPERATORS_AND_UNITS = [*((operator, "head") for operator, own in OPERATORS.items() if own.code is not None)]
OPERATORS_AND_UNITS += [("gag", "token")]
# One of each way to go over the keys: at once, held in registers, streamed (which gag always is beyond 128).
WAYS = {
    "short": (77, torch.bfloat16, "pladis"),
    "short float32": (77, torch.float32, "gag"),
    "held": (200, torch.float16, "pladis"),
    "streamed": (150, torch.bfloat16, "gag"),
    "streamed float32": (140, torch.float32, "pladis"),
}


def tensors(keys, dtype=torch.float32, queries=19, head_dim=16, batch=1, heads=2, spread=1.0, seed=0):
    """query, key and value laid out as a module's projections are."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(batch, n, heads, head_dim, generator=generator) for n in (queries, keys, keys)]
    return [(t * s).to(dtype).transpose(1, 2) for t, s in zip(made, (spread, 1.0, 1.0), strict=True)]


def check(query, key, value, limit=1.0, exact=torch.float64, implementation="triton", **how):
    """Compare with the reference in `exact`; returns what the kernel gave."""
    expected, expected_lse = attention(
        query.to(exact), key.to(exact), value.to(exact), implementation="reference", return_lse=True, **how
    )
    found, lse = attention(query, key, value, implementation=implementation, return_lse=True, **how)
    assert found.dtype == value.dtype and found.shape == expected.shape and lse.dtype == torch.float32
    assert_close(found, expected, limit)
    finite = expected_lse.isfinite()
    assert torch.equal(lse[~finite].double(), expected_lse[~finite].double())
    error = (lse.double() - expected_lse)[finite].abs() / (1.0 + expected_lse[finite].abs())
    assert error.numel() == 0 or error.max() < 2e-5, f"log-sum-exp is off by {error.max():.1e}"
    return found


def assert_close(found, expected, limit=1.0):
    """limit: in the dtype's LIMITS."""
    assert found.isfinite().all()
    error = (found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-3)
    assert error < limit * LIMITS[found.dtype], f"off by {error:.1e}"


def rotated():
    """(keys, head_dim, dtype, operator, unit): every one of each is sampled; all keys with all channels are slow."""
    cases = []
    for i, keys in enumerate(KEYS):
        for j, head_dim in enumerate(HEAD_DIMS):
            dtype = DTYPES[(i + 2 * j) % 3]
            sampled = (i + j) % len(HEAD_DIMS) == 0
            marks = () if sampled and (keys < 300 or dtype != torch.float32) else pytest.mark.slow
            cases.append(pytest.param(keys, head_dim, dtype, *OPERATORS_AND_UNITS[(i + 2 * j) % 5], marks=marks))
    return cases


def every_way(name="", values=(), share=9):
    """Parametrize by WAYS and the values of another name; one in `share` of all is not slow."""
    cases = []
    for i, way in enumerate(WAYS):
        for j, value in enumerate(values or [None]):
            marks = () if (i + j) % share == 0 else pytest.mark.slow
            cases.append(pytest.param(way, value, marks=marks) if values else pytest.param(way, marks=marks))
    return pytest.mark.parametrize(("way", name) if values else "way", cases)


@pytest.mark.parametrize(("keys", "head_dim", "dtype", "operator", "unit"), rotated())
def test_any_number_of_keys_and_channels(keys, head_dim, dtype, operator, unit):
    queries = (1, 19, 67)[keys % 3] if keys <= 128 else 19
    heads = 2 if unit == "token" else 1
    more = {"zeta": 0.4, "eta": 2.0} if operator == "gag" else {}
    limit = 3.0 if operator == "gag" or dtype == torch.bfloat16 else 1.0
    check(
        *tensors(keys, dtype, queries, head_dim, heads=heads, spread=2.0), limit, operator=operator, unit=unit, **more
    )


def test_the_sizes_above_are_in_every_tile():
    def sizes(keys, head_dims, names):
        tiles = [tiles_of(n, d, dtype, 0, n <= 128)[0] for n in keys for d in head_dims for dtype in DTYPES]
        return {tuple(tile.get(name) for name in names) for tile in tiles}

    assert sizes([77], HEAD_DIMS, ("D0", "D1")) == sizes([77], range(1, 257), ("D0", "D1"))
    assert sizes(KEYS, [64], ("M0", "M1", "W")) == sizes(range(1, 700), [64], ("M0", "M1", "W"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("operator", "unit"), OPERATORS_AND_UNITS)
@pytest.mark.parametrize("keys", [77, pytest.param(150, marks=pytest.mark.slow)])
def test_every_operator_in_every_dtype_over_several_blocks_of_rows(keys, operator, unit, dtype):
    more = {"zeta": -0.3, "eta": 1.0} if operator == "gag" else {"scale": 1.7} if operator != "sparse" else {}
    heads = 2 if unit == "token" else 1
    query, key, value = tensors(keys, dtype, queries=150 if keys > 77 else 40, heads=heads)
    check(query, key, value, 3.0, operator=operator, unit=unit, temperature=0.7, **more)


@every_way("alpha", ALPHAS)
def test_every_alpha_for_flat_and_for_peaked_scores(way, alpha):
    keys, dtype, operator = WAYS[way]
    for spread in (0.1, 4.0):
        query, key, value = tensors(keys, dtype, queries=9, heads=1, spread=spread)
        if operator == "gag":  # whose residual is nothing but rounding where both maps are nearly the same
            check(query, key, value, 3.0, operator="gag", scale=1.0, alpha=float32(alpha))
        else:
            check(query, key, value, 3.0, alpha=float32(alpha), scale=1.7)


@pytest.mark.parametrize(
    ("keys", "alpha"),
    one_in(2, [(77, 1.0009), (150, 1.0009), (150, 1.25), (77, 1.25), (77, 1.6), (150, 1.6), (150, 2.0), (77, 2.0)]),
)
def test_anderson_mixes_two_sparse_maps(alpha, keys):
    for dtype in (torch.bfloat16, torch.float32):
        query, key, value = tensors(keys, dtype, queries=9, heads=1)
        how = {"alpha": 1.5, "alpha_low": float32(alpha), "scale": 1.3, "scale_low": -0.4}
        check(query, key, value, operator="anderson", **how)


@every_way("scale", [0.0, 1.0, -3.0])
def test_scale_can_be_anything(way, scale):
    keys, dtype, operator = WAYS[way]
    found = check(*tensors(keys, dtype, queries=5), 3.0, operator=operator, scale=scale)
    if scale == 0.0 and operator == "pladis":
        query, key, value = (t.double() for t in tensors(keys, dtype, queries=5))
        assert_close(found, torch.nn.functional.scaled_dot_product_attention(query, key, value))


def masks(kind, keys, queries=19, batch=2, heads=1):
    """A mask of a kind."""
    random = torch.rand(batch, heads, queries, keys, generator=torch.Generator().manual_seed(5))
    return {
        "per key": random[:, :1, :1] > 0.5,
        "per row": random[0, 0] > 0.5,
        "per head": random > 0.5,
        "whole rows": (random > 0.3) & (torch.arange(queries) % 3 != 0)[:, None],
        "nothing": torch.zeros(keys, dtype=torch.bool),
        "a batch entry": (torch.arange(batch) > 0)[:, None, None, None].expand(-1, 1, 1, keys),
        "added per key": random[:1, :1, :1] * 4 - 2,
        "added per row": (random * 4 - 2).masked_fill(random > 0.9, -math.inf),
        "added per head": (random * 4 - 2)[:1, :, :1],
        "added whole rows": torch.where(torch.arange(queries) % 2 == 0, 0.0, -math.inf)[:, None].expand(-1, keys),
    }[kind]


KINDS_OF_MASK = ["per key", "per row", "per head", "whole rows", "nothing", "a batch entry"]
KINDS_OF_MASK += ["added per key", "added per row", "added per head", "added whole rows"]


@every_way("kind", KINDS_OF_MASK)
def test_every_kind_of_mask(way, kind):
    keys, dtype, operator = WAYS[way]
    heads = 2 if kind.endswith("head") else 1
    mask = masks(kind, keys, heads=heads)
    alpha = 1.0005 if kind == "nothing" else 1.7 if kind.endswith("row") else 1.5  # every branch sees empty rows
    found = check(*tensors(keys, dtype, batch=2, heads=heads), 3.0, operator=operator, mask=mask, alpha=float32(alpha))
    if mask.dtype == torch.bool:
        empty = ~mask.expand(2, heads, 19, keys).any(-1)
        assert not found[empty].any()


@every_way(share=2)
def test_masks_of_the_lowest_number_are_masks_and_over_a_whole_row_are_no_difference(way):
    keys, dtype, operator = WAYS[way]
    for number in (torch.finfo(dtype).min, torch.finfo(torch.float32).min):
        mask = torch.where(masks("per row", keys), 0.0, number).to(torch.float32)
        mask[3] = number
        check(*tensors(keys, dtype, heads=1), 3.0, exact=torch.float32, operator=operator, mask=mask)


@every_way("temperature", [1e-6, 0.05, 0.7, 1e6])
def test_every_temperature_and_the_log_sum_exp_is_not_over_it(way, temperature):
    keys, dtype, operator = WAYS[way]
    # At the lowest a row is its largest score alone, and the difference to the next one has to be more than rounding.
    check(*tensors(keys, dtype, queries=7), 3.0, operator=operator, temperature=float32(temperature), alpha=1.5)


@every_way("qk_scale", [-0.3, 0.0, 2.5, 1e-9])
def test_scores_may_be_scaled_by_anything(way, qk_scale):
    keys, dtype, operator = WAYS[way]
    check(*tensors(keys, dtype, queries=7), 3.0, operator=operator, qk_scale=qk_scale)


@every_way("alpha", [1.0005, 1.7, 1.5, 2.0], share=5)
def test_a_row_that_is_no_number_stays_one_and_is_the_only_one(way, alpha):
    keys, dtype, operator = WAYS[way]
    how = {"operator": operator, "alpha": alpha, "mask": masks("per key", keys)[:1] if alpha in (1.7, 2.0) else None}
    query, key, value = tensors(keys, dtype, queries=6)
    expected = attention(query, key, value, implementation="triton", **how)
    query[0, 1, 4, 3] = math.nan
    found = attention(query, key, value, implementation="triton", **how)
    assert found[0, 1, 4].isnan().all()
    found[0, 1, 4] = expected[0, 1, 4]
    assert torch.equal(found, expected)


@every_way(share=1)
def test_a_row_with_an_infinite_score_is_no_number(way):
    keys, dtype, operator = WAYS[way]
    query, key, value = tensors(keys, dtype, queries=5, heads=1)
    mask = torch.zeros(5, keys)
    mask[3, 1] = mask[1, keys - 1] = math.inf
    infinite = torch.zeros(5, dtype=torch.bool).index_fill_(0, torch.tensor([1, 3]), True)
    for masked, rows in ((mask, infinite), (torch.full((1, keys), math.inf), infinite | True)):
        found = attention(query, key, value, implementation="triton", operator=operator, mask=masked)
        assert found[:, :, rows].isnan().all() and found[:, :, ~rows].isfinite().all()


def arranged(tensor, how):
    """The same numbers laid out differently."""
    batch, heads, length, channels = tensor.shape
    if how == "contiguous":
        return tensor.contiguous()
    if how == "channels apart":
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)
    if how == "offset":  # no multiple of 16 bytes
        made = tensor.new_zeros(tensor.numel() + 3)[3:].view(tensor.shape)
    elif how == "within a wider one":
        made = tensor.new_zeros(batch, length, heads, 3 * channels + 1).transpose(1, 2)[..., channels : 2 * channels]
    elif how == "every second":
        made = tensor.new_zeros(batch, heads, 2 * length, channels)[:, :, ::2]
    else:
        made = tensor.transpose(1, 2).contiguous().transpose(1, 2)
    return made.copy_(tensor)


LAYOUTS = ["contiguous", "channels apart", "offset", "within a wider one", "every second"]


@every_way("layout", LAYOUTS)
def test_every_layout(way, layout):
    keys, dtype, operator = WAYS[way]
    made = [arranged(t, layout) for t in tensors(keys, dtype, queries=9, head_dim=20)]
    check(*made, 3.0, operator=operator)
    query, key, value = (t[:1, :1] for t in made)
    check(query.expand(2, 2, -1, -1), key.expand(2, 2, -1, -1), value.expand(2, 2, -1, -1), 3.0, operator=operator)


@pytest.mark.parametrize(
    ("text_length", "operator", "unit", "masked"),
    [
        pytest.param(length, *kind, masked, marks=() if length == 77 and (at + masked) % 2 else pytest.mark.slow)
        for length in (77, 13, 200)
        for at, kind in enumerate(OPERATORS_AND_UNITS)
        for masked in (False, True)
    ],
)
def test_joined_it_is_joint_attention_in_one_launch(text_length, operator, unit, masked):
    dtype = (torch.float16, torch.float32, torch.bfloat16)[(text_length + masked) % 3]
    image_length = 21
    query, key, value = tensors(text_length + image_length, dtype, text_length + image_length, 20, batch=2)
    mask = None
    if masked:  # the second entry has less text, the last head none
        mask = torch.ones(2, 2, 1, text_length + image_length, dtype=torch.bool)
        mask[1, :, :, 5:text_length] = False
        mask[1, 1, :, :text_length] = False
    larger = {"scale": 2.0} if operator == "gag" else {}
    hyperparameters = {**OPERATORS[operator].defaults, "temperature": 0.8, **larger}
    how = {"operator": operator, "unit": unit, **hyperparameters}
    expected = joint_attention(
        query.double(),
        key.double(),
        value.double(),
        text_length=text_length,
        mask=mask,
        implementation="reference",
        **how,
    )[:, :, text_length:]
    text, image = slice(0, text_length), slice(text_length, None)
    qk_scale = query.shape[3] ** -0.5
    dense, dense_lse = dense_with_lse(query[:, :, image], key[:, :, image], value[:, :, image], None, qk_scale)
    output = empty_outputs(query, value, False)[0].fill_(7.0)
    numbers = [torch.tensor(number) for number in hyperparameters.values()]
    found, lse = launch_by_triton(
        query[:, :, image],
        key[:, :, text],
        value[:, :, text],
        None if mask is None else mask[..., text],
        numbers,
        operator,
        unit,
        qk_scale,
        False,
        dense=dense,
        dense_lse=dense_lse.contiguous(),
        output=output[:, :, image],
    )
    assert lse is None and found.data_ptr() == output[:, :, image].data_ptr()
    assert_close(found, expected, 3.0)
    assert (output[:, :, text] == 7.0).all()


@st.composite
def calls(draw, most_keys):
    """Arguments of `attention`: shapes, layouts, masks, dtypes and hyperparameters at random."""
    operator, unit = draw(st.sampled_from(OPERATORS_AND_UNITS))
    dtype = draw(st.sampled_from(DTYPES))
    batch, heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from((1, 1, 2)))
    keys, queries = draw(st.integers(1, most_keys)), draw(st.integers(1, 40))
    spread, seed = draw(st.sampled_from((0.1, 1.0, 6.0))), draw(st.integers(0, 1 << 20))
    made = tensors(keys, dtype, queries, draw(st.integers(1, 90)), batch, heads, spread, seed)
    made = [arranged(t, draw(st.sampled_from(LAYOUTS))) for t in (made[0].repeat(1, group, 1, 1), *made[1:])]
    how = {"operator": operator, "unit": unit}
    alphas = st.one_of(st.sampled_from(ALPHAS), st.floats(1.0, 2.0, width=32))
    for name in OPERATORS[operator].defaults:
        if name.startswith("alpha"):
            how[name] = float32(draw(alphas))
    how["temperature"] = draw(st.sampled_from((0.5, 1.0, 3.0)))
    if "scale" in OPERATORS[operator].defaults:
        how["scale"] = draw(st.sampled_from((0.0, 1.0, 2.0, -1.5)))
    kind = draw(st.sampled_from([None, *KINDS_OF_MASK]))
    if kind is not None:
        how["mask"] = masks(kind, keys, queries, batch, heads * group)
    return made, how


@pytest.mark.parametrize(
    ("implementation", "examples", "most_keys"),
    [
        ("triton", 2, 140),
        ("cpp", 60, 600),
        ("blocked", 40, 600),
        pytest.param("triton", 250, 600, marks=pytest.mark.slow),
    ],
)
def test_any_call_at_all(implementation, examples, most_keys):
    assume(implementation != "cpp" or compiler_is_available())

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(calls(most_keys))
    def agrees(call):
        made, how = call
        check(*made, 4.0, implementation=implementation, **how)

    agrees()
