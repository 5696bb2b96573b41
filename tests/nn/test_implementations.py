"""The C++ kernel and the blocked form against the plain torch form in float64: operators, alphas, dtypes, masks.

The Triton kernels are held to the same in test_triton_kernel.py, and every implementation to random calls there.
"""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from surgery.nn import attention
from surgery.nn.kernels.cpu import compiler_is_available
from surgery.nn.kernels.reference import BLOCK_SCORES
from surgery.nn.operators import OPERATORS

# Largest difference from float64, relative to the largest output: float32's own rounding, or the half's.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}
ALPHAS = [1.0, 1.0001, 1.1, 1.25, 1.3, 4 / 3, 1.5, 1.6, 1.9, 2.0]
MORE = (1.0001, 1.3, 1.6, 1.9)  # between the others
OPERATORS_AND_UNITS = [*((operator, "head") for operator in OPERATORS), ("gag", "token")]


def tensors(dtype, batch=2, heads=2, queries=40, keys=77, head_dim=40, seed=0, spread=1.0):
    """query, key and value laid out as a module's projections are: (batch, length, heads, head_dim), transposed."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(batch, n, heads, head_dim, generator=generator) for n in (queries, keys, keys)]
    return [(t * s).to(dtype).transpose(1, 2) for t, s in zip(made, (spread, 1.0, 1.0), strict=True)]


def check(implementation, query, key, value, **how):
    expected, expected_lse = attention(
        query.double(), key.double(), value.double(), implementation="reference", return_lse=True, **how
    )
    found, lse = attention(query, key, value, implementation=implementation, return_lse=True, **how)
    error = (found.double() - expected).abs()
    largest = expected.abs().max().clamp_min(1e-3)
    print(
        f"{implementation} {query.dtype} {how}: largest {error.max() / largest:.1e}, mean {error.mean() / largest:.1e}"
    )
    assert found.dtype == value.dtype and found.shape == expected.shape
    assert error.max() < TOLERANCE[query.dtype] * largest
    finite = expected_lse.isfinite()
    assert torch.equal(lse.isfinite(), finite) and lse.dtype == torch.float32
    assert (lse[finite] - expected_lse[finite]).abs().max() < 2e-5 * expected_lse[finite].abs().max()
    assert torch.equal(found, attention(query, key, value, implementation=implementation, **how))


@pytest.mark.parametrize("implementation", ["blocked", "cpp"])
@pytest.mark.parametrize(("operator", "unit"), OPERATORS_AND_UNITS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_every_operator_in_every_dtype(implementation, operator, unit, dtype):
    settings = {"zeta": 0.3, "eta": 3.0} if operator == "gag" else {}
    check(implementation, *tensors(dtype), operator=operator, unit=unit, temperature=0.7, **settings)


@pytest.mark.parametrize("implementation", ["blocked", "cpp"])
@pytest.mark.parametrize("alpha", [pytest.param(a, marks=[pytest.mark.slow] * (a in MORE)) for a in ALPHAS])
def test_every_alpha_for_flat_and_for_peaked_scores(implementation, alpha):
    for spread in (0.05, 1.0, 12.0):
        check(implementation, *tensors(torch.float32, heads=1, batch=1, spread=spread), alpha=alpha, scale=1.7)


@pytest.mark.parametrize("implementation", ["blocked", "cpp"])
@pytest.mark.parametrize("kind", ["keys", "queries", "heads", "additive", "whole rows"])
def test_every_kind_of_mask(implementation, kind):
    generator = torch.Generator().manual_seed(5)
    random = torch.rand(2, 2, 40, 77, generator=generator)
    mask = {
        "keys": random[:, :1, :1] > 0.5,
        "queries": random[0, 0] > 0.5,
        "heads": random > 0.5,
        "additive": (random * 4 - 2).masked_fill(random > 0.9, -math.inf)[:, :1],
        "whole rows": (random > 0.5) & (torch.arange(40) % 3 != 0)[:, None],
    }[kind]
    for operator in ("pladis", "gag"):
        check(implementation, *tensors(torch.float32), operator=operator, mask=mask)


@pytest.mark.parametrize("keys", [1, 2, 16, 17, 33, 64, 65, 128, 129, 300])
def test_cpp_takes_any_number_of_keys_and_queries(keys):
    for queries in (1, 15, 64, 65):
        check("cpp", *tensors(torch.float32, queries=queries, keys=keys, head_dim=16))


def test_cpp_and_blocked_cut_long_inputs_between_heads_and_queries():
    query, key, value = tensors(torch.float32, batch=1, heads=2, queries=2100, keys=512, head_dim=16)
    assert BLOCK_SCORES < 2100 * 512
    mask = torch.rand(2100, 512, generator=torch.Generator().manual_seed(2)) > 0.3
    for implementation in ("cpp", "blocked"):
        check(implementation, query, key, value, mask=mask)
        check(implementation, query, key, value, operator="gag", unit="token")


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_cpp_does_not_depend_on_the_number_of_threads(threads):
    query, key, value = tensors(torch.float32)
    expected = attention(query, key, value, implementation="cpp")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert (attention(query, key, value, implementation="cpp") - expected).abs().max() < 1e-5
    finally:
        torch.set_num_threads(before)


def test_triton_says_what_it_cannot_take():
    cases = {
        "there are no keys": tensors(torch.float32, keys=0, queries=2),
        "head_dim 257 and 257 are not": tensors(torch.float32, head_dim=257, queries=2),
        "not float32, float16 or bfloat16": tensors(torch.float64, queries=2),
    }
    for message, made in cases.items():
        with pytest.raises(ValueError, match=f"implementation='triton' cannot take this: .*{message}"):
            attention(*made, implementation="triton")


def test_cpp_refuses_float64_and_says_what_it_is_for():
    with pytest.raises(ValueError, match="float32, float16 and bfloat16 on a CPU"):
        attention(*tensors(torch.float64), implementation="cpp")


def test_without_a_compiler_auto_warns_once_and_still_computes(tmp_path, run):
    assert compiler_is_available()
    script = """
import warnings, torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from surgery.nn import attention
q, k, v = (torch.randn(1, 4, n, 16) for n in (2048, 77, 77))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    found = [attention(q, k, v) for _ in range(3)]
assert (found[0] - attention(q, k, v, implementation="reference")).abs().max() < 1e-5
print([str(w.message) for w in caught if "attention kernel" in str(w.message)])
try:
    attention(q, k, v, implementation="cpp")
except RuntimeError as error:
    print(error)
"""
    environment = {"CXX": "no-such-compiler", "PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = run(python=script, env=environment, check=0)
    warned, refused = done.stdout.strip().splitlines()
    assert warned.count("cannot be built") == 1 and "g++" in warned
    assert "needs a C++ compiler" in refused


@pytest.mark.parametrize("implementation", ["reference", "blocked", "cpp"])
def test_what_is_infinite_or_no_number_is_as_in_dense_attention(implementation):
    query, key, value = tensors(torch.float32, batch=1, head_dim=8)
    for name, at in (("mask", (..., 3, 5)), ("query", (..., 3, 2)), ("key", (..., 5, 2)), ("value", (..., 5, 2))):
        for number in (math.inf, -math.inf, math.nan, torch.finfo(torch.float32).min):
            given = {"query": query, "key": key, "value": value, "mask": torch.zeros(1, 1, 40, 77)}
            given[name] = given[name].clone()
            given[name][at] = number
            if name == "mask" and number < 0:
                given[name][..., 3, :] = number  # a whole row
            with sdpa_kernel(SDPBackend.MATH):
                dense = torch.nn.functional.scaled_dot_product_attention(
                    given["query"], given["key"], given["value"], given["mask"]
                )
            for scale in (0.0, 1.0):
                found = attention(**given, scale=scale, implementation=implementation)
                assert torch.equal(found.isfinite(), dense.isfinite()), (name, number, scale)
                if scale == 0.0 and number == torch.finfo(torch.float32).min and name == "mask":
                    assert (found - dense).abs().max() < 1e-5
