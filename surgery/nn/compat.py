"""What this folder uses of torch, diffusers and accelerate although they do not promise it, each in one place.

An upgrade that moves such a name breaks its function here, which says what moved, and fails its test in
tests/nn/test_compat.py.
"""

import contextlib
import ctypes
import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def _private(package: str, name: str) -> Iterator[None]:
    """Within this block a name of `package` that is not there becomes a RuntimeError that says so."""
    try:
        yield
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"{package} {metadata.version(package)} has moved {name}, which PLADIS uses although it is not promised "
            f"({error}); install an older {package}"
        ) from error


# torch


def compiled_cpp(source: str, flags: tuple[str, ...]) -> ctypes.CDLL:
    """A C++ source as a loaded library, by the cache of compiled code that inductor has: by source, flags, machine.

    On Linux inductor compiles with -march=native, and what more it would find out of this machine's vectors, for code
    that it writes itself, is not asked: that takes a dozen compilations once and seconds in every process.
    """
    with _private("torch", "torch._inductor.codecache.CppCodeCache"):
        from torch._inductor.codecache import CppCodeCache

        load = CppCodeCache.load
        knows = "needs_vec_isa" in inspect.signature(CppCodeCache.load_async).parameters  # torch 2.13
    more = {"needs_vec_isa": False} if knows and sys.platform == "linux" else {}
    return load(source, extra_flags=flags, **more)


def is_dispatched() -> bool:
    """Whether a mode of torch_dispatch (make_fx, FakeTensorMode) or a transform of torch.func is on."""
    try:  # at every small attention, so without _private
        return torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None
    except AttributeError:
        with _private("torch", "the stacks of its modes and transforms in torch._C"):
            raise


def set_constant(function: Callable) -> Callable:
    """Have torch.compile take a function's result as a constant, as torch.compiler.assume_constant_result does.

    Which would import the compiler here and now.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function


def fused_choice(query: Tensor, key: Tensor, value: Tensor, qk_scale: float) -> int:
    """Which of its kernels, a value of SDPBackend, scaled_dot_product_attention runs for these tensors on a GPU."""
    with _private("torch", "torch._fused_sdp_choice"):
        choice = torch._fused_sdp_choice
    return choice(query, key, value, None, 0.0, False, scale=qk_scale, enable_gqa=query.shape[1] != key.shape[1])


def cudnn_attention(query: Tensor, key: Tensor, value: Tensor, qk_scale: float) -> tuple[Tensor, Tensor]:
    """(dense attention, log-sum-exp of the scores) by cuDNN; (batch, heads, queries, ...). Heads may share keys."""
    attention = _native("_scaled_dot_product_cudnn_attention")
    output, lse = attention(query, key, value, None, True, 0.0, False, False, scale=qk_scale)[:2]
    return output, lse.view(query.shape[:3])


def flash_attention(query: Tensor, key: Tensor, value: Tensor, qk_scale: float) -> tuple[Tensor, Tensor]:
    """As `cudnn_attention`, by the flash kernel."""
    return _native("_scaled_dot_product_flash_attention")(query, key, value, 0.0, False, scale=qk_scale)[:2]


def flash_attention_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, qk_scale: float
) -> tuple[Tensor, Tensor]:
    """As `cudnn_attention`, on a CPU; a query whose keys are all masked has a log-sum-exp of 0 there.

    mask: additive, of query's dtype, (batch, heads, queries, keys).
    """
    return _native("_scaled_dot_product_flash_attention_for_cpu")(
        query, key, value, 0.0, False, attn_mask=mask, scale=qk_scale
    )


@functools.cache
def _native(name):
    with _private("torch", f"torch.{name}"):  # which is called sooner than the same of torch.ops.aten
        return getattr(torch, name)


class KeepsFloat32:
    """A part of a module whose buffers of the names in `float32_buffers` stay float32, whatever is asked of it."""

    float32_buffers = ()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args, **kwargs):
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)
        for name in self.float32_buffers:  # load_state_dict(assign=True) takes the dtype of what it is given
            if name in self._buffers:
                self._buffers[name] = self._buffers[name].float()

    def _apply(self, fn, recurse=True):
        before = {name: self._buffers[name] for name in self.float32_buffers if name in self._buffers}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if new.dtype != old.dtype:  # follow the device, not the dtype: bf16 would turn 1.3 into 1.296875
                meta = "meta" in (new.device.type, old.device.type)
                self._buffers[name] = torch.empty_like(old, device=new.device) if meta else old.to(new.device)
        return self


# diffusers


class _KeptInFloat32:
    def __init__(self, names):
        self.names = names

    def __get__(self, model, cls):
        stock = cls.stock._keep_in_fp32_modules
        return [*(stock or []), *self.names] if model is None else stock


def keep_in_float32(cls: type, names: Iterable[str]) -> None:
    """Have from_pretrained(torch_dtype=...), which asks the class, keep the buffers of these names in float32.

    Not the instance: `.to(dtype)`, which leaves the buffers as they are, would warn that it does not.
    """
    cls._keep_in_fp32_modules = _KeptInFloat32(tuple(names))


def rounding_all(cls: type) -> type:
    """A model class without such a list, which from_pretrained(low_cpu_mem_usage=False) refuses."""
    return type(cls.__name__, (cls,), {"_keep_in_fp32_modules": None, "__module__": cls.__module__})


def set_config(model: torch.nn.Module, values: dict) -> None:
    """Replace a model's config; unlike register_to_config, keeping what was set on it as an attribute alone.

    diffusers' IP-Adapter loader marks the UNet so (config.encoder_hid_dim_type), and the adapter goes without that.
    """
    with _private("diffusers", "ConfigMixin._internal_dict"):
        old: Any = model._internal_dict
    model._internal_dict = type(old)(values)
    for name, value in vars(old).items():
        if name in values and value is not old[name]:
            setattr(model._internal_dict, name, value)


def share_lora_scales(stock: str, patched: str) -> None:
    """Have weights of LoRA by block spelt out for a patched class as for the stock class, by their names."""
    from diffusers.loaders import peft  # here, as the operators alone do without diffusers

    by_name = getattr(peft, "_SET_ADAPTER_SCALE_FN_MAPPING", {})  # without it no other LoRA is lost
    if stock in by_name:
        by_name[patched] = by_name[stock]


def with_attention(call: Callable, dispatched: Callable, scaled: Callable) -> Callable:
    """A processor's `__call__` with the attention function inside it replaced, whichever of the two it calls.

    dispatched: in the place of diffusers' dispatch_attention_fn; scaled: of F.scaled_dot_product_attention. The rest
    of the function is diffusers' own, in a copy of the namespace that it was written in.
    """
    names = call.__code__.co_names
    # Without its name, by which torch.compile would find the module, and in it the attention function that is replaced.
    namespace = {name: value for name, value in call.__globals__.items() if name != "__name__"}
    with _private("diffusers", f"the attention call of {call.__qualname__}"):
        if "dispatch_attention_fn" in names:
            namespace["dispatch_attention_fn"] = dispatched
        elif "scaled_dot_product_attention" in names and "F" in names:
            functions = {name: getattr(namespace["F"], name) for name in names if hasattr(namespace["F"], name)}
            namespace["F"] = types.SimpleNamespace(**{**functions, "scaled_dot_product_attention": scaled})
        else:
            raise AttributeError("it calls neither dispatch_attention_fn nor F.scaled_dot_product_attention")
    return types.FunctionType(call.__code__, namespace, call.__name__, call.__defaults__, call.__closure__)


def as_scaled(
    scaled: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, how: Mapping[str, Any]
) -> Tensor:
    """A call of dispatch_attention_fn by what stands for scaled_dot_product_attention.

    query, key, value: (batch, length, heads, head_dim), as the output. how: the other arguments; backend and
    parallel_config, which scaled_dot_product_attention has none of, are left out.
    """
    how = {name: value for name, value in how.items() if name not in ("backend", "parallel_config")}
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return scaled(query, key, value, **how).transpose(1, 2)


def is_context_parallel(processor: object) -> bool:
    """Whether context parallelism is switched on for an attention processor."""
    return getattr(processor, "_parallel_config", None) is not None


def hooks_of_diffusers(module: torch.nn.Module) -> list:
    """The hooks of diffusers on a module."""
    return list(getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values())


def hooks_of_accelerate(module: torch.nn.Module) -> tuple:
    """The hooks of accelerate on a module."""
    hook = getattr(module, "_hf_hook", None)
    return tuple(getattr(hook, "hooks", (hook,))) if hook is not None else ()


def rebind_forward(module: torch.nn.Module, old: Callable, bound: Callable) -> None:
    """Put `bound` where hooks of diffusers and accelerate keep a module's forward(), of which `old` is the function."""
    for holder in (module, *getattr(getattr(module, "_diffusers_hook", None), "_fn_refs", ())):
        _rebind(holder, old, bound)


def _rebind(holder, old, bound):
    # "forward" of the module itself outlives the hook; "__wrapped__" is where inspect.signature looks.
    for name in ("forward", "original_forward", "_old_forward", "_original_forward", "__wrapped__"):
        held = vars(holder).get(name)
        if getattr(held, "__func__", None) is old:
            setattr(holder, name, bound)
        elif isinstance(held, functools.partial):
            _rebind(held, old, bound)
