"""The operators' formulas in float64, one query at a time, and what ties one operator to another."""

import math
from typing import get_args

import pytest
import torch

from surgery.nn import attention
from surgery.nn.operators import (
    HYPERPARAMETERS,
    LARGEST,
    OPERATIONS,
    OPERATORS,
    UNITS,
    OperatorName,
    Unit,
    later_defaults,
    operators_table,
    setting_problems,
    whole_setting,
)

from .oracle import entmax_oracle

SHAPE = {"batch": 2, "heads": 3, "queries": 9, "keys": 21, "head_dim": 8}


def tensors(dtype=torch.float64, seed=0, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    sizes = (SHAPE["queries"], SHAPE["keys"], SHAPE["keys"])
    made = [torch.randn(2, 3, n, 8, generator=generator, dtype=torch.float64) * spread for n in sizes]
    return [tensor.to(dtype) for tensor in made]


def outputs(query, key, value, alpha, temperature=1.0):
    """(T_d, T_s) in float64, by the oracle."""
    scores = query.double() @ key.double().transpose(-1, -2) / math.sqrt(query.shape[-1]) / temperature
    return scores.softmax(-1) @ value.double(), entmax_oracle(scores, alpha) @ value.double()


def gag_of_one(sparse, dense, scale, zeta, eta):
    """GAG eq. 11-13 on two vectors, written as the paper writes it."""
    residual = sparse - dense
    parallel = residual.dot(sparse) / sparse.dot(sparse) * sparse
    update = parallel + zeta * (residual - parallel)
    return sparse + scale * min(1.0, eta / update.norm().item()) * update


@pytest.mark.parametrize("unit", ["head", "token"])
@pytest.mark.parametrize(
    ("scale", "zeta", "eta"), [(10.0, 0.0, 15.0), (10.0, 0.0, 0.5), (4.0, 0.4, 0.7), (-2.0, 1.5, 9.0)]
)
def test_gag_is_the_papers_formula_for_every_query(unit, scale, zeta, eta):
    query, key, value = tensors()
    dense, sparse = outputs(query, key, value, 1.5, 0.8)
    expected = torch.empty_like(dense)
    for b in range(2):
        for row in range(SHAPE["queries"]):
            if unit == "token":
                whole = gag_of_one(sparse[b, :, row].flatten(), dense[b, :, row].flatten(), scale, zeta, eta)
                expected[b, :, row] = whole.view(3, 8)
            else:
                for head in range(3):
                    at = (b, head, row)
                    expected[at] = gag_of_one(sparse[at], dense[at], scale, zeta, eta)
    found = attention(query, key, value, operator="gag", scale=scale, zeta=zeta, eta=eta, unit=unit, temperature=0.8)
    assert (found - expected).abs().max() < 1e-9 * expected.abs().max()


def test_gag_at_zeta_one_without_bound_is_pladis_with_a_scale_one_larger():
    query, key, value = tensors()
    for scale in (-1.0, 0.0, 1.0, 9.0):
        for unit in ("head", "token"):
            gag = attention(query, key, value, operator="gag", scale=scale, zeta=1.0, eta=math.inf, unit=unit)
            pladis = attention(query, key, value, operator="pladis", scale=scale + 1.0)
            assert (gag - pladis).abs().max() < 1e-12 * pladis.abs().max()


def test_gags_bound_limits_the_length_of_its_step():
    query, key, value = tensors()
    _, sparse = outputs(query, key, value, 1.5)
    for eta in (0.0, 0.1, 1.0):
        step = attention(query, key, value, operator="gag", scale=1.0, eta=eta) - sparse
        assert step.norm(dim=-1).max() <= eta + 1e-9
        assert step.norm(dim=-1).max() > 0.9 * eta  # and it is reached


def test_sparse_is_pladis_at_scale_one():
    query, key, value = tensors()
    sparse = attention(query, key, value, operator="sparse", alpha=1.7, temperature=0.5)
    assert torch.equal(sparse, attention(query, key, value, operator="sparse", alpha=1.7, temperature=0.5, scale=9.0))
    assert (sparse - outputs(query, key, value, 1.7, 0.5)[1]).abs().max() < 1e-12


def test_anderson_is_a_combination_of_three_outputs_whose_weights_sum_to_one():
    query, key, value = tensors()
    dense, high = outputs(query, key, value, 1.5)
    _, low = outputs(query, key, value, 1.25)
    found = attention(query, key, value, operator="anderson", scale=1.7, scale_low=-0.4)
    assert (found - (1.7 * high - 0.4 * low + (1 - 1.7 + 0.4) * dense)).abs().max() < 1e-12
    default = attention(query, key, value, operator="anderson")
    assert (default - (high + low - dense)).abs().max() < 1e-12
    assert torch.allclose(
        attention(query, key, value, operator="anderson", scale=2.0, scale_low=0.0),
        attention(query, key, value, operator="pladis", scale=2.0),
    )


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_can_be_switched_off_to_dense_attention(operator):
    query, key, value = tensors()
    dense, _ = outputs(query, key, value, 1.5)
    off = attention(query, key, value, operator=operator, **OPERATORS[operator].off)
    assert (off - dense).abs().max() < 2e-6 * OPERATORS[operator].defaults.get("scale", 1.0)


@pytest.mark.parametrize("implementation", ["reference", "blocked", "cpp", "triton"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_nothing_finite_gives_nan_or_infinity(operator, implementation):
    if implementation == "triton" and operator == "anderson":
        pytest.skip("the same code as pladis; held by the next test's reference")
    generator = torch.Generator().manual_seed(0)
    half = torch.float16
    query, key, value = (torch.randn(1, 2, n, 16, generator=generator) for n in (5, 33, 33))
    cases = {
        "scores far beyond float16": (query * 2e4, key * 2e4, value, half),
        "all scores equal": (query, key[:, :, :1].expand_as(key), value, half),
        "values all zero": (query, key, value * 0.0, half),
        "one key": (query, key[:, :, :1], value[:, :, :1], half),
        "T_s and T_d alike": (query, key, value[:, :, :1].expand_as(value), half),
        "tiny values": (query, key, value * 1e-30, torch.float32),
    }
    for name, (q, k, v, dtype) in cases.items():
        for unit in ("head", "token") if operator == "gag" else ("head",):
            clamped = [t.clamp(-6e4, 6e4).to(dtype) if dtype == half else t for t in (q, k, v)]
            found = attention(*clamped, operator=operator, unit=unit, implementation=implementation)
            assert found.isfinite().all(), f"{name}, unit {unit}"
            if name in ("one key", "T_s and T_d alike"):
                assert torch.allclose(found, clamped[2][:, :, :1].expand_as(found), atol=2e-2), name


def test_weights_below_zero_are_not_clamped():
    query, key, _ = tensors()
    every_key = torch.eye(21, dtype=torch.float64).expand(2, 3, 21, 21)  # the output is the weights themselves
    for implementation in ("reference", "blocked"):
        weights = attention(query, key, every_key, scale=3.0, implementation=implementation)
        assert weights.min() < -0.1
        assert torch.allclose(weights.sum(-1), torch.ones(2, 3, 9, dtype=torch.float64))


def test_log_sum_exp_is_that_of_the_masked_scores_whatever_the_temperature():
    query, key, value = tensors()
    mask = torch.rand(2, 1, 9, 21, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[1, :, 3] = False
    scores = query @ key.transpose(-1, -2) / math.sqrt(8)
    expected = scores.masked_fill(~mask, -math.inf).logsumexp(-1)
    _, found = attention(query, key, value, mask=mask, temperature=0.7, return_lse=True)
    assert found.dtype == torch.float64 and found.shape == (2, 3, 9)
    assert torch.allclose(found, expected) and found[1, :, 3].eq(-math.inf).all()


@pytest.mark.parametrize("operator", OPERATORS)
def test_gradients_of_auto_are_those_of_the_formula(operator):
    query, key, value = (tensor[:1, :1].requires_grad_() for tensor in tensors(spread=0.7))
    assert torch.autograd.gradcheck(
        lambda *qkv: attention(*qkv, operator=operator, eta=0.6, zeta=0.3),
        (query, key, value),
        eps=1e-6,
        atol=1e-4,
        fast_mode=True,
    )


def test_the_table_is_read_without_torch_and_says_all_of_every_operator(run):
    code = "import sys, surgery.nn.operators, surgery.recipe; assert not {'torch', 'diffusers'} & set(sys.modules)"
    run(python=code, fresh=True, check=0)
    assert get_args(OperatorName) == tuple(OPERATORS) and get_args(Unit) == UNITS
    codes = [own.code for own in OPERATORS.values() if own.code is not None]
    assert sorted(codes) == list(range(len(codes)))
    assert {name for own in OPERATIONS.values() for name in own.defaults} == set(HYPERPARAMETERS)
    for name, own in OPERATORS.items():
        assert own.title and own.formula and own.source and set(own.off) <= set(own.defaults)
        assert not setting_problems({"operator": name}) and not setting_problems(whole_setting({"operator": name}))
        assert all(HYPERPARAMETERS[key].later for key in later_defaults(name)) and later_defaults(name).items() <= set(
            own.defaults.items()
        )
    table = "\n".join(operators_table())
    for name, own in OPERATORS.items():
        assert f"| `{name}` | " in table and own.source in table
    for name, limits in HYPERPARAMETERS.items():
        assert f"| `{name}` | {limits.meaning} | {limits.must} |" in table


@pytest.mark.parametrize(
    ("setting", "problems"),
    [
        (
            {},
            [f"unknown operator None; there are {', '.join(OPERATIONS)}"],
        ),
        (
            {"operator": "pladis", "unit": "head"},
            ["pladis has no unit; it has alpha, scale, temperature, sparse_temperature"],
        ),
        ({"operator": "gag", "unit": "heads"}, ["unknown unit 'heads'; there are head, token, image"]),
        (
            {"operator": "gag", "alpha_low": 1.1, "eta": -1.0, "zeta": math.inf},
            [
                "gag has no alpha_low; it has alpha, scale, temperature, zeta, eta, sparse_temperature, parallel, unit",
                "zeta must be a finite number, not inf",
                "eta must be 0 or above, not -1.0",
            ],
        ),
        ({"operator": "sparse", "alpha": True}, ["alpha must lie in [1, 2] (1 is softmax, 2 is sparsemax), not True"]),
    ],
)
def test_every_problem_of_a_setting_is_told(setting, problems):
    assert setting_problems(setting) == problems


def test_a_whole_setting_has_every_value_in_the_operators_order():
    setting = whole_setting({"operator": "gag", "eta": math.inf, "scale": 3})
    expected = {"operator": "gag", "alpha": 1.5, "scale": 3.0, "temperature": 1.0, "zeta": 0.0, "eta": LARGEST}
    expected |= {"sparse_temperature": 1.0, "parallel": 1.0}
    assert list(setting.items()) == [*expected.items(), ("unit", "head")]
