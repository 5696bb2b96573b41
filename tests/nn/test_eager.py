"""Eager calls go straight to the kernels; whatever traces sees the operators, as it did; both compute the same."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from surgery.nn import PladisAttention, attention
from surgery.nn.backbones.flux import PladisFluxAttention
from surgery.nn.backbones.sd3 import PladisSD3Attention
from surgery.nn.joint import dense_with_lse, joint_attention
from surgery.nn.operators import OPERATORS

# What keeps a history reaches an operator of a graph as its one step, which is sparse.
OPERATORS_AND_UNITS = [*((operator, "head") for operator, own in OPERATORS.items() if not own.keeps)]
OPERATORS_AND_UNITS += [("gag", "token"), ("gag", "image")]
TEXT, IMAGE = 7, 40


class ThroughTheLibraryError(Exception):
    """Raised in place of one of torch.library's operators."""


@pytest.fixture(autouse=True)
def no_gradient():
    with torch.no_grad():
        yield


@pytest.fixture
def no_library(monkeypatch):
    """Without the operators of torch.library: a call of one raises ThroughTheLibraryError."""

    def raises(*arguments):
        raise ThroughTheLibraryError

    for name in ("attention_v4", "joint_attention_v3"):
        monkeypatch.setattr(torch.ops.pladis, name, raises)


def tensors(queries=IMAGE, keys=77, channels=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(2, n, 3, channels, generator=generator) for n in (queries, keys, keys)]
    return [tensor.to(dtype).transpose(1, 2) for tensor in made]


def sequence(dtype=torch.float32):
    return tensors(TEXT + IMAGE, TEXT + IMAGE, dtype=dtype)


def masks(queries=IMAGE, keys=77):
    """No mask, padding as a boolean, and one for every query and head that adds."""
    random = torch.rand(2, 3, queries, keys, generator=torch.Generator().manual_seed(1))
    return [None, random[:, :1, :1] > 0.3, (random * 4 - 2).masked_fill(random > 0.9, float("-inf"))]


def as_operator(query, key, value, mask, operator, unit, settings=None):
    """(output, log-sum-exp) by torch.library's operator, at the defaults."""
    settings = settings or [torch.tensor(number) for number in OPERATORS[operator].defaults.values()]
    return torch.ops.pladis.attention_v4(query, key, value, mask, settings, operator, unit, 0.25, True)


def modules(operator="pladis"):
    """(patched module, arguments of a call) of each kind that has a path of its own to the kernels."""
    torch.manual_seed(0)
    sizes = {"query_dim": 32, "dim_head": 16, "heads": 2}
    joint = {**sizes, "out_dim": 32, "added_kv_proj_dim": 32, "context_pre_only": False, "bias": True, "eps": 1e-6}
    cross = Attention(**sizes, cross_attention_dim=32)
    sd3 = Attention(**joint, processor=JointAttnProcessor2_0(), qk_norm="rms_norm")
    double, single = FluxAttention(**joint), FluxAttention(**sizes, out_dim=32, bias=True, pre_only=True)
    image, text = torch.randn(1, IMAGE, 32), torch.randn(1, 40, 32)
    both = {"hidden_states": image, "encoder_hidden_states": text}
    one = {"hidden_states": torch.cat([text, image], dim=1), "pladis_text_length": 40}
    for form, stock, arguments in (
        (PladisAttention, cross, both),
        (PladisAttention, copy.deepcopy(cross), {**both, "attention_mask": torch.randn(1, 1, 40)}),
        (PladisSD3Attention, sd3, both),
        (PladisFluxAttention, double, both),
        (PladisFluxAttention, single, one),
    ):
        yield form.convert(stock.eval(), operator), arguments


def first(result):
    return result[0] if isinstance(result, tuple) else result


def pladis_nodes(graph):
    return [node for node in graph.nodes if node.op == "call_function" and "pladis" in str(node.target)]


@pytest.mark.parametrize("operator", OPERATORS)
def test_eager_calls_never_go_through_torch_library(no_library, operator):
    for module, arguments in modules(operator):
        assert first(module(**arguments)).isfinite().all()
    assert attention(*tensors(), operator=operator).isfinite().all()
    assert attention(*tensors(queries=1), operator=operator).isfinite().all()  # too few scores for the kernel
    assert joint_attention(*sequence(), text_length=TEXT, operator=operator).isfinite().all()
    with pytest.raises(ThroughTheLibraryError):
        make_fx(lambda q, k, v: attention(q, k, v, operator=operator))(*tensors())
    with pytest.raises(ThroughTheLibraryError):
        make_fx(lambda q, k, v: joint_attention(q, k, v, text_length=TEXT, operator=operator))(*sequence())


@pytest.mark.parametrize(("operator", "unit"), OPERATORS_AND_UNITS)
def test_eager_is_the_operator_and_the_definition(operator, unit):
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 5e-2)):
        query, key, value = tensors(dtype=dtype)
        for mask in masks():
            how = {"operator": operator, "unit": unit, "mask": mask, "return_lse": True}
            output, lse = attention(query, key, value, **how)
            by_node, lse_by_node = as_operator(query, key, value, mask, operator, unit)
            assert torch.equal(output, by_node) and torch.equal(lse, lse_by_node)
            expected, expected_lse = attention(*(t.double() for t in (query, key, value)), **how)
            assert (output - expected).abs().max() < tolerance * expected.abs().max().clamp_min(1.0)
            assert torch.allclose(lse.double(), expected_lse, atol=1e-4)


@pytest.mark.parametrize(("operator", "unit"), OPERATORS_AND_UNITS)
def test_eager_joint_attention_is_the_operator_and_the_definition(operator, unit):
    query, key, value = sequence()
    settings = [torch.tensor(number) for number in OPERATORS[operator].defaults.values()]
    for text_first in (True, False):
        for mask in masks(TEXT + IMAGE, TEXT + IMAGE):
            how = {"text_length": TEXT, "text_first": text_first, "operator": operator, "unit": unit, "mask": mask}
            found = joint_attention(query, key, value, **how)
            by_node = torch.ops.pladis.joint_attention_v3(
                query, key, value, mask, settings, operator, unit, 0.25, TEXT, text_first, False
            )
            assert torch.equal(found, by_node) and found.stride() == by_node.stride()
            expected = joint_attention(*(t.double() for t in (query, key, value)), implementation="reference", **how)
            assert (found - expected).abs().max() < 5e-5 * expected.abs().max().clamp_min(1.0)


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_buffer_that_is_filled_acts_on_the_next_call(operator):
    for module, arguments in modules(operator):
        before = first(module(**arguments))
        assert torch.equal(first(module(**arguments)), before)
        for name, buffer in module.named_buffers():
            if operator == "gag" and name == "pladis_eta":
                continue  # the step is shorter than any bound here
            if operator == "anderson_history" and name == "pladis_scale":
                continue  # nothing tells the module of a step before (tests/nn/test_history.py)
            old = buffer.clone()
            buffer.fill_(1.75 if "alpha" in name else 0.7)
            changed = first(module(**arguments))
            assert (changed - before).abs().max() > 1e-6, name
            buffer.copy_(old)
        assert torch.equal(first(module(**arguments)), before)


def test_a_module_computes_what_the_function_does():
    module, arguments = next(modules())
    module.set_hyperparameters({"alpha": 1.3, "scale": 1.7, "temperature": 0.9})
    image, text = arguments["hidden_states"], arguments["encoder_hidden_states"]
    query, key, value = (module._split_heads(x) for x in (module.to_q(image), module.to_k(text), module.to_v(text)))
    for implementation in ("auto", "reference", "blocked"):
        module.pladis_implementation = implementation
        output = attention(query, key, value, **module.hyperparameters(), implementation=implementation)
        assert torch.equal(module(**arguments), module.to_out[0](output.transpose(1, 2).flatten(2)))


def test_a_mask_of_each_head_is_the_mask_of_all():
    _, (module, arguments) = (made for _, made in zip(range(2), modules(), strict=False))
    mask = arguments.pop("attention_mask")
    found = module(**arguments, attention_mask=mask)
    assert (found - module(**arguments)).abs().max() > 1e-3
    assert torch.equal(found, module(**arguments, attention_mask=mask.repeat_interleave(2, dim=0)))  # as diffusers does
    assert torch.equal(found, module(**arguments, attention_mask=mask.expand(1, IMAGE, 40)))


def test_what_records_or_reroutes_sees_one_node():
    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    for module, arguments in modules():
        module.requires_grad_(False)  # torch.jit.trace has no constants with a gradient
        names, values = zip(*arguments.items(), strict=True)
        length = arguments.get("pladis_text_length")
        inputs = tuple(value for value in values if isinstance(value, torch.Tensor))
        names = [name for name in names if name != "pladis_text_length"]

        def call(*given, names=names, module=module, length=length):
            more = {} if length is None else {"pladis_text_length": length}
            return module(**dict(zip(names, given, strict=True)), **more)

        expected = first(call(*inputs))
        for mode in ("real", "fake", "symbolic"):
            graph = make_fx(call, tracing_mode=mode, _allow_non_fake_inputs=True)(*inputs)
            assert len(pladis_nodes(graph.graph)) == 1
        assert torch.equal(first(graph(*inputs)), expected)
        program = torch.export.export(module, (), arguments, strict=False)
        assert len(pladis_nodes(program.graph)) == 1
        traced = torch.jit.trace(call, inputs, check_trace=False)
        assert sum("pladis::" in node.kind() for node in traced.inlined_graph.nodes()) == 1
        seen = []
        with Recorder():
            call(*inputs)
        assert sum("pladis" in name for name in seen) == 1
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert first(call(*(mode.from_tensor(value) for value in inputs))).shape == expected.shape
        found = first(torch.func.functionalize(call)(*inputs))
        assert torch.equal(found, expected)


def test_a_subclass_of_tensor_sees_the_operators():
    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return super().__torch_function__(function, types, args, kwargs)

    seen = []
    found = attention(*(tensor.as_subclass(Watched) for tensor in tensors()))
    assert type(found) is Watched and any("pladis.attention_v4" in name for name in seen)
    seen.clear()
    joint_attention(*(tensor.as_subclass(Watched) for tensor in sequence()), text_length=TEXT)
    assert any("pladis.joint_attention_v3" in name for name in seen)
    assert torch.equal(found.as_subclass(torch.Tensor), attention(*tensors()))


def test_gradients_are_followed_where_they_are_wanted(no_library):
    for module, arguments in modules():
        expected = first(module(**arguments))
        with torch.enable_grad():
            found = first(module(**arguments))
            found.square().sum().backward()
        assert torch.allclose(found, expected, atol=1e-5)
        assert all(p.grad.abs().max() > 0 for name, p in module.named_parameters() if "to_q" in name or "to_v" in name)


def test_tensors_that_do_not_fit_are_refused_before_a_kernel_reads_them():
    few = Attention(query_dim=32, cross_attention_dim=32, heads=4, kv_heads=2, dim_head=8)
    with pytest.raises(ValueError, match="does not fit query"):
        PladisAttention.convert(few)(torch.randn(2, 16, 32), torch.randn(2, 77, 32))
    module, _ = next(modules())
    image, text = torch.randn(4, IMAGE, 32), torch.randn(1, 40, 32)
    with pytest.raises(ValueError, match="does not fit query"):
        module(image, torch.randn(3, 40, 32))
    assert torch.equal(module(image, text), module(image, text.expand(4, -1, -1)))
    with pytest.raises(ValueError, match="does not broadcast"):
        module.attend(*tensors(), mask=torch.zeros(3, 1, 1, 77))
    single, arguments = list(modules())[-1]
    with pytest.raises(ValueError, match="81 text tokens do not fit"):
        single(**{**arguments, "pladis_text_length": 81})


def test_a_row_that_may_see_text_alone_or_image_alone():
    for dtype in (torch.float32, torch.float64):
        query, key, value = sequence(dtype)
        mask = torch.ones(1, 1, TEXT + IMAGE, TEXT + IMAGE, dtype=torch.bool)
        mask[..., 10, TEXT:] = mask[..., 20, :TEXT] = mask[..., 30, :] = False
        for given in (mask, torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, float("-inf"))):
            found = joint_attention(query, key, value, text_length=TEXT, mask=given)
            expected = joint_attention(query, key, value, text_length=TEXT, mask=given, implementation="reference")
            assert (found - expected).abs().max() < 1e-5 and not found[:, :, 30].any()
        output, lse = dense_with_lse(query, key, value, mask, 0.25)
        assert not output[:, :, 30].any() and (lse[:, :, 30] == float("-inf")).all() and lse[:, :, 10].isfinite().all()


def test_what_a_small_call_gives_does_not_depend_on_what_ran_before(run):
    script = """
import torch
from surgery.nn import attention
from surgery.nn.kernels.cpu import library_is_loaded
def draw(n):
    return [torch.randn(1, 2, m, 16, generator=torch.Generator().manual_seed(m)) for m in (n, 77, 77)]
assert not library_is_loaded()
before = attention(*draw(16)), attention(*draw(2))
attention(*draw(4096))
assert library_is_loaded()
after = attention(*draw(16)), attention(*draw(2))
print([torch.equal(a, b) for a, b in zip(before, after)])
"""
    assert run(python=script, check=0).stdout.strip() == "[True, True]"
