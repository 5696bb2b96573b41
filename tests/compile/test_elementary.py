"""log1p and expm1 for backends that have neither: right to float32's rounding where the plain formulas are not."""

import pytest
import torch
from surgery.export.building import elementary

from surgery.nn import attention, decompositions


def magnitudes(largest):
    return torch.cat([torch.logspace(-30, 0, 4000) * largest, torch.zeros(1)])


@pytest.mark.parametrize("name", ["log1p", "expm1"])
def test_they_are_right_everywhere(name):
    x = torch.cat([-magnitudes(1.0 - 2.0**-24), magnitudes(80.0)])
    found, wanted = getattr(elementary, name)(x), getattr(torch, name)(x.double())
    relative = ((found.double() - wanted).abs() / wanted.abs().clamp_min(1e-38)).max().item()
    print(f"{name}: largest relative error {relative:.1e}")
    assert relative < 5e-7


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
