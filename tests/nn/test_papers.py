"""The papers' formulas beyond the defaults, in float64 from their text: temperatures, units, Anderson's weights."""

import functools
import itertools
import math

import pytest
import torch

from surgery.nn import attention, decompositions, joint_attention
from surgery.nn.kernels.combined import is_combined
from surgery.nn.operators import OPERATORS, UNITS

from ..quick import quick
from .oracle import entmax_oracle, float32

# Where each tile's kernel, the blocked form and the definition do their own; L2 error over the output's own length.
LIMITS = {"reference": 5e-6, "blocked": 5e-6, "cpp": 1e-5, "triton": 3e-5}
BATCH, HEADS, QUERIES, DIM = 2, 2, 7, 8


def tensors(keys=21, seed=0, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    sizes = (QUERIES, keys, keys)
    return [torch.randn(BATCH, HEADS, n, DIM, generator=generator) * spread for n in sizes]


def outputs(query, key, value, alphas, temperature=1.0, sparse_temperature=1.0):
    """(T_d, T_alpha of each alpha) in float64."""
    scores = query.double() @ key.double().transpose(-1, -2) / math.sqrt(DIM) / temperature
    sharp = scores / sparse_temperature
    maps = [sharp.softmax(-1) if alpha == 1.0 else entmax_oracle(sharp, alpha) for alpha in alphas]
    return [weights @ value.double() for weights in (scores.softmax(-1), *maps)]


def units_of(tensor, unit):
    """The tensor as (units, numbers of one unit)."""
    order = {"head": (0, 1, 2, 3), "token": (0, 2, 1, 3), "image": (0, 1, 2, 3)}[unit]
    start = {"head": 3, "token": 2, "image": 1}[unit]
    return tensor.permute(order).flatten(start).flatten(0, start - 1)


def from_units(rows, unit):
    shape = (BATCH, QUERIES, HEADS, DIM) if unit == "token" else (BATCH, HEADS, QUERIES, DIM)
    whole = rows.reshape(shape)
    return whole.transpose(1, 2) if unit == "token" else whole


def off(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def gag_of_one(sparse, dense, scale, zeta, eta, parallel):
    """GAG eq. 11-13 on two vectors; `parallel` 0 with zeta 1 is the paper's orthogonal part alone (Fig. 4, 5c)."""
    residual = sparse - dense
    along = residual.dot(sparse) / sparse.dot(sparse) * sparse
    update = parallel * along + zeta * (residual - along)
    return sparse + scale * min(1.0, eta / update.norm().item()) * update


ALPHAS = (1.0, 1.0005, 1.25, 1.5, 1.8, 2.0)
WITH_ALPHAS = [(implementation, alpha) for implementation in LIMITS for alpha in ALPHAS]


@pytest.mark.parametrize(  # Triton's interpreter takes seconds
    ("implementation", "alpha"),
    quick(WITH_ALPHAS, *(one for one in WITH_ALPHAS if one[0] != "triton" or one[1] in (1.0005, 1.8))),
)
def test_the_sparse_map_has_a_temperature_of_its_own(implementation, alpha):
    for keys, sparse_temperature in ((21, 0.3), (21, 2.5), (140, 0.3 if alpha < 1.5 else 2.5)):
        query, key, value = tensors(keys)
        expected = at_its_own_temperature(keys, alpha, sparse_temperature)
        if implementation == "triton":  # interpreted
            query, key, value = (tensor[:1, :1] for tensor in (query, key, value))
            expected = {operator: output[:1, :1] for operator, output in expected.items()}
        temperatures = {"temperature": 0.8, "sparse_temperature": float32(sparse_temperature)}
        for operator, more in (("pladis", {}), ("anderson", {"scale": 1.7, "scale_low": -0.4})):
            how = {"operator": operator, "alpha": float32(alpha), "implementation": implementation, **more}
            found, lse = attention(query, key, value, **how, **temperatures, return_lse=True)
            assert off(found, expected[operator]) < LIMITS[implementation]
            scores = query.double() @ key.double().transpose(-1, -2) / math.sqrt(DIM)
            assert torch.allclose(lse.double(), scores.logsumexp(-1), atol=1e-4)


@functools.cache
def at_its_own_temperature(keys, alpha, sparse_temperature):
    """{operator: its output for `tensors(keys)`} at a temperature of 0.8 and at another of the sparse map."""
    alphas = (float32(alpha), 1.25)
    dense, sparse, low = outputs(*tensors(keys), alphas, float32(0.8), float32(sparse_temperature))
    return {
        "pladis": dense + 2.0 * (sparse - dense),
        "anderson": 1.7 * sparse - 0.4 * low + (1.0 - 1.7 + 0.4) * dense,
    }


def test_softmax_with_pladis_is_softmax_at_a_lower_temperature_extrapolated():
    """Fig. 9, "Softmax + PLADIS": at alpha 1 the temperature still acts, and at 1 there is nothing to extrapolate."""
    query, key, value = (tensor.double() for tensor in tensors())
    dense, sharp = outputs(query, key, value, (1.0,), 1.0, 0.5)
    found = attention(query, key, value, alpha=1.0, scale=3.0, sparse_temperature=0.5)
    assert off(found, dense + 3.0 * (sharp - dense)) < 1e-12
    assert off(attention(query, key, value, alpha=1.0, scale=3.0), dense) < 1e-12


@pytest.mark.parametrize("implementation", LIMITS)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(
    ("zeta", "parallel", "eta"), [(0.0, 1.0, 15.0), (1.0, 0.0, 15.0), (0.4, 1.0, 0.7), (0.3, -0.5, 1.0)]
)
def test_gag_over_heads_tokens_and_whole_images_and_by_either_part(implementation, unit, zeta, parallel, eta):
    query, key, value = tensors()
    numbers = {"scale": 4.0, "zeta": float32(zeta), "eta": float32(eta), "parallel": parallel}
    how = {"operator": "gag", "unit": unit, "sparse_temperature": 0.6, "implementation": implementation}
    expected = gag_of_all(unit, **numbers)
    assert off(attention(query, key, value, **how, **numbers), expected) < 3 * LIMITS[implementation]


@functools.cache
def gag_of_all(unit, **numbers):
    """GAG of `tensors()` at a sparse temperature of 0.6, unit by unit."""
    dense, sparse = outputs(*tensors(), (1.5,), 1.0, float32(0.6))
    rows = zip(units_of(sparse, unit), units_of(dense, unit), strict=True)
    return from_units(torch.stack([gag_of_one(*pair, **numbers) for pair in rows]), unit)


def simplex_weights(outputs, query):
    """The weights of Appendix F by looking at every face of the simplex: float64, one unit."""
    residuals = torch.stack([output - query for output in outputs])  # (terms, numbers)
    best, shortest = None, math.inf
    for count in range(1, len(outputs) + 1):
        for face in itertools.combinations(range(len(outputs)), count):
            # Minimise |sum w_i r_i| with sum 1 on this face: r_0 + sum t_i (r_i - r_0), by least squares.
            chosen = residuals[list(face)]
            steps = (chosen[1:] - chosen[0]).T
            shares = (
                torch.linalg.lstsq(steps, -chosen[0], driver="gelsd").solution if count > 1 else chosen.new_zeros(0)
            )
            weights = residuals.new_zeros(len(outputs))
            weights[list(face)] = torch.cat([1.0 - shares.sum()[None], shares])
            length = (weights[:, None] * residuals).sum(0).norm().item()
            if weights.min() >= 0.0 and length < shortest - 1e-15:
                best, shortest = weights, length
    return best


def test_the_oracle_itself_finds_the_shortest_residual_of_a_fine_grid():
    grid = torch.linspace(0.0, 1.0, 101, dtype=torch.float64)
    weights = torch.stack([w for a in grid for b in grid if a + b <= 1.0 for w in [torch.stack([a, b, 1.0 - a - b])]])
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        made = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        query = torch.randn(4, generator=generator, dtype=torch.float64)
        lengths = (weights @ (made - query)).norm(dim=-1)
        found = (simplex_weights(made, query)[:, None] * (made - query)).sum(0).norm()
        assert found <= lengths.min() and lengths.min() - found < 0.05


@pytest.mark.parametrize("implementation", LIMITS)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(("alpha_low", "spread"), [(1.25, 1.0), (1.25, 0.2), (1.0, 1.0)])
def test_andersons_weights_are_the_least_squares_of_the_residuals_on_the_simplex(
    implementation, unit, alpha_low, spread
):
    """Appendix F with m = 2, and with m = 1, where the second map is the dense one."""
    query, key, value = tensors()
    expected, weights = mixed_by_least_squares(unit, alpha_low, spread)
    how = {"operator": "anderson_least_squares", "unit": unit, "alpha_low": alpha_low}
    found = attention(query * spread, key, value, implementation=implementation, **how)
    assert off(found, expected) < 2e-5 + LIMITS[implementation]  # a triangle may be so thin that float32 sees a line
    if unit == "head" and spread == 1.0 and alpha_low > 1.0:
        kinds = {tuple((one > 1e-9).tolist()) for one in weights}
        assert len(kinds) >= 3


@functools.cache
def mixed_by_least_squares(unit, alpha_low, spread):
    """(the outputs of `tensors()`, their weights), unit by unit."""
    query, key, value = tensors()
    query = query * spread
    dense, sparse, low = outputs(query, key, value, (1.5, alpha_low))
    # Some queries lie nearest to a corner, some to a side, some to the inside.
    terms = [units_of(t, unit) for t in ((sparse, low, dense) if alpha_low > 1.0 else (sparse, dense))]
    rows = zip(*terms, units_of(query.double(), unit), strict=True)
    weights = [simplex_weights(row[:-1], row[-1]) for row in rows]
    made = [sum(w * t for w, t in zip(one, parts, strict=True)) for one, *parts in zip(weights, *terms, strict=True)]
    return from_units(torch.stack(made), unit), weights


class Called(torch.nn.Module):
    """`attention` as a module, for torch.export."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, query, key, value):
        return attention(query, key, value, **self.how)[0]


COMBINED = [
    (operator, unit, dtype)
    for operator, unit in [("gag", "image"), *(("anderson_least_squares", unit) for unit in UNITS)]
    for dtype in (torch.float32, torch.bfloat16)
]


def test_only_what_no_kernel_holds_in_one_pass_is_combined_of_whole_outputs():
    combined = {(operator, unit) for operator, unit, _ in COMBINED}
    assert {(operator, unit) for operator in ("pladis", "gag", "anderson_least_squares") for unit in UNITS
            if is_combined(operator, unit)} == combined  # fmt: skip


@pytest.mark.parametrize(("operator", "unit", "dtype"), quick(COMBINED, COMBINED[0], COMBINED[3], COMBINED[6]))
def test_what_is_combined_of_whole_outputs_is_one_node_and_follows_masks(operator, unit, dtype):
    query, key, value = (tensor.to(dtype) for tensor in tensors(spread=1.0))
    mask = torch.rand(BATCH, 1, QUERIES, 21, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[1, :, 3] = False
    how = {"operator": operator, "unit": unit, "mask": mask, "return_lse": True}
    exact = [tensor.double() for tensor in (query, key, value)]
    expected, expected_lse = attention(*exact, implementation="reference", **how)

    def call(query, key, value):
        return attention(query, key, value, **how)

    limit = 1e-5 if dtype == torch.float32 else 2e-2
    for found, lse in (
        call(query, key, value),
        torch.compile(call, fullgraph=True, backend="aot_eager")(query, key, value),
    ):
        assert found.dtype == dtype and off(found, expected) < limit
        assert torch.allclose(lse[expected_lse.isfinite()].double(), expected_lse[expected_lse.isfinite()], atol=1e-4)
    program = torch.export.export(Called(how), (query, key, value))
    plain = program.run_decompositions(decompositions())
    nodes = [[str(node.target) for node in one.graph.nodes if "pladis" in str(node.target)] for one in (program, plain)]
    assert len(nodes[0]) == 1 and not nodes[1]
    for one in (program, plain):
        assert off(one.module()(query, key, value), expected) < limit


@pytest.mark.parametrize("implementation", ["auto", "triton", "blocked"])
@pytest.mark.parametrize(
    ("operator", "unit"), [("gag", "image"), ("anderson_least_squares", "token"), ("pladis", "head")]
)
def test_in_joint_attention_text_keeps_its_share_of_each_row(implementation, operator, unit):
    text = 6
    query, key, value = (torch.cat(pair, 2) for pair in zip(tensors(text, 3), tensors(9, 4), strict=True))
    query = torch.cat([torch.zeros(BATCH, HEADS, text, DIM), tensors(9, 5)[0]], 2)
    key, value = (tensor[:, :, : text + QUERIES] for tensor in (key, value))
    how = {"operator": operator, "sparse_temperature": 0.7, **({} if operator == "pladis" else {"unit": unit})}
    found = joint_attention(query, key, value, text_length=text, implementation=implementation, **how)
    exact = [tensor.double() for tensor in (query, key, value)]
    image, words = slice(text, None), slice(0, text)
    rows = exact[0][:, :, image]
    changed = attention(rows, *(t[:, :, words] for t in exact[1:]), implementation="reference", **how)
    weights = (rows @ exact[1].transpose(-1, -2) / math.sqrt(DIM)).softmax(-1)
    expected = weights[..., image] @ exact[2][:, :, image] + weights[..., words].sum(-1, keepdim=True) * changed
    assert off(found[:, :, image], expected) < 3e-5


def test_every_later_hyperparameter_at_its_default_changes_nothing():
    query, key, value = tensors()
    for operator, own in OPERATORS.items():
        said = {name: 1.0 for name in ("sparse_temperature", "parallel") if name in own.defaults}
        for implementation in ("reference", "cpp"):
            plain = attention(query, key, value, operator=operator, implementation=implementation)
            assert torch.equal(
                plain, attention(query, key, value, operator=operator, implementation=implementation, **said)
            )
