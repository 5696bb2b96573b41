"""What surgery/nn uses of torch, diffusers and accelerate although they do not promise it does what it did.

A failure here after an upgrade names what moved; surgery/nn/compat.py is where it is put right.
"""

import inspect
import sys
import types

import accelerate
import pytest
import torch
from diffusers import ModelMixin, UNet2DConditionModel
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.loaders import peft
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend

from surgery.nn import compat

from .test_unet import SMALL, patched_unet


def qkv(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, length, 8, generator=generator).to(dtype) for length in (5, 7, 7)]


def test_what_has_moved_is_named(monkeypatch):
    monkeypatch.delattr(torch, "_fused_sdp_choice")
    with pytest.raises(RuntimeError, match=r"torch 2\.\S+ has moved torch._fused_sdp_choice.*install an older torch"):
        compat.fused_choice(*qkv(), 1.0)
    monkeypatch.delattr("torch._inductor.codecache.CppCodeCache")
    with pytest.raises(RuntimeError, match="has moved torch._inductor.codecache.CppCodeCache"):
        compat.compiled_cpp("", ())
    monkeypatch.delattr(torch._C, "_len_torch_dispatch_stack")
    with pytest.raises(RuntimeError, match="has moved the stacks"):
        compat.is_dispatched()


def test_torchs_cache_compiles_and_loads_cpp():
    library = compat.compiled_cpp('extern "C" int three() { return THREE; }', ("-DTHREE=3",))
    assert library.three() == 3, "CppCodeCache.load no longer returns a ctypes library, or leaves extra_flags out"


@pytest.mark.skipif(sys.platform != "linux", reason="where the compiler is told to use all that the machine has")
def test_this_machines_vectors_are_not_found_out_for_it(monkeypatch):
    """Which takes a dozen compilations at first, and two seconds in every process."""

    def probed():
        raise AssertionError("CppCodeCache.load no longer knows needs_vec_isa")

    monkeypatch.setattr("torch._inductor.codecache.pick_vec_isa", probed)
    flags = ("-DWITHOUT_PROBING=4",)
    assert compat.compiled_cpp('extern "C" int four() { return WITHOUT_PROBING; }', flags).four() == 4


def test_modes_and_transforms_are_seen():
    seen = []

    def function(x):
        seen.append(compat.is_dispatched())
        return x + 1

    function(torch.ones(2))
    make_fx(function)(torch.ones(2))
    torch.func.vmap(function)(torch.ones(2))
    assert seen == [False, True, True], "torch no longer counts make_fx or torch.func among its dispatch stacks"


def test_a_constant_is_no_part_of_a_graph():
    @compat.set_constant
    def answer():
        return open("/dev/null").closed  # which torch.compile cannot trace

    compiled = torch.compile(lambda x: x + 2 if answer() else x + 1, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)) == 1, "_dynamo_marked_constant no longer makes a result constant"


def test_torchs_own_attention_says_which_kernel_and_gives_the_log_sum_exp():
    query, key, value = qkv()
    assert compat.fused_choice(query, key, value, 0.5) in [int(kernel) for kernel in SDPBackend.__members__.values()]
    mask = torch.randn(1, 2, 5, 7)
    for given in (None, mask):
        output, lse = compat.flash_attention_on_cpu(query, key, value, given, 0.5)
        scores = query @ key.transpose(2, 3) * 0.5 + (0.0 if given is None else given)
        torch.testing.assert_close(output, scores.softmax(-1) @ value)
        torch.testing.assert_close(lse, scores.logsumexp(-1))


@pytest.mark.parametrize("name", ["cudnn", "flash"])
def test_the_kernels_of_gpus_take_what_they_took(name):
    given = [tensor.to("meta", torch.float16) for tensor in qkv()]
    output, lse = getattr(compat, f"{name}_attention")(*given, 0.5)
    assert output.shape == (1, 2, 5, 8) and lse.shape == (1, 2, 5), f"the {name} kernel returns other things now"


def test_buffers_stay_float32_whatever_is_asked_of_a_module():
    class Kept(compat.KeepsFloat32, nn.Linear):
        float32_buffers = ("kept",)

    module = Kept(2, 2)
    module.register_buffer("kept", torch.tensor(1.3))
    for change in (nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to(torch.float16)):
        change(module)
        assert module.kept.dtype == torch.float32, "nn.Module no longer converts by _apply"
    module.load_state_dict({name: tensor.half() for name, tensor in module.state_dict().items()}, assign=True)
    assert module.kept.dtype == torch.float32, "nn.Module no longer loads by _load_from_state_dict"
    assert module.to("meta").kept.is_meta


def test_diffusers_keeps_buffers_in_float32_by_a_list_of_the_class(tmp_path):
    patched_unet().save_pretrained(tmp_path)
    for low_memory in (True, False):
        given = {"torch_dtype": torch.float16, "low_cpu_mem_usage": low_memory}
        loaded = type(patched_unet()).from_pretrained(tmp_path, **given)
        kept = {name: buffer.dtype for name, buffer in loaded.named_buffers() if "pladis" in name}
        assert kept and set(kept.values()) == {torch.float32}, "ModelMixin no longer reads _keep_in_fp32_modules"
        assert loaded.conv_in.weight.dtype == torch.float16
    assert "_keep_in_fp32_modules" in inspect.getsource(ModelMixin.from_pretrained)


def test_a_models_config_can_be_replaced():
    unet = UNet2DConditionModel(**SMALL)
    unet.config.encoder_hid_dim_type = "ip_image_proj"  # as diffusers' IP-Adapter loader does
    compat.set_config(unet, {**unet.config, "sample_size": 16})
    assert (unet.config.sample_size, unet.config["sample_size"]) == (16, 16), "a config is no longer _internal_dict"
    assert unet.config.encoder_hid_dim_type == "ip_image_proj" and unet.config["encoder_hid_dim_type"] is None


def test_diffusers_looks_scales_of_lora_up_by_the_class():
    by_name = peft._SET_ADAPTER_SCALE_FN_MAPPING
    assert by_name["PladisUNet2DConditionModel"] is by_name["UNet2DConditionModel"]
    assert "PladisNothing" not in by_name and compat.share_lora_scales("Nothing", "PladisNothing") is None


def test_a_processors_attention_call_is_answered_by_ours_and_one_without_any_is_named():
    from diffusers.models.attention_processor import AttnProcessor2_0

    torch.manual_seed(0)
    attention, states = Attention(16, heads=2, dim_head=8), torch.randn(1, 5, 16)
    call = compat.with_attention(AttnProcessor2_0.__call__, None, lambda query, key, value, **more: 2.0 * value)
    expected = attention.to_out[0](2.0 * attention.to_v(states))
    assert torch.allclose(call(attention.processor, attention, states), expected)
    assert not torch.allclose(attention(states), expected)  # diffusers' own is as it was

    def computes_it_itself(self, attn, hidden_states):
        return hidden_states.softmax(-1)

    with pytest.raises(RuntimeError, match=r"has moved the attention call of .*computes_it_itself"):
        compat.with_attention(computes_it_itself, None, None)


def test_context_parallelism_is_seen():
    unet = UNet2DConditionModel(**SMALL)
    processor = next(module.processor for module in unet.modules() if isinstance(module, Attention))
    assert not compat.is_context_parallel(processor)
    source = inspect.getsource(ModelMixin.enable_parallelism)
    assert "processor._parallel_config = " in source, "enable_parallelism no longer sets processor._parallel_config"
    assert compat.is_context_parallel(types.SimpleNamespace(_parallel_config=object()))


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("library", ["diffusers", "accelerate", "both"])
def test_the_forward_that_hooks_keep_can_be_replaced(library):
    module, given = nn.Linear(2, 2), torch.ones(1, 2)
    expected = module(given)
    if library != "accelerate":
        HookRegistry.check_if_exists_or_initialize(module).register_hook(ModelHook(), "ours")
        assert [type(hook) for hook in compat.hooks_of_diffusers(module)] == [ModelHook]
    if library != "diffusers":
        hooks = [accelerate.hooks.ModelHook(), accelerate.hooks.ModelHook()]
        accelerate.hooks.add_hook_to_module(module, accelerate.hooks.SequentialHook(*hooks))
        assert compat.hooks_of_accelerate(module) == tuple(hooks)
    module.__class__ = Doubling
    compat.rebind_forward(module, nn.Linear.forward, types.MethodType(Doubling.forward, module))
    assert torch.equal(module(given), 2 * expected), f"hooks of {library} keep a module's forward in another place now"
    accelerate.hooks.remove_hook_from_module(module)
    assert torch.equal(module(given), 2 * expected)


def test_a_module_without_hooks_has_none():
    assert compat.hooks_of_diffusers(nn.Linear(1, 1)) == [] and compat.hooks_of_accelerate(nn.Linear(1, 1)) == ()
