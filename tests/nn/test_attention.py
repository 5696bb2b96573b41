"""The attention function against its formula in float64, dense attention, and its masks."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.nn import attention

from .oracle import entmax_oracle

# Largest difference from float64, relative to the largest output, per dtype.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def tensors(dtype=torch.float32, queries=40, keys=77, head_dim=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, 3, queries, head_dim), (2, 3, keys, head_dim), (2, 3, keys, head_dim)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def formula(query, key, value, alpha, scale, temperature=1.0):
    """PLADIS eq. 15 with eq. 36's temperature, in float64."""
    query, key, value = (tensor.double() for tensor in (query, key, value))
    z = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) / temperature
    return ((1 - scale) * z.softmax(-1) + scale * entmax_oracle(z, alpha)) @ value


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0])
@pytest.mark.parametrize(("scale", "temperature"), [(1.0, 1.0), (2.0, 1.0), (2.0, 0.5)])
def test_is_the_papers_formula(dtype, alpha, scale, temperature):
    query, key, value = tensors(dtype)
    found = attention(query, key, value, alpha=alpha, scale=scale, temperature=temperature)
    expected = formula(query, key, value, alpha, scale, temperature)
    error = (found.double() - expected).abs()
    print(f"{dtype} alpha {alpha} scale {scale}: largest {error.max():.1e}, mean {error.mean():.1e}")
    assert found.dtype == dtype
    assert error.max() < TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0])
def test_the_entmax_package_gives_the_same(alpha):
    query, key, value = tensors()
    ours = attention(query, key, value, alpha=alpha)
    theirs = attention(query, key, value, alpha=alpha, implementation="entmax")
    assert (ours - theirs).abs().max() < 1e-5


def test_scale_zero_is_dense_attention_and_one_is_purely_sparse():
    query, key, value = tensors()
    assert (
        attention(query, key, value, scale=0.0) - F.scaled_dot_product_attention(query, key, value)
    ).abs().max() < 2e-6
    sparse = formula(query, key, value, 1.5, 1.0)
    assert (attention(query, key, value, scale=1.0) - sparse).abs().max() < 2e-6


def test_boolean_and_additive_masks_are_the_same_as_fewer_keys():
    query, key, value = tensors()
    keep = torch.arange(77) < 50
    additive = torch.zeros(77).masked_fill(~keep, -math.inf)
    expected = attention(query, key[:, :, :50], value[:, :, :50])
    for mask in (keep, additive, keep.expand(2, 1, 40, 77)):
        assert (attention(query, key, value, mask=mask) - expected).abs().max() < 2e-6
    bias = torch.randn(2, 3, 40, 77, generator=torch.Generator().manual_seed(9))
    dense = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    assert (attention(query, key, value, mask=bias, scale=0.0) - dense).abs().max() < 2e-6


@pytest.mark.parametrize("implementation", ["reference", "entmax", "blocked", "cpp", "triton"])
@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0])
def test_a_query_without_any_key_gets_zeros(implementation, alpha):
    query, key, value = tensors()
    keep = torch.ones(2, 1, 40, 77, dtype=torch.bool)
    keep[0, :, 5] = False
    found = attention(query, key, value, alpha=alpha, mask=keep, implementation=implementation)
    assert torch.equal(found[0, :, 5], torch.zeros(3, 32))
    assert not found.isnan().any() and (found[1].abs().sum(-1) > 0).all()


def test_an_integer_mask_is_refused_because_it_could_mean_either():
    with pytest.raises(TypeError, match="mask must be boolean"):
        attention(*tensors(), mask=torch.ones(77, dtype=torch.int64))


def test_large_half_precision_scores_do_not_overflow():
    query, key, value = tensors(torch.float16)
    found = attention(query * 60, key * 60, value)  # the raw product passes float16's 65504
    assert found.isfinite().all()


def test_no_keys_at_all_give_zeros():
    query, key, value = tensors(keys=0)
    assert torch.equal(attention(query, key, value), torch.zeros(2, 3, 40, 32))


def test_a_single_key_makes_the_operator_the_identity():
    query, key, value = tensors(keys=1)
    assert torch.allclose(attention(query, key, value, scale=2.0), value.expand(2, 3, 40, 32), atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 2.5}, "alpha must lie"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"operator": "gagg"}, "unknown operator 'gagg'"),
        ({"implementation": "cuda"}, "unknown implementation 'cuda'"),
        ({"operator": "gag", "unit": "heads"}, "unknown unit 'heads'"),
        ({"operator": "gag", "eta": -1.0}, "eta must be 0 or above"),
        ({"alpha": torch.tensor([1.5, 2.0])}, "alpha must have one element"),
        ({"mask": torch.ones(3, 1, 1, 2) > 0}, "mask .3, 1, 1, 2. does not broadcast"),
    ],
)
def test_what_is_out_of_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        attention(*tensors(queries=2, keys=2), **arguments)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 90), st.floats(1.0, 2.0), st.floats(-3.0, 4.0), st.integers(0, 1 << 30))
def test_scale_is_linear_between_dense_and_sparse(queries, keys, alpha, scale, seed):
    query, key, value = tensors(torch.float64, queries, keys, 8, seed)
    dense, sparse = (attention(query, key, value, alpha=alpha, scale=s) for s in (0.0, 1.0))
    mixed = attention(query, key, value, alpha=alpha, scale=scale)
    assert torch.allclose(mixed, (1 - scale) * dense + scale * sparse, atol=1e-9)
