"""Operations for backends that lack them: right to float32's rounding where the plain formulas are not."""

import pytest
import torch

from surgery.export.engines import program as elementary
from surgery.nn import attention, decompositions
from surgery.nn.kernels.reference import product_of_groups


def magnitudes(largest):
    return torch.cat([torch.logspace(-30, 0, 4000) * largest, torch.zeros(1)])


@pytest.mark.parametrize("name", ["log1p", "expm1"])
def test_they_are_right_everywhere(name):
    x = torch.cat([-magnitudes(1.0 - 2.0**-24), magnitudes(80.0)])
    found, wanted = getattr(elementary, name)(x), getattr(torch, name)(x.double())
    relative = ((found.double() - wanted).abs() / wanted.abs().clamp_min(1e-38)).max().item()
    print(f"{name}: largest relative error {relative:.1e}")
    assert relative < 5e-7


def test_a_tiny_constant_keeps_a_denominator_from_zero_and_no_longer_stands_as_an_addend_by_itself():
    class Divide(torch.nn.Module):
        def forward(self, x):
            return x / (x + 1e-15), x + 0.5, (x + 1).squeeze(0)

    x = torch.tensor([0.0, 1e-15, 3e-12, 1.0, 5e4])
    program = torch.export.export(Divide(), (x,)).run_decompositions(elementary.elementary_decompositions())
    for one, other in zip(program.module()(x), Divide()(x), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-7, atol=0.0)
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    assert not [node for node in nodes if "squeeze" in str(node.target)]  # ONNX's fails where nothing is to be done
    addends = [node.args[1] for node in nodes if node.target == torch.ops.aten.add.Tensor]
    assert sorted(addends) == [0.5, 1, 1e-15 * elementary._SCALE]


@pytest.mark.parametrize("value", [True, False])
def test_booleans_are_filled_without_where(value):
    class Fill(torch.nn.Module):
        def forward(self, mask, where, x):
            return mask.masked_fill(where, value), x.masked_fill(where, 2.0)

    mask, where = torch.tensor([[True, False], [False, True]]), torch.tensor([True, False])
    given = (mask, where, torch.randn(2, 2))
    program = torch.export.export(Fill(), given).run_decompositions(elementary.elementary_decompositions())
    for one, other in zip(program.module()(*given), Fill()(*given), strict=True):
        assert torch.equal(one, other)
    assert len([node for node in program.graph.nodes if "masked_fill" in str(node.target)]) == 1  # the numbers'


def test_a_decomposed_graph_is_dense_attention_at_alpha_1_and_would_not_be_by_the_plain_formulas():
    class Attend(torch.nn.Module):
        def forward(self, query, key, value, alpha):
            return attention(query, key, value, operator="sparse", alpha=alpha, temperature=torch.tensor(1.0))

    query, key, value = torch.randn(3, 1, 2, 9, 8, generator=torch.Generator().manual_seed(0)).unbind()
    inputs = (query * 4, key, value, torch.tensor(1.0))
    program = torch.export.export(Attend(), inputs)
    dense = torch.nn.functional.scaled_dot_product_attention(*inputs[:3])
    aten = torch.ops.aten
    plain = {aten.log1p.default: lambda x: (x + 1).log(), aten.expm1.default: lambda x: x.exp() - 1}
    apart = {}
    for name, table in (("ours", elementary.elementary_decompositions()), ("plain", plain)):
        graph = program.run_decompositions({**decompositions(), **table})
        kinds = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
        assert not {kind for kind in kinds if "log1p" in kind or "expm1" in kind or "pladis" in kind}
        apart[name] = (graph.module()(*inputs) - dense).abs().max().item()
    print(apart)
    assert apart["ours"] < 2e-6 and apart["plain"] > 1e-3


def test_heads_that_share_keys_are_put_together_in_one_step_each_way():
    """Of a reshape more, onnxscript made Krea 2's ONNX graph multiply one entry's queries by another's keys.

    That was where there were as many entries as heads of keys; `test_backbones.py` has the graph, among the slow ones.
    """

    class Grouped(torch.nn.Module):
        def forward(self, query, key):
            return product_of_groups(query, key.transpose(-1, -2))

    query, key = torch.randn(2, 4, 5, 3), torch.randn(2, 2, 6, 3)
    program = torch.export.export(Grouped(), (query, key)).run_decompositions(elementary.elementary_decompositions())
    reshaped = [node for node in program.graph.nodes if "view" in str(node.target) or "reshape" in str(node.target)]
    assert len(reshaped) == 2
    wanted = query @ key.repeat_interleave(2, 1).transpose(-1, -2)
    torch.testing.assert_close(program.module()(query, key), wanted)
