"""The operator in graphs: one node, never compiled again for a hyperparameter, decomposable, exported and packaged."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from surgery.nn import attention
from surgery.nn.joint import decompositions
from surgery.nn.kernels.fused import choose_implementation
from surgery.nn.kernels.triton_kernel import triton_is_ready
from surgery.nn.operators import OPERATORS


class Layer(torch.nn.Module):
    """An operator with its hyperparameters as buffers, as PladisAttention holds them."""

    def __init__(self, operator="pladis", implementation="auto"):
        super().__init__()
        self.operator, self.implementation = operator, implementation
        for name, value in OPERATORS[operator].defaults.items():
            self.register_buffer(name, torch.tensor(value))

    def forward(self, query, key, value):
        """Twice the attention, so that the graph has a node of its own."""
        settings = dict(self.named_buffers())
        return 2.0 * attention(
            query, key, value, operator=self.operator, implementation=self.implementation, **settings
        )


def tensors(queries=64, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, n, 16, generator=generator).to(dtype) for n in (queries, 77, 77)]


def targets(graph):
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


@pytest.fixture(autouse=True)
def no_gradient():
    torch._dynamo.reset()
    with torch.no_grad():
        yield


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_compiled_graph_is_whole_and_changing_a_hyperparameter_does_not_compile_again(operator):
    layer = Layer(operator)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    query, key, value = tensors()
    for change in (None, {"alpha": 1.25}, {"alpha": 2.0, "temperature": 0.5}, {"scale": 0.3}, {"zeta": 1.0}):
        for name, number in (change or {}).items():
            if name in OPERATORS[operator].defaults:
                getattr(layer, name).fill_(number)
        assert torch.allclose(compiled(query, key, value), layer(query, key, value), atol=1e-6)
    assert counter.frame_count == 1
    assert sum("pladis.attention_v4" in target for target in targets(counter.graphs[0].graph)) == 1
    assert len(targets(counter.graphs[0].graph)) == 3  # the operator, its first result, the product


@pytest.mark.parametrize("operator", ["pladis", "gag"])
def test_an_exported_program_has_one_node_and_its_decomposition_has_none(operator):
    layer = Layer(operator)
    query, key, value = tensors()
    shapes = ({2: torch.export.Dim.DYNAMIC}, None, None)
    program = torch.export.export(layer, (query, key, value), dynamic_shapes=shapes)
    assert sum("pladis.attention_v4" in target for target in targets(program.graph)) == 1
    plain = program.run_decompositions(decompositions())
    assert not any("pladis" in target for target in targets(plain.graph))
    assert not any(word in " ".join(targets(plain.graph)) for word in ("sort", "cumsum", "gather", "topk"))
    shorter = query[:, :, :33]
    assert torch.allclose(plain.module()(shorter, key, value), layer(shorter, key, value), atol=1e-5)


def test_a_packaged_program_runs_and_is_the_same(tmp_path):
    layer = Layer("gag")
    query, key, value = tensors()
    program = torch.export.export(
        layer, (query, key, value), dynamic_shapes=({2: torch.export.Dim.DYNAMIC}, None, None)
    )
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "layer.pt2"))
    packaged = torch._inductor.aoti_load_package(path)
    for rows in (64, 20):
        assert torch.allclose(
            packaged(query[:, :, :rows], key, value), layer(query[:, :, :rows], key, value), atol=1e-6
        )


def test_the_registered_operators_pass_torchs_own_checks():
    assert triton_is_ready()  # registers the second one
    query, key, value = tensors(queries=5)
    settings = [torch.tensor(number) for number in OPERATORS["pladis"].defaults.values()]
    mask = torch.ones(77, dtype=torch.bool)
    for with_lse in (False, True):
        arguments = (query, key, value, mask, settings, "pladis", "head", 0.25, with_lse)
        torch.library.opcheck(
            torch.ops.pladis.attention_v4.default, arguments, test_utils=("test_schema", "test_faketensor")
        )
        torch.library.opcheck(
            torch.ops.pladis.attention_triton_v5.default, arguments, test_utils=("test_schema", "test_faketensor")
        )


def test_on_a_gpu_a_traced_graph_holds_the_kernels_own_operator():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():  # no GPU is needed to trace for one
        layer = Layer("pladis")
        for name in OPERATORS["pladis"].defaults:
            setattr(layer, name, torch.empty((), device="cuda"))
        inputs = tuple(torch.empty(2, 4, n, 64, dtype=torch.bfloat16, device="cuda") for n in (4096, 77, 77))
        program = torch.export.export(layer, inputs, strict=False)
        assert [t for t in targets(program.graph) if "pladis" in t] == ["pladis.attention_triton_v5.default"]
        assert choose_implementation(*inputs) == "triton"
        wide = torch.empty(2, 4, 600, 264, dtype=torch.bfloat16, device="cuda")  # more channels than it takes
        assert choose_implementation(wide, wide, wide) == "blocked"


def test_the_smallest_inputs_are_computed_at_once_and_all_others_by_the_kernel():
    assert choose_implementation(*tensors(queries=1)) == "reference"
    assert choose_implementation(*tensors(queries=2)) == "cpp"
    assert choose_implementation(*tensors(queries=4096)) == "cpp"
    assert choose_implementation(*tensors(queries=4096, dtype=torch.float64)) == "blocked"


def test_the_fused_operators_say_that_they_have_no_gradient():
    query, key, value = tensors(queries=4096)
    query.requires_grad_()
    with torch.enable_grad():
        settings = [torch.tensor(number) for number in OPERATORS["pladis"].defaults.values()]
        fused, _ = torch.ops.pladis.attention_v4(query, key, value, None, settings, "pladis", "head", 0.25, False)
        with pytest.raises(RuntimeError, match=r"no gradient; surgery\.nn\.attention uses plain operations"):
            fused.sum().backward()
        with pytest.raises(RuntimeError, match="implementation='cpp' has no gradient"):
            attention(query, key, value, implementation="cpp")
        attention(query, key, value).sum().backward()
    assert query.grad.isfinite().all() and query.grad.abs().max() > 0


def test_a_compiled_layer_can_be_trained():
    layer = Layer()
    query, key, value = tensors()
    with torch.enable_grad():
        query.requires_grad_()
        (expected,) = torch.autograd.grad(layer(query, key, value).square().sum(), query)
        (found,) = torch.autograd.grad(
            torch.compile(layer, fullgraph=True, backend="aot_eager")(query, key, value).square().sum(), query
        )
    assert torch.allclose(found, expected, atol=1e-4)
