"""The entmax solver against float64, the entmax package, and what entmax must satisfy."""

import math

import pytest
import torch
from entmax import entmax15, entmax_bisect, sparsemax
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.nn import entmax

from ..quick import quick
from .oracle import entmax_oracle, float32

ALPHAS = (1.0001, 1.001, 1.01, 1.05, 1.1, 1.25, 1.33, 1.5, 1.75, 1.9, 1.99, 2.0)
TOLERANCE = 2e-6  # float32, absolute; the largest seen in these cases is 7e-7


def slow_rows(keys):
    """Rows on which Newton's method needs its most steps: many keys near the threshold, in many patterns."""
    generator = torch.Generator().manual_seed(keys)
    rows = [
        torch.randn(8, keys, generator=generator) * spread for spread in (0.0, 0.03, 0.1, 0.3, 1.0, 3.0, 20.0, 100.0)
    ]
    rows += [torch.rand(8, keys, generator=generator) * spread for spread in (0.5, 1.0, 3.0, 10.0)]
    for depth in (0.1, 0.5, 0.9, 1.0, 1.5, 2.0, 5.0, 15.0, 20.0):
        plateau = torch.full((4, keys), -depth) + torch.randn(4, keys, generator=generator) * 1e-3
        plateau[:, 0] = 0.0
        ladder = -torch.linspace(0, 1, keys).pow(torch.linspace(0.1, 6, 8)[:, None]) * depth
        rows += [plateau, ladder]
    places = torch.arange(1, keys + 1)
    for depth in (0.1, 0.3, 1.0):  # stairs, each of twice as many keys, and roots
        rows += [-places.log2().floor()[None] * depth, -places.pow(torch.tensor([[0.2], [0.33]])) * depth]
    return torch.cat(rows)


@pytest.mark.parametrize("keys", quick([16, 77, 128, 129, 300, 512, 1024, 4608], 16, 77, 129, 1024))
def test_float32_stays_within_2e6_of_the_float64_oracle_for_any_alpha(keys):
    scores = slow_rows(keys)
    worst = {}
    for alpha in ALPHAS:
        found = entmax(scores, alpha)
        error = (found.double() - entmax_oracle(scores, float32(alpha))).abs()
        worst[alpha] = (error.max().item(), error.mean().item())
    print(f"{keys} keys, largest and mean error: " + ", ".join(f"{a}: {e:.1e} {m:.1e}" for a, (e, m) in worst.items()))
    assert max(error for error, _ in worst.values()) < TOLERANCE


@pytest.mark.parametrize("keys", [16, 77, 512, 4608])
def test_agrees_with_the_entmax_package(keys):
    scores = torch.randn(64, keys, generator=torch.Generator().manual_seed(0)) * 3
    assert (entmax(scores, 1.5) - entmax15(scores, dim=-1)).abs().max() < TOLERANCE
    assert (entmax(scores, 2.0) - sparsemax(scores, dim=-1)).abs().max() < TOLERANCE
    for alpha in (1.1, 1.25, 1.75):
        assert (entmax(scores.double(), alpha) - entmax_bisect(scores.double(), alpha, n_iter=80)).abs().max() < 1e-7


def test_alpha_one_is_softmax_and_float64_is_solved_in_float64():
    scores = torch.randn(32, 77, generator=torch.Generator().manual_seed(1)) * 4
    assert (entmax(scores, 1.0) - scores.softmax(-1)).abs().max() < 3e-6
    assert (entmax(scores.double(), 1.0) - scores.double().softmax(-1)).abs().max() < 1e-12
    exact = entmax(scores.double(), 1.5)
    assert exact.dtype == torch.float64
    assert (exact - entmax_oracle(scores, 1.5)).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_solved_in_float32_and_returned_in_its_own_dtype(dtype):
    scores = (torch.randn(16, 77, generator=torch.Generator().manual_seed(2)) * 3).to(dtype)
    found = entmax(scores, 1.5)
    assert found.dtype == dtype
    assert torch.equal(found, entmax(scores.float(), 1.5).to(dtype))


def test_masked_keys_get_nothing_and_a_masked_row_gets_zeros():
    scores = torch.randn(4, 20, generator=torch.Generator().manual_seed(3))
    masked = scores.clone()
    masked[:, 12:] = -math.inf
    masked[3] = -math.inf
    for alpha in (1.0, 1.3, 1.5, 2.0):
        found = entmax(masked, alpha)
        assert not found.isnan().any()
        assert torch.equal(found[:, 12:], torch.zeros(4, 8))
        assert torch.allclose(found[:3, :12], entmax(scores[:3, :12], alpha), atol=1e-6)
        assert torch.equal(found[3], torch.zeros(20))


def test_nan_is_not_hidden():
    scores = torch.zeros(2, 5)
    scores[0, 1] = math.nan
    found = entmax(scores, 1.5)
    assert found[0].isnan().any() and not found[1].isnan().any()


def test_any_dimension_and_a_tensor_alpha():
    scores = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(4))
    assert torch.equal(entmax(scores, 1.5, dim=1), entmax(scores.movedim(1, -1), 1.5).movedim(-1, 1))
    per_row = torch.tensor([1.2, 1.5, 2.0])[:, None, None]
    found = entmax(scores, per_row)
    for row, alpha in enumerate((1.2, 1.5, 2.0)):
        assert torch.equal(found[row], entmax(scores[row], alpha))


@pytest.mark.parametrize("alpha", [0.99, 2.01, -1.0, math.nan])
def test_an_alpha_outside_one_to_two_is_refused(alpha):
    with pytest.raises(ValueError, match=r"alpha must lie in \[1, 2\]"):
        entmax(torch.zeros(3), alpha)


def test_integer_scores_are_refused_as_softmax_refuses_them():
    with pytest.raises(TypeError, match=r"needs floating scores, not torch.int64"):
        entmax(torch.tensor([1, 2, 3]), 1.5)


def test_gradients_are_those_of_the_package():
    scores = torch.randn(6, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) * 2
    weights = torch.randn(6, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    for alpha, theirs in ((1.5, entmax15), (2.0, sparsemax)):
        gradients = []
        for function in (lambda z, a=alpha: entmax(z, a), lambda z, f=theirs: f(z, dim=-1)):
            leaf = scores.clone().requires_grad_()
            (function(leaf) * weights).sum().backward()
            gradients.append(leaf.grad)
        assert (gradients[0] - gradients[1]).abs().max() < 1e-9


def test_float64_is_solved_to_1e12_down_to_alpha_one_and_goes_over_into_softmax():
    scores = slow_rows(77).double()
    for alpha in (1.0 + 2.0**-52, 1.0 + 1e-12, 1.0 + 1e-9, 1.0 + 1e-6, 1.01, 1.25, 1.5, 1.75, 1.999, 2.0):
        error = (entmax(scores, alpha) - entmax_oracle(scores, alpha)).abs().max()
        assert error < 1e-12, f"alpha - 1 = {alpha - 1.0:.1e}: {error:.1e}"
    dense = scores.softmax(-1)
    gradients = []
    for function in (lambda z: entmax(z, 1.0), lambda z: z.softmax(-1)):
        leaf = scores.clone().requires_grad_()
        (function(leaf) * dense.cos()).sum().backward()
        gradients.append(leaf.grad)
    assert (gradients[0] - gradients[1]).abs().max() < 1e-12


def test_one_graph_serves_every_alpha_with_one_among_them():
    compiled = torch.compile(entmax, fullgraph=True, backend="eager", dynamic=False)
    scores = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for alpha in (1.0, 1.3, 1.5, 2.0):
            assert torch.equal(compiled(scores, torch.tensor(alpha)), entmax(scores, torch.tensor(alpha)))


ROWS = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=80)
ANY_ALPHA = st.floats(1.0, 2.0)


@settings(max_examples=200, deadline=None)
@given(ROWS, ANY_ALPHA)
def test_rows_are_distributions_in_the_order_of_their_scores(row, alpha):
    scores = torch.tensor(row)
    found = entmax(scores, alpha)
    assert (found >= 0).all()
    assert abs(found.sum().item() - 1.0) < 2e-6
    ordered = found[scores.argsort()]
    assert (ordered.diff() >= -1e-6).all()


@settings(max_examples=100, deadline=None)
@given(ROWS, ANY_ALPHA, st.floats(-50, 50))
def test_a_shift_of_all_scores_changes_nothing(row, alpha, shift):
    scores = torch.tensor(row, dtype=torch.float64)
    assert torch.allclose(entmax(scores + shift, alpha), entmax(scores, alpha), atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(ROWS, st.floats(1.0, 1.9))
def test_a_larger_alpha_never_has_a_larger_support(row, alpha):
    scores = torch.tensor(row, dtype=torch.float64)
    assert (entmax(scores, alpha + 0.1) > 1e-12).sum() <= (entmax(scores, alpha) > 0).sum()
