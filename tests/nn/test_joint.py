"""Joint attention: the operator acts where image queries meet text keys, and nowhere else; the parts add up."""

import functools
import math

import pytest
import torch

from surgery.nn.joint import decompositions, joint_attention
from surgery.nn.kernels.triton_kernel import triton_is_ready
from surgery.nn.operators import OPERATORS

TEXT, IMAGE = 7, 13


def tensors(dtype=torch.float64, channels=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(3, 2, 3, TEXT + IMAGE, channels, generator=generator, dtype=torch.float64)
    return (made[0] * 2).to(dtype), made[1].to(dtype), made[2].to(dtype)


@functools.cache
def brute_force(dtype, text_first, masked=False, alpha=1.5, scale=2.0, temperature=1.0):
    """PLADIS on the text block of a joint softmax of `tensors(dtype)`, with the entmax package."""
    from entmax import entmax_bisect

    query, key, value = (t.double() for t in tensors(dtype))
    mask = padded(text_first) if masked else None
    length = key.shape[2]
    text = torch.zeros(length, dtype=torch.bool)
    text[slice(0, TEXT) if text_first else slice(length - TEXT, length)] = True
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    for batch, keys in enumerate(text & scores[:, 0, ~text][:, 0].isfinite()):  # a mask is that of all its rows
        if keys.any():
            rows = torch.nonzero(~text)
            z = scores[batch][:, rows, keys] / temperature
            dense, sparse = z.softmax(-1), entmax_bisect(z, alpha, n_iter=80) if alpha > 1 else z.softmax(-1)
            share = weights[batch][:, rows, keys].sum(-1, keepdim=True)
            weights[batch, :, rows, keys] = share * (dense + scale * (sparse - dense))
    return weights @ value


def padded(text_first, batch=2):
    """(batch, 1, 1, keys): the second entry has four of its text tokens, the last none."""
    mask = torch.ones(batch, 1, 1, TEXT + IMAGE, dtype=torch.bool)
    first = 0 if text_first else IMAGE
    mask[1, :, :, first + 4 : first + TEXT] = False
    return mask


@pytest.mark.parametrize("implementation", ["auto", "reference", "blocked", "entmax"])
@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_it_is_the_joint_softmax_with_the_text_block_changed(implementation, text_first, masked):
    query, key, value = tensors()
    mask = padded(text_first) if masked else None
    settings = {"alpha": 1.5, "scale": 2.0, "temperature": 0.8}
    found = joint_attention(
        query, key, value, text_length=TEXT, text_first=text_first, mask=mask, implementation=implementation, **settings
    )
    told = joint_attention(
        query, key, value, text_length=TEXT, text_first=text_first, mask=mask, only_text_is_masked=True, **settings
    )
    assert (told - found).abs().max() < 1e-8
    expected = brute_force(torch.float64, text_first, masked, **settings)
    assert (found - expected).abs().max() < 1e-8
    untouched = joint_attention(query, key, value, text_length=TEXT, text_first=text_first, mask=mask, scale=0.0)
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert (untouched - dense).abs().max() < 1e-10 and (found - dense).abs().max() > 1e-2


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 4e-2), (torch.float16, 5e-3)])
@pytest.mark.parametrize("implementation", ["auto", "cpp", "triton"])
def test_kernels_agree_with_the_definition(monkeypatch, implementation, dtype, tolerance):
    if implementation == "triton":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        pytest.importorskip("triton")
    query, key, value = tensors(dtype)
    for text_first in (True, False):
        found = joint_attention(
            query, key, value, text_length=TEXT, text_first=text_first, temperature=1.3, implementation=implementation
        )
        assert found.dtype == dtype
        expected = brute_force(dtype, text_first, temperature=1.3)
        assert (found.double() - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_keeps_the_share_of_text_and_leaves_text_queries_alone(operator):
    query, key, value = tensors()
    found = joint_attention(query, key, value, text_length=TEXT, operator=operator)
    expected = joint_attention(query, key, value, text_length=TEXT, operator=operator, implementation="reference")
    assert torch.allclose(found, expected, atol=1e-9)
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    assert torch.allclose(found[:, :, :TEXT], dense[:, :, :TEXT], atol=1e-12)
    # Values that are 1 on text and 0 on image: what comes out is the share of text.
    marks = torch.zeros_like(value)
    marks[:, :, :TEXT] = 1.0
    if operator != "gag":  # which projects along its own output
        share = joint_attention(query, key, marks, text_length=TEXT, operator=operator)
        wanted = torch.nn.functional.scaled_dot_product_attention(query, key, marks)
        assert torch.allclose(share, wanted, atol=1e-9)


def test_text_or_image_alone_is_dense_and_a_row_without_keys_is_zero(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    kernels = ("cpp", "triton") if triton_is_ready() else ("cpp",)  # which take no text without a token
    query, key, value = tensors()
    single = [part.float() for part in (query, key, value)]
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    for length in (0, TEXT + IMAGE):
        for implementation in ("auto", "reference"):
            found = joint_attention(query, key, value, text_length=length, implementation=implementation)
            assert torch.allclose(found, dense)
        for implementation in kernels:
            found = joint_attention(*single, text_length=length, implementation=implementation)
            assert torch.allclose(found, dense.float(), atol=1e-5)
    nothing = torch.zeros(2, 1, 1, TEXT + IMAGE, dtype=torch.bool)
    assert not joint_attention(query, key, value, text_length=TEXT, mask=nothing).any()
    no_text = torch.ones(2, 1, 1, TEXT + IMAGE, dtype=torch.bool)
    no_text[..., :TEXT] = False
    found = joint_attention(query, key, value, text_length=TEXT, mask=no_text)
    assert torch.allclose(found, torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=no_text))


def test_it_is_one_node_of_a_graph_with_dynamic_lengths_and_decomposes():
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.tensor(2.0))

        def forward(self, query, key, value, text):
            return joint_attention(query, key, value, text_length=text.shape[0], scale=self.scale)

    arguments = (*tensors(torch.float32), torch.zeros(TEXT))
    module = Module()
    expected = module(*arguments)
    assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(*arguments), expected)
    length, text = torch.export.Dim("length", min=12, max=64), torch.export.Dim("text", min=2, max=11)
    shapes = ({2: length}, {2: length}, {2: length}, {0: text})
    program = torch.export.export(module, arguments, dynamic_shapes=shapes)
    assert sum("joint_attention_v3" in str(node.target) for node in program.graph.nodes) == 1
    shorter = (*(t[:, :, :15] for t in arguments[:3]), torch.zeros(5))
    assert torch.allclose(program.module()(*shorter), module(*shorter), atol=1e-6)
    plain = program.run_decompositions(decompositions())
    assert not any("pladis" in str(node.target) for node in plain.graph.nodes)
    assert torch.allclose(plain.module()(*shorter), module(*shorter), atol=1e-5)


def test_gradients_are_those_of_the_formula():
    query, key, value = (t[:1, :1, 4:12].requires_grad_() for t in tensors())
    assert torch.autograd.gradcheck(
        lambda q, k, v: joint_attention(q, k, v, text_length=3, alpha=1.5), (query, key, value), fast_mode=True
    )


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"text_length": 21}, "21 text tokens do not fit 20 queries and 20 keys"),
        ({"text_length": 7, "operator": "softmax"}, "unknown operator"),
        ({"text_length": 7, "eta": 1.0}, "pladis has no eta"),
        ({"text_length": 7, "alpha": 3.0}, "alpha must lie in"),
    ],
)
def test_what_is_wrong_is_said(arguments, message):
    with pytest.raises(ValueError, match=message):
        joint_attention(*tensors(), **arguments)
