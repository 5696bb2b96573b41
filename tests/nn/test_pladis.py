"""PladisAttention: made in place from a live Attention, true to it at scale 0, with buffers that stay float32."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor, AttnProcessor2_0

from surgery.nn import PladisAttention, attention, is_pladis
from surgery.nn.module import shortest_float
from surgery.nn.operators import OPERATORS


def cross_attention(**arguments):
    torch.manual_seed(0)
    return Attention(query_dim=32, cross_attention_dim=24, heads=4, dim_head=8, **arguments).eval()


def inputs(keys=77, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 16, 32, generator=generator).to(dtype), torch.randn(2, keys, 24, generator=generator).to(
        dtype
    )


def test_convert_keeps_the_object_its_parameters_and_its_state_dict():
    module = cross_attention()
    before = {name: tensor.data_ptr() for name, tensor in module.named_parameters()}
    keys = set(module.state_dict())
    converted = PladisAttention.convert(module, alpha=1.3, scale=1.7, temperature=0.9)
    assert converted is module and isinstance(module, Attention)
    assert {name: tensor.data_ptr() for name, tensor in module.named_parameters()} == before
    assert set(module.state_dict()) == keys | {f"pladis_{name}" for name in OPERATORS["pladis"].defaults}
    assert module.hyperparameters() == {"alpha": 1.3, "scale": 1.7, "temperature": 0.9, "sparse_temperature": 1.0}
    assert type(module.revert()) is Attention and set(module.state_dict()) == keys


@torch.no_grad()
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"bias": True, "out_bias": False},
        {"qk_norm": "layer_norm"},
        {"cross_attention_norm": "layer_norm"},
        {"norm_num_groups": 8, "residual_connection": True, "rescale_output_factor": 2.0},
        {"upcast_attention": True, "upcast_softmax": True},
        {"scale_qk": False},
    ],
    ids=str,
)
def test_scale_zero_is_the_stock_module_whatever_its_options(arguments):
    stock = cross_attention(**arguments)
    patched = PladisAttention.convert(copy.deepcopy(stock), scale=0.0)
    hidden, text = inputs()
    mask = torch.zeros(2, 1, 77)
    mask[:, :, 40:] = -10000.0
    for attention_mask in (None, mask):
        expected = stock(hidden, text, attention_mask)
        assert (patched(hidden, text, attention_mask) - expected).abs().max() < 5e-6
    image = hidden.transpose(1, 2).reshape(2, 32, 4, 4)
    assert (patched(image, text) - stock(image, text)).abs().max() < 5e-6
    patched.pladis_scale.fill_(2.0)
    assert (patched(hidden, text) - stock(hidden, text)).abs().max() > 1e-3


def test_print_shows_the_operator_with_what_it_is_set_to():
    module = PladisAttention.convert(cross_attention(), alpha=1.33, schedule={"steps": [0, 5]})
    module.pladis_scale.fill_(1.7)
    assert (
        "  pladis, alpha=1.33, scale=1.7, temperature=1.0, sparse_temperature=1.0, schedule={'steps': [0, 5]}\n"
        in repr(module)
    )
    module = PladisAttention.convert(cross_attention(), "gag", unit="token")
    assert "  gag, alpha=1.5, scale=10.0, temperature=1.0, zeta=0.0, eta=15.0, sparse_temp" in repr(module)
    assert "parallel=1.0, unit='token'\n" in repr(module)
    assert "pladis, alpha=?, " in repr(PladisAttention.convert(cross_attention()).to("meta"))
    assert "pladis" not in repr(module.revert())


def test_buffers_stay_float32_under_every_cast():
    module = PladisAttention.convert(cross_attention(), alpha=1.33, scale=1.7)
    for cast in (
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.to(torch.float16),
        lambda m: m.to("cpu", torch.bfloat16),
        lambda m: m.double(),
        lambda m: torch.nn.Sequential(m).to(torch.float16)[0],
    ):
        cast(module)
        assert module.to_q.weight.dtype != torch.float32
        assert all(buffer.dtype == torch.float32 for buffer in module.buffers())
        assert module.hyperparameters() == {**OPERATORS["pladis"].defaults, "alpha": 1.33, "scale": 1.7}
    module.to("meta")
    assert module.pladis_alpha.is_meta and module.pladis_alpha.dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_and_out(dtype):
    module = PladisAttention.convert(cross_attention())
    hidden, text = inputs()
    expected = module(hidden, text)
    found = module.to(dtype)(hidden.to(dtype), text.to(dtype))
    assert found.dtype == dtype
    assert (found.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_what_cannot_be_converted_is_refused_with_the_reason():
    class OwnAttention(Attention):
        pass

    class OwnProcessor:
        def __call__(self, attn, hidden_states, **kwargs):
            return hidden_states

    self_attention = Attention(query_dim=32, heads=4, dim_head=8)
    added = Attention(
        query_dim=32, cross_attention_dim=32, heads=4, dim_head=8, added_kv_proj_dim=8, processor=AttnAddedKVProcessor()
    )
    other_class = OwnAttention(query_dim=32, cross_attention_dim=24, heads=4, dim_head=8)
    other_processor = cross_attention()
    other_processor.set_processor(OwnProcessor())
    for module, reason in (
        (self_attention, "self-attention"),
        (added, "added key/value"),
        (other_class, "OwnAttention is not"),
        (other_processor, "its processor OwnProcessor computes attention in its own way"),
    ):
        with pytest.raises(ValueError, match=reason):
            PladisAttention.convert(module)
        assert not is_pladis(module)


def test_a_processor_with_an_attention_of_its_own_is_refused_after_the_patch_too():
    class OwnProcessor:
        pass

    module = PladisAttention.convert(cross_attention())
    with pytest.raises(ValueError, match="cannot run OwnProcessor"):
        module.set_processor(OwnProcessor())
    module.set_processor(AttnProcessor2_0())
    module.set_attention_slice(2)


@torch.no_grad()
def test_a_hook_of_accelerate_runs_the_patched_forward_and_the_stock_one_after_revert():
    from accelerate.hooks import ModelHook, add_hook_to_module

    hidden, text = inputs()
    plain = PladisAttention.convert(cross_attention())(hidden, text)
    module = cross_attention()
    stock = module(hidden, text)
    add_hook_to_module(module, ModelHook())
    PladisAttention.convert(module)
    assert torch.equal(module(hidden, text), plain)
    module.revert()
    assert torch.equal(module(hidden, text), stock)


@torch.no_grad()
def test_forward_hooks_and_deepcopy_survive():
    module = cross_attention()
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    PladisAttention.convert(module)
    twin = copy.deepcopy(module)
    hidden, text = inputs()
    assert torch.equal(twin(hidden, text), module(hidden, text)) and calls
    twin.pladis_scale.fill_(0.0)
    assert module.hyperparameters()["scale"] == 2.0


@torch.no_grad()
def test_one_graph_and_no_recompilation_when_a_hyperparameter_changes():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    module = PladisAttention.convert(cross_attention())
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    hidden, text = inputs()
    before = compiled(hidden, text)
    for alpha, scale, temperature in ((1.25, 0.5, 1.0), (2.0, 3.0, 0.7), (1.0, -1.0, 2.0)):
        module.set_hyperparameters({"alpha": alpha, "scale": scale, "temperature": temperature})
        assert (compiled(hidden, text) - module(hidden, text)).abs().max() < 1e-6
        assert (compiled(hidden, text) - before).abs().max() > 1e-4
    assert counter.frame_count == 1


@torch.no_grad()
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_is_a_module_with_its_own_buffers_that_can_be_taken_out_again(operator):
    hidden, text = inputs()
    module = cross_attention()
    plain = module(hidden, text)
    dense = PladisAttention.convert(cross_attention(), scale=0.0)(hidden, text)
    PladisAttention.convert(module, operator)
    assert {name.removeprefix("pladis_") for name, _ in module.named_buffers()} == set(OPERATORS[operator].defaults)
    assert is_pladis(module) and module.setting() == {
        "operator": operator,
        **OPERATORS[operator].defaults,
        **({"unit": "head"} if OPERATORS[operator].projects else {}),
    }
    query, key, value = (module._split_heads(x) for x in (module.to_q(hidden), module.to_k(text), module.to_v(text)))
    expected = attention(query, key, value, operator=operator).transpose(1, 2).flatten(2)
    assert torch.allclose(module(hidden, text), module.to_out[0](expected), atol=1e-6)
    assert (module(hidden, text) - dense).abs().max() > 1e-3
    module.set_hyperparameters(OPERATORS[operator].off)
    assert (module(hidden, text) - dense).abs().max() < 1e-5
    module.revert()
    assert torch.equal(module(hidden, text), plain) and not is_pladis(module)


def test_gag_projects_over_heads_or_tokens_and_the_others_over_nothing():
    hidden, text = inputs()
    by_head, by_token = (PladisAttention.convert(cross_attention(), "gag", unit=unit) for unit in ("head", "token"))
    with torch.no_grad():
        assert (by_head(hidden, text) - by_token(hidden, text)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="sparse has no unit; it has alpha, temperature"):
        PladisAttention.convert(cross_attention(), "sparse", unit="token")
    with pytest.raises(ValueError, match="sparse has no scale; it has alpha, temperature"):
        PladisAttention.convert(cross_attention(), "sparse", scale=2.0)


def test_a_module_keeps_its_own_copy_of_a_schedule_and_refuses_a_wrong_one():
    schedule = {"steps": [0, 2], "sigma": [1, float("inf")]}
    module = PladisAttention.convert(cross_attention(), schedule=schedule)
    schedule["steps"][1] = -5
    assert module.pladis_schedule == {"steps": [0, 2], "sigma": [1, 1e30]}
    with pytest.raises(ValueError, match=r"schedule\.steps must be two"):
        PladisAttention.convert(cross_attention(), schedule=schedule)


@torch.no_grad()
def test_inductor_computes_the_same():
    torch._dynamo.reset()
    module = PladisAttention.convert(cross_attention())
    hidden, text = inputs()
    error = (torch.compile(module, fullgraph=True)(hidden, text) - module(hidden, text)).abs().max()
    print(f"inductor against eager, float32: {error:.1e}")
    assert error < 5e-6


def test_floats_are_shown_as_they_were_given():
    for number in (1.3, 2.0, 0.1, 1.2345678, -0.7, 1e-3, 100.0):
        assert shortest_float(torch.tensor(number)) == pytest.approx(number, rel=1e-7)
    assert repr(shortest_float(torch.tensor(1.3))) == "1.3"
