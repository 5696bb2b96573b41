"""What hooks of diffusers and accelerate keep of a live module: its forward(), copies of its tensors, a device.

They take it when they are put on, so a class or a buffer that changes later has to reach it.
"""

import inspect
import types
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .compat import hooks_of_accelerate, hooks_of_diffusers, rebind_forward


def arguments_of(method: Callable, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """{name: value} of what a method, as its class has it, is called with behind self."""
    names = list(inspect.signature(method).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def change_class(module: nn.Module, new: type) -> None:
    """Give a live module another class, and whatever keeps its bound forward() that of the new class."""
    old = type(module).forward
    module.__class__ = new
    rebind_forward(module, old, types.MethodType(new.forward, module))


def offloaded_to(model: nn.Module, modules: Iterable[nn.Module]) -> str | None:
    """Where the buffers of patched modules are offloaded, so that writes are lost: "to disk" and so on; None if not."""
    if any(module.pladis_alpha.is_meta for module in modules):
        return "to the meta device"
    for group in _groups(model):
        copied = {**group.cpu_param_dict, **getattr(group, "tensor_to_key", {})}
        if any(module.pladis_alpha in copied for module in modules):
            return "to disk" if group.offload_to_disk_path else "through a stream"
    return None


def misses_new_buffers(model: nn.Module, modules: Iterable[nn.Module]) -> bool:
    """Whether an offloading hook would fail on buffers that these modules get now, or put older ones in their place."""
    streamed = [part for group in _groups(model) if group.cpu_param_dict for part in group.modules]
    aligned = [(owner, hook) for owner in model.modules() for hook in _alignments(owner) if hook.offload_buffers]
    streamed += [owner for owner, hook in aligned if hook.place_submodules]
    found = {module for owner in streamed for module in owner.modules()} | {owner for owner, _ in aligned}
    return not found.isdisjoint(modules)


def forget_buffers(model: nn.Module, names: Collection[str]) -> None:
    """Tell accelerate's offloading that the buffers of these names are gone: it would want to put them back."""
    for module in model.modules():
        for hook in _alignments(module):
            hook.original_devices = {
                path: device for path, device in hook.original_devices.items() if path.rpartition(".")[2] not in names
            }


def execution_device(module: nn.Module) -> torch.device | None:
    """The device that an offloading hook in a module computes on; None without one."""
    groups = (group.onload_device for group in _groups(module))
    aligned = (
        getattr(hook, "execution_device", None) for part in module.modules() for hook in hooks_of_accelerate(part)
    )
    return next((device for device in (*groups, *aligned) if device is not None), None)


def _groups(model):
    """diffusers' groups of modules that are offloaded together."""
    for module in model.modules():
        for hook in hooks_of_diffusers(module):
            if hasattr(hook, "group"):
                yield hook.group


def _alignments(module):
    """The hooks of accelerate on a module that offload it tensor by tensor."""
    return [hook for hook in hooks_of_accelerate(module) if getattr(hook, "offload", False)]
