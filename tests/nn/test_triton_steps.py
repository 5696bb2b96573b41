"""The Triton kernels take enough steps: weights of rows that are hard for the solver, against bisection in float64.

The weights themselves are the output: key and value are blocks of the identity matrix, so a row's scores are its query
and its output is the share of each group of equal keys. Half precision's numbers of steps run on float16 tensors also
where they are bfloat16's: what bfloat16 rounds away is not what is measured.
"""

import pytest
import torch

from surgery.nn.kernels import triton_kernel
from surgery.nn.kernels.reference import empty_outputs
from surgery.nn.operators import OPERATORS

from .oracle import entmax_oracle, float32

pytest.importorskip("triton")

# Largest L1 error of a row's weights, by the digits that the solver has to find: bfloat16's, float16's, float32's.
LIMITS = {8: 8e-3, 11: 1.5e-3, 24: 2e-5}  # about two units in the last place of the weights' dtype
# The highest alpha of each number of steps, and those that are compiled for themselves or have no steps.
ALPHAS = (1.0009, 1.0011, 1.07, 1.2, 1.25, 1.4999, 1.5, 1.75, 1.9, 1.9999, 2.0)
# (keys, groups of equal keys, operator): the short kernel, scores held in registers, streamed with and without the last
# step left to the weights.
SHAPES = {
    "short 16": (16, 16, "sparse"),
    "short 77": (77, 77, "sparse"),
    "short 128": (128, 128, "sparse"),
    "held 200": (200, 100, "sparse"),
    "held 320": (320, 128, "sparse"),
    "streamed 512": (512, 128, "sparse"),
    "streamed 600": (600, 256, "sparse"),
    "streamed 256 in gag": (256, 256, "gag"),
    "streamed 1500": (1500, 256, "sparse"),
}


def group_sizes(keys, groups):
    """How many keys are in each group: one in the first half of the groups, the rest shared by the others."""
    sizes = torch.ones(groups, dtype=torch.long)
    more, half = keys - groups, groups - groups // 2
    sizes[groups // 2 :] += more // half
    sizes[groups - more % half :] += 1 if more % half else 0
    assert sizes.sum() == keys
    return sizes


def hard_rows(groups):
    """Scores (rows, groups): ties of any number of keys at any distance, ramps, powers, Gaussian spreads."""
    place = torch.arange(groups)
    share = place / max(1, groups - 1)
    rows = []
    counts = sorted({min(groups, count) for count in (1, 2, 3, 5, 8, 13, 21, 40, 60, 76, 100, 127, 200, groups)})
    for count in counts:
        for gap in (0.1, 0.3, 1.0, 2.0, 3.0, 10.0, 30.0):
            rows.append(torch.where(place < count, 0.0, -gap))
            rows.append(torch.where(place < count, 0.0, torch.where(place < 3 * count, -gap / 3, -gap)))
    for span in (0.1, 0.5, 1.0, 3.0, 10.0, 30.0, 100.0):
        rows += [-span * share**power for power in (0.2, 0.5, 1.0, 2.0, 4.0)]
    generator = torch.Generator().manual_seed(0)
    for spread in (0.05, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0):
        rows += list(spread * torch.randn(16, groups, generator=generator))
    return torch.stack(rows)


def worst_row(shape, bits, alpha):
    """(largest L1 error of any row, that row's scores) of the kernel with the steps of a dtype of so many bits."""
    keys, groups, operator = SHAPES[shape]
    dtype = torch.float32 if bits == 24 else torch.float16
    sizes = group_sizes(keys, groups)
    group = torch.repeat_interleave(torch.arange(groups), sizes)
    query = hard_rows(groups).to(dtype)
    key = torch.eye(groups, dtype=dtype)[group]
    query, key = query[None, None], key[None, None]
    output, _ = empty_outputs(query, key, False)
    numbers = {**OPERATORS[operator].defaults, "alpha": alpha, **({"scale": 0.0} if operator == "gag" else {})}
    settings = [torch.tensor(number) for number in numbers.values()]  # at scale 0 gag is its T_s
    (code,) = triton_kernel._codes(operator, "head")
    launch = triton_kernel._Launch(query, key, key, None, output, None, code, 1.0, False)
    assert launch.fixed["HALF_BITS"] in (11, 24) and launch.short == shape.startswith("short")
    assert (launch.fixed.get("PAIRS", 0) > 0) == (shape.startswith("held") and bits != 24)
    launch.fixed["HALF_BITS"] = bits
    tensors = (query, key, key, None, output, None, None, None, None, settings, operator, launch.short)
    launch.now(triton_kernel._arguments(*tensors))
    scores = query[0, 0].double()[:, group]
    expected = entmax_oracle(scores, float32(alpha))
    expected = torch.zeros(len(scores), groups, dtype=torch.float64).index_add_(1, group, expected)
    errors = (output[0, 0].double() - expected).abs().sum(-1)
    assert errors.isfinite().all()
    return errors.max().item(), query[0, 0, errors.argmax()].tolist()


def cases():
    """Every shape, dtype and alpha; a sample of them is not slow."""
    found = []
    for i, shape in enumerate(SHAPES):
        for j, bits in enumerate(LIMITS):
            for k, alpha in enumerate(ALPHAS):
                often = shape in ("short 77", "short 128", "held 320")
                sampled = (i + 2 * j + k) % (11 if often else 23) == 0 and not shape.startswith("streamed")
                sampled = sampled and not (shape.startswith("held") and bits == 24)  # a quarter of a minute
                found.append(pytest.param(shape, bits, alpha, marks=() if sampled else pytest.mark.slow))
    return found


@pytest.mark.parametrize(("shape", "bits", "alpha"), cases())
def test_the_steps_suffice_for_the_dtype(shape, bits, alpha):
    error, row = worst_row(shape, bits, alpha)
    assert error < LIMITS[bits], f"L1 error {error:.1e} with scores {[round(score, 3) for score in row]}"
