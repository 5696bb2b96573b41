"""How many ONNX nodes one patched attention becomes: python benchmarks/onnx_nodes.py [operator ...]

The attention operator of each, of float32 queries, keys and values with an axis ranged, as `surgery export --target
onnx` writes it: the nodes of the graph, constants apart, and its commonest kinds.
"""

import collections
import sys

import torch

from surgery.export.engines.onnx import OPSET
from surgery.export.engines.program import elementary_decompositions
from surgery.nn import attention, decompositions
from surgery.nn.operators import OPERATORS


class Attend(torch.nn.Module):
    """The operator, its hyperparameters being inputs."""

    def __init__(self, operator):
        super().__init__()
        self.operator = operator

    def forward(self, query, key, value, settings):
        """As `attention`."""
        named = dict(zip(OPERATORS[self.operator].defaults, settings.unbind(), strict=True))
        return attention(query, key, value, operator=self.operator, **named)


def nodes_of(operator):
    """{kind: how many} of the graph's nodes but constants."""
    query, key, value = torch.randn(2, 2, 16, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    settings = torch.tensor(list(OPERATORS[operator].defaults.values()))
    batch = torch.export.Dim.AUTO(min=2, max=8)
    program = torch.export.export(
        Attend(operator), (query, key, value, settings), dynamic_shapes=({0: batch}, {0: batch}, {0: batch}, None)
    )
    program = program.run_decompositions({**decompositions(), **elementary_decompositions()})
    written = torch.onnx.export(program, opset_version=OPSET, dynamo=True, verbose=False)
    return collections.Counter(node.op_type for node in written.model.graph if node.op_type != "Constant")


def main():
    """Print a line for each operator."""
    for operator in sys.argv[1:] or OPERATORS:
        kinds = nodes_of(operator)
        common = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(6))
        print(f"{operator}: {sum(kinds.values())} nodes ({common})", flush=True)


if __name__ == "__main__":
    main()
