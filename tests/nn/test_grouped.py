"""Heads of queries that share heads of keys: every implementation against the papers' formulas, written out by head."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.nn import attention
from surgery.nn.joint import decompositions, joint_attention
from surgery.nn.kernels.reference import BLOCK_SCORES
from surgery.nn.kernels.triton_kernel import triton_is_ready

from ..quick import one_in
from .oracle import entmax_oracle, float32

ON_CPU = ("auto", "reference", "blocked", "cpp")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 3e-5, torch.bfloat16: 6e-2}
KINDS = [("pladis", "head"), ("sparse", "head"), ("gag", "head"), ("gag", "token"), ("gag", "image")]


def tensors(group, key_heads=2, batch=2, queries=11, keys=19, channels=16, dtype=torch.float64, seed=0):
    """query, key and value laid out as a module's projections are."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((queries, group * key_heads), (keys, key_heads), (keys, key_heads))
    made = [torch.randn(batch, n, heads, channels, generator=generator, dtype=torch.float64) for n, heads in sizes]
    return [tensor.to(dtype).transpose(1, 2) for tensor in made]


def padded(batch, keys):
    """(batch, 1, 1, keys): all entries but the first have no key from the third on."""
    mask = torch.ones(batch, 1, 1, keys, dtype=torch.bool)
    mask[1:, ..., 3:] = False
    return mask


def of_each_head(query, key, value):
    """The three in float64, query head i with its key head i // group."""
    own = [head * key.shape[1] // query.shape[1] for head in range(query.shape[1])]
    return query.double(), key.double()[:, own], value.double()[:, own]


def by_head(query, key, value, mask, operator, unit, alpha, scale, eta=1.0):
    """(output, log-sum-exp) in float64: PLADIS eq. 15, GAG eq. 11 to 13 at its zeta of 0."""
    query, key, value = of_each_head(query, key, value)
    z = query @ key.mT / math.sqrt(query.shape[3])
    z = z if mask is None else z.masked_fill(~mask, -math.inf)
    exact, dense, sums = entmax_oracle(z, alpha) @ value, z.softmax(-1) @ value, z.exp().sum(-1).log()
    if operator != "gag":
        return exact if operator == "sparse" else dense + scale * (exact - dense), sums
    dims = {"head": (3,), "token": (1, 3), "image": (1, 2, 3)}[unit]
    residual = exact - dense
    along = (residual * exact).sum(dims, keepdim=True) / exact.square().sum(dims, keepdim=True) * exact
    length = along.square().sum(dims, keepdim=True).sqrt()
    return exact + scale * (eta / length).clamp_max(1.0) * along, sums


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    group=st.sampled_from((1, 2, 4)),
    key_heads=st.integers(1, 3),
    implementation=st.sampled_from(ON_CPU),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    keys=st.sampled_from((3, 19, 70)),
    masked=st.booleans(),
    alpha=st.sampled_from((1.25, 1.5, 1.7, 2.0)),
    seed=st.integers(0, 99),
)
def test_each_head_has_its_groups_keys(group, key_heads, implementation, kind, dtype, keys, masked, alpha, seed):
    query, key, value = tensors(group, key_heads, keys=keys, dtype=dtype, seed=seed)
    mask = padded(2, keys) if masked else None
    how = {"alpha": float32(alpha), **({} if kind[0] == "sparse" else {"scale": 1.5})}
    check(query, key, value, mask, kind, how, implementation)


def check(query, key, value, mask, kind, how, implementation):
    """Compare an implementation with the formulas."""
    operator, unit = kind
    expected, expected_lse = by_head(query, key, value, mask, operator, unit, how["alpha"], 1.5)
    more = {"eta": 1.0, "zeta": 0.0} if operator == "gag" else {}
    more |= {"operator": operator, "unit": unit, "implementation": implementation, "return_lse": True}
    found, lse = attention(query, key, value, mask=mask, **how, **more)
    assert found.shape == query.shape and found.dtype == query.dtype
    assert (found.double() - expected).abs().max() < TOLERANCE[query.dtype] * expected.abs().max()
    assert (lse.double() - expected_lse).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("keys", "kind", "dtype", "masked"),
    one_in(
        2,
        [
            (19, ("pladis", "head"), torch.float32, False),  # short
            (19, ("gag", "token"), torch.bfloat16, True),
            (150, ("pladis", "head"), torch.bfloat16, False),  # held
            (150, ("sparse", "head"), torch.bfloat16, True),
            (150, ("gag", "head"), torch.float32, True),  # streamed
        ],
    ),
)
def test_a_gpus_kernels_read_the_keys_of_the_group(monkeypatch, keys, kind, dtype, masked):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    query, key, value = tensors(2, batch=2, queries=3, keys=keys, dtype=dtype)
    how = {"alpha": 1.5, **({} if kind[0] == "sparse" else {"scale": 1.5})}
    check(query, key, value, padded(2, keys) if masked else None, kind, how, "triton")


def test_the_plain_forms_are_exact_with_masks_of_each_head_and_in_pieces_of_part_of_a_group():
    query, key, value = tensors(4, queries=9, keys=30)
    mask = torch.rand(2, 8, 9, 30, generator=torch.Generator().manual_seed(1)) > 0.4
    wide = [tensor.repeat_interleave(4, dim=1) for tensor in (key, value)]
    for operator in ("pladis", "gag", "anderson", "anderson_least_squares", "anderson_history"):
        for implementation in ("reference", "blocked"):
            how = {"mask": mask, "operator": operator, "implementation": implementation}
            assert (attention(query, key, value, **how) - attention(query, *wide, **how)).abs().max() < 1e-12
    query, key, value = tensors(4, batch=1, key_heads=1, queries=700, keys=512, channels=2)
    assert BLOCK_SCORES // (700 * 512) == 2  # of the four heads
    pieces, whole = (attention(query, key, value, implementation=form) for form in ("blocked", "reference"))
    assert (pieces - whole).abs().max() < 1e-12


@pytest.mark.parametrize("implementation", [*ON_CPU, "triton"])
@pytest.mark.parametrize("masked", [False, True])
def test_joint_attention_shares_heads_of_keys(monkeypatch, implementation, masked):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for dtype in (torch.float64, torch.float32) if implementation in ("auto", "reference") else (torch.float32,):
        for group, text_first in ((2, True),) if implementation == "triton" else ((2, True), (4, False)):
            query, key, value = tensors(group, queries=19, dtype=dtype)
            mask = padded(2, 7) if masked else None
            if masked:  # of the text alone
                image = torch.ones(2, 1, 1, 12, dtype=torch.bool)
                mask = torch.cat([mask, image] if text_first else [image, mask], dim=3)
            found = joint_attention(
                query, key, value, text_length=7, text_first=text_first, mask=mask, implementation=implementation
            )
            expected = jointly_by_head(query, key, value, mask, slice(0, 7) if text_first else slice(12, 19))
            assert (found.double() - expected).abs().max() < TOLERANCE[dtype] * expected.abs().max()


def jointly_by_head(query, key, value, mask, text):
    """PLADIS at its defaults where image queries meet text keys, with the share that text has in the softmax."""
    query, key, value = of_each_head(query, key, value)
    z = query @ key.mT / math.sqrt(query.shape[3])
    z = z if mask is None else z.masked_fill(~mask, -math.inf)
    dense = z.softmax(-1)
    changed = dense.clone()
    share = dense[..., text].sum(-1, keepdim=True)
    of_text = dense[..., text] / share
    changed[..., text] = share * (of_text + 2.0 * (entmax_oracle(z[..., text], 1.5) - of_text))
    changed[:, :, text] = dense[:, :, text]
    return changed @ value


def test_in_a_graph_keys_stay_few_and_the_decomposition_is_the_same():
    class Both(torch.nn.Module):
        def forward(self, query, key, value):
            return attention(query, key, value), joint_attention(query, key, value, text_length=5)

    query, key, value = tensors(4, queries=19, dtype=torch.float32)
    expected = Both()(query, key, value)
    program = torch.export.export(Both(), (query, key, value))
    nodes = [node for node in program.graph.nodes if "pladis" in str(node.target)]
    assert len(nodes) == 2 and all(node.args[1].meta["val"].shape[1] == 2 for node in nodes)
    plain = program.run_decompositions(decompositions()).module()
    for found in (program.module()(query, key, value), plain(query, key, value)):
        assert all((one - other).abs().max() < 1e-5 for one, other in zip(found, expected, strict=True))
    assert triton_is_ready()  # registers its own
    settings = [torch.tensor(number) for number in (1.5, 2.0, 1.0, 1.0)]
    for name in ("attention_v4", "attention_triton_v5"):
        arguments = (query, key, value, None, settings, "pladis", "head", 0.25, True)
        torch.library.opcheck(getattr(torch.ops.pladis, name).default, arguments, test_utils="test_faketensor")


def test_gradients_reach_shared_keys():
    inputs = tuple(tensor.requires_grad_() for tensor in tensors(2, batch=1, queries=5, keys=5, channels=4))
    for function in (attention, lambda *given: joint_attention(*given, text_length=2)):
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("key_heads", [0, 3, 8])
def test_heads_of_keys_must_divide_those_of_queries(key_heads):
    query, *_ = tensors(2)
    key = torch.randn(2, key_heads, 19, 16, dtype=torch.float64)
    for function in (attention, lambda *given: joint_attention(*given, text_length=2)):
        with pytest.raises(ValueError, match=r"key \(2, \d, 19, 16\) does not fit query \(2, 4, "):
            function(query if function is attention else query[:, :, :1].expand(-1, -1, 19, -1), key, key)
