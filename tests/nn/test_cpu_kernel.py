"""The C++ kernel: its solver against float64 over all alphas and hard rows, and how its calls are kept and shared."""

import functools
import math
import os
import platform
import re
import subprocess
import threading
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch._inductor.cpp_builder import get_cpp_compiler

from surgery.nn import attention
from surgery.nn.kernels import cpu
from surgery.nn.kernels.cpu import fused_on_cpu
from surgery.nn.operators import OPERATORS
from surgery.nn.shipped import cpp_source

from ..quick import taking_turns
from .oracle import entmax_oracle, float32

ALPHAS = [1.0, 1.0001, 1.001, 1.02, 1.1, 1.2, 1.24999, 1.25, 1.33, 4 / 3, 1.4, 1.5, 1.6, 1.75, 1.9, 1.95, 1.9999, 2.0]
KINDS = [*((operator, "head") for operator, own in OPERATORS.items() if own.code is not None), ("gag", "token")]


def sparse_map(scores, alpha):
    """The sparse map of rows of scores, (rows, keys), by the kernel: head_dim 1, and values that pick a key each."""
    rows, keys = scores.shape
    found = torch.empty(rows, keys)
    query, key = torch.zeros(1, 1, rows, 1), torch.zeros(1, 1, keys, 1)
    for first in range(0, keys, 256):  # the scores come in as an additive mask, as they are
        value = torch.eye(keys)[:, first : first + 256][None, None]
        found[:, first : first + 256] = attention(
            query, key, value, operator="sparse", alpha=alpha, mask=scores, implementation="cpp"
        )[0, 0]
    return found


def hard_rows(keys):
    """Ties of 1 to all keys above the rest by 0.1 to 30, ramps, powers: what a threshold is hardest to find for."""
    rows = []
    for tied in sorted({1, 2, 3, 5, keys // 3, keys // 2, keys - 1, keys} & set(range(1, keys + 1))):
        for gap in (0.1, 0.5, 1.0, 2.0, 4.0, 30.0):
            rows.append(torch.where(torch.arange(keys) < tied, 0.0, -gap))
    for reach in (0.01, 0.3, 1.0, 3.0, 10.0, 100.0):
        rows.append(torch.linspace(0.0, -reach, keys))
        rows.append(-reach * torch.linspace(0.0, 1.0, keys).square())
        rows.append(-reach * torch.linspace(0.0, 1.0, keys).sqrt())
    return torch.stack(rows)


def check_map(scores, alpha):
    alpha = torch.tensor(alpha)
    found = sparse_map(scores, alpha).double()
    expected = scores.double().softmax(-1) if alpha == 1.0 else entmax_oracle(scores, alpha.double().item())
    error = (found - expected).abs().sum(-1)
    assert error.max() < 1e-5, f"alpha {alpha}: row {error.argmax()} is off by {error.max():.1e}"


@pytest.mark.parametrize(("alpha", "keys"), taking_turns(3, ALPHAS, [2, 3, 77, 300, 2000]))
def test_the_sparse_map_of_flat_and_of_peaked_rows(alpha, keys):
    generator = torch.Generator().manual_seed(keys)
    for spread in (0.05, 0.5, 2.0, 12.0):
        check_map(torch.randn(33, keys, generator=generator) * spread, alpha)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_sparse_map_of_hard_rows(alpha):
    for keys in (2, 7, 77, 300):
        check_map(hard_rows(keys), alpha)


def near_the_threshold(keys, alpha, generator):
    """Rows of a head and a plateau, 1e-6 to 1 wide, at the edge of the head's support, some keys masked."""
    random = functools.partial(torch.rand, generator=generator)
    rows = 64
    head = 1 + (random(rows, 1) ** 3 * keys / 2).long()
    depth = 3.0 * random(rows, 1) ** 3 * random(rows, keys)
    depth[:, 0] = 0.0
    first = torch.arange(keys) < head
    largest = entmax_oracle(depth.neg().masked_fill(~first, -1e4), alpha)[:, :1].float()
    edge = largest.pow(alpha - 1.0) / (alpha - 1.0) + (random(rows, 1) - 0.5) * 10.0 ** (-6.0 * random(rows, 1))
    scores = -torch.where(first, depth, edge + random(rows, keys) * 10.0 ** (-6.0 * random(rows, 1)))
    masked = random(rows, keys) < 0.6 * (random(rows, 1) - 0.5)
    masked[:, 0] = False
    return scores.masked_fill(masked, -math.inf)


def check_to_the_largest(scores, alpha):
    """Every weight to 1e-5 of its row's largest."""
    expected = entmax_oracle(scores, alpha)
    error = (sparse_map(scores, torch.tensor(alpha)).double() - expected).abs().amax(-1) / expected.amax(-1)
    assert error.max() < 1e-5, f"alpha {alpha}: row {error.argmax()} is off by {error.max():.1e} of its largest"


@pytest.mark.parametrize(("alpha", "keys"), taking_turns(3, ALPHAS[1:], [5, 93, 300, 2000]))
def test_the_sparse_map_of_plateaus_at_the_edge_of_the_support(alpha, keys):
    generator = torch.Generator().manual_seed(keys)
    check_to_the_largest(near_the_threshold(keys, float32(alpha), generator), float32(alpha))


CIRCLES = (  # a row of thousandths below the largest score
    "0 227 227 227 227 230 231 233 233 234 235 235 235 236 240 242 266 383 541 548 628 630 636 644 687 705 709 728 "
    "739 741 744 756 756 759 761 765 767 768 772 775 775 777 781 782 783 787 787 789 790 791 792 795 796 796 797 "
    "798 799 801 804 805 805 806 806 806 808 811 811 812 812 814 814 815 816 817 817 817 821 821 824 826 833 837 "
    "843 844 849 852 855 856 856 864 877 880 893 "
)


def test_steps_beyond_newtons_do_not_go_round_in_circles():
    # At alpha 2 the slope of this row's sum falls from 24 to 1 within a plateau below the threshold, and a step sped
    # up by the curve through the last two points leads from there far past the root, then back, for ever.
    row = -torch.tensor([int(thousandths) for thousandths in CIRCLES.split()]) / 1000
    random = torch.rand(2047, 1, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([row[None], row * (0.9 + 0.2 * random)])
    for alpha in (2.0, 1.999, 1.9, 1.5):
        check_to_the_largest(rows, float32(alpha))


def test_a_flat_row_and_many_small_weights_beside_a_large_one_keep_their_digits():
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(16, 2000, generator=generator) * 10.0 ** torch.linspace(-6.0, -2.0, 16)[:, None]
    beside = torch.linspace(0.1, 1.0, 16)[:, None] * torch.rand(16, 2000, generator=generator).neg() - 5.0
    beside[:, 0] = 0.0
    for alpha in ALPHAS[1:]:
        check_to_the_largest(torch.cat([flat, beside]), float32(alpha))


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    st.one_of(st.sampled_from(ALPHAS[1:]), st.floats(1.0001, 2.0)),
    st.lists(
        st.tuples(st.integers(1, 60), st.floats(0.0, 1.0) | st.floats(0.0, 20.0), st.floats(-6.0, 0.0)),
        min_size=1,
        max_size=6,
    ),
    st.integers(0, 1000),
)
def test_the_sparse_map_of_any_clusters_of_near_equal_scores(alpha, clusters, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = [-depth - torch.rand(keys, generator=generator) * 10.0**width for keys, depth, width in clusters]
    check_to_the_largest(torch.cat(scores)[None], float32(alpha))


def inputs(queries=40, keys=77, head_dim=24, dtype=torch.float32, seed=0, heads=3):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(2, n, heads, head_dim, generator=generator) for n in (queries, keys, keys)]
    return [tensor.to(dtype).transpose(1, 2) for tensor in made]


def float64(query, key, value, **how):
    return attention(query.double(), key.double(), value.double(), implementation="reference", **how)


def close(found, expected, tolerance=1e-5):
    return (found.double() - expected).abs().max() <= tolerance * expected.abs().max()


def test_the_lowest_number_as_an_additive_mask_is_no_masked_key():
    query, key, value = inputs()
    mask = torch.zeros(40, 77)
    mask[3] = torch.finfo(torch.float32).min
    mask[5] = -math.inf
    mask[7, ::2] = torch.finfo(torch.float32).min
    for operator, unit in KINDS:
        if unit == "token":
            continue
        found = attention(query, key, value, operator=operator, mask=mask, implementation="cpp")
        assert close(found, float64(query, key, value, operator=operator, mask=mask.double()))
        assert (found[:, :, 5] == 0).all()
    assert close(found[:, :, 3], value.double().mean(2), 1e-4)


@pytest.mark.parametrize("alpha", [1.0, 1.1, 1.5, 1.75, 2.0])
def test_what_is_not_finite_is_as_in_the_reference(alpha):
    query, key, value = inputs()
    query[0, 0, 1] = math.nan
    query[0, 0, 2] = math.inf
    key[1, 1, 5] = math.nan
    mask = torch.ones(77, dtype=torch.bool)
    mask[5] = False  # what a masked key holds does not matter, unlike what the value beside it does
    for operator, unit in KINDS:
        how = {"operator": operator, "unit": unit, "alpha": alpha, "return_lse": True}
        for given in (None, mask):
            found, lse = attention(query, key, value, mask=given, implementation="cpp", **how)
            expected, expected_lse = attention(query, key, value, mask=given, implementation="reference", **how)
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
            assert torch.allclose(lse, expected_lse, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("zeta", [0.0, 0.5, 1.0, -2.0, 30.0])
@pytest.mark.parametrize("size", [1e-25, 1.0, 1e15])
def test_gag_for_values_of_any_size_and_any_share_of_the_orthogonal_part(zeta, size):
    query, key, value = inputs()
    value = value * size
    for unit in ("head", "token"):
        for eta in (0.0, 0.3 * size, 1e30):
            how = {"operator": "gag", "unit": unit, "zeta": zeta, "eta": eta, "scale": 0.7}
            assert close(attention(query, key, value, implementation="cpp", **how), float64(query, key, value, **how))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_read_and_rounded_as_torch_does(dtype):
    query, key, _ = inputs(dtype=dtype, keys=1, queries=5)
    # One key: the output is its value, unchanged; small, subnormal, largest, infinite and odd numbers among them.
    value = torch.linspace(-3.0, 3.0, 24).to(dtype)
    limits = torch.finfo(dtype)
    value[:5] = torch.tensor([limits.max, limits.tiny / 8, -limits.smallest_normal / 2, 0.0, -limits.max], dtype=dtype)
    value = value.expand(2, 3, 1, 24)
    found = attention(query, key, value, scale=0.0, implementation="cpp")
    if dtype == torch.bfloat16:  # its subnormal numbers are float32's, which need not be kept
        found, value = found[..., 5:], value[..., 5:]
    assert torch.equal(found, value.expand_as(found))
    query, key, value = inputs(dtype=dtype)
    expected = attention(query.float(), key.float(), value.float(), implementation="cpp").to(dtype)
    assert torch.equal(attention(query, key, value, implementation="cpp"), expected)


def test_layouts_that_have_to_be_copied_and_dtypes_that_differ():
    query, key, value = inputs(head_dim=16)
    expected = float64(query, key, value)
    turned = [tensor.transpose(2, 3).contiguous().transpose(2, 3) for tensor in (query, key, value)]
    assert close(attention(*turned, implementation="cpp"), expected)
    assert close(attention(query, key.double(), value, implementation="cpp"), expected)
    assert close(
        attention(query, key[:, :1], value[:, :1], implementation="cpp"), float64(query, key[:, :1], value[:, :1])
    )


def test_no_queries_and_no_keys():
    query, key, value = inputs(head_dim=16)
    assert attention(query[:, :, :0], key, value, implementation="cpp").shape == (2, 3, 0, 16)
    found, lse = attention(query, key[:, :, :0], value[:, :, :0], implementation="cpp", return_lse=True)
    assert (found == 0).all() and (lse == -math.inf).all()


def settings_of(operator, **given):
    return [torch.tensor(float(given.get(name, number))) for name, number in OPERATORS[operator].defaults.items()]


def call(tensors, settings, operator="pladis", unit="head", mask=None):
    return fused_on_cpu(*tensors, settings, operator=operator, unit=unit, mask=mask, qk_scale=0.25, with_lse=True)[0]


@pytest.mark.parametrize(("operator", "unit"), KINDS)
def test_a_changed_hyperparameter_is_seen_by_the_next_call(operator, unit):
    tensors, settings = inputs(), settings_of(operator)
    for name in (None, *OPERATORS[operator].defaults):
        if name is not None:
            settings[list(OPERATORS[operator].defaults).index(name)].fill_(1.4 if "alpha" in name else 0.3)
        given = dict(zip(OPERATORS[operator].defaults, settings, strict=True))
        expected = float64(*tensors, operator=operator, unit=unit, qk_scale=0.25, **given)
        assert close(call(tensors, settings, operator, unit), expected)
        wide = [setting.double() for setting in settings]  # of another dtype: read all the same
        assert close(call(tensors, wide, operator, unit), expected)


def test_a_kept_call_is_not_taken_for_one_of_another_kind():
    wanted = {}
    for turn in range(2):
        for queries in (7, 40):
            for dtype in (torch.float32, torch.bfloat16):
                for masked in (None, "boolean", "additive"):
                    for operator, unit in KINDS:
                        tensors = inputs(queries=queries, dtype=dtype)
                        mask = None if masked is None else torch.arange(77) < 50
                        if masked == "additive":
                            mask = torch.zeros(77).masked_fill(~mask, -math.inf)
                        found = call(tensors, settings_of(operator), operator, unit, mask)
                        kind = (queries, dtype, masked, operator, unit)
                        assert torch.equal(wanted.setdefault(kind, found), found), (turn, kind)
    assert all(torch.equal(wanted[(*k[:2], "boolean", *k[3:])], wanted[k]) for k in wanted if k[2] == "additive")


def test_threads_that_call_at_once_get_their_own_results():
    cases = []
    for seed in range(6):
        operator, unit = KINDS[seed % len(KINDS)]
        cases.append(
            (inputs(seed=seed, queries=40 + seed % 2), settings_of(operator, alpha=1.1 + 0.1 * seed), operator, unit)
        )
    expected = [call(*case) for case in cases]
    wrong = []

    def work(start):
        for i in range(120):
            which = (start + i) % len(cases)
            if not torch.equal(call(*cases[which]), expected[which]):
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_its_source_compiles_without_a_warning_and_counts_the_operators_as_the_table_does():
    assert bool(cpu.compiler_flags()) == (platform.system() != "Windows")
    folder = Path(cpu.__file__).parent
    flags = (*cpu.compiler_flags(), "-std=c++17", "-O1", "-march=native", "-fopenmp", "-Wall")
    command = (get_cpp_compiler(), *flags, "-c", folder / "cpu.cpp", "-o", os.devnull)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    where = [line.partition("warning:")[0] for line in done.stderr.splitlines() if "warning:" in line]
    # GCC 12's own headers of AVX-512 warn of themselves on some machines (its bug 105593).
    assert done.returncode == 0 and all("/avx512" in place for place in where), done.stderr
    names = re.search(r"enum \{ (k\w+(?:, k\w+)*) \};  // each operator's code", cpp_source())[1].split(", ")
    codes = {name: own.code for name, own in OPERATORS.items() if own.code is not None}
    assert {name: f"k{name.capitalize()}" for name in codes} == {name: names[code] for name, code in codes.items()}


def test_whether_the_library_is_loaded_is_asked_without_building_it(run):
    script = """
from surgery.nn.kernels.cpu import compiler_is_available, library_is_loaded
before = library_is_loaded()
compiler_is_available()
print(before, library_is_loaded())
"""
    assert run(python=script, check=0).stdout.split() == ["False", "True"]
