"""What attention modules compute, seen while a pipeline draws: the tensors of their calls, whatever the backbone.

A patched module's attention, cross or joint, is one operator of `torch.ops.pladis` while a mode of torch_dispatch is
on, and a stock module's is scaled_dot_product_attention. So what is seen is what the model computed, LoRA, norms and
rotary embeddings included, and the run itself is not touched.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from surgery.compat import is_compiled
from surgery.errors import InputError, UnsupportedModelError
from surgery.models.anatomy import record_of
from surgery.models.denoisers import DENOISERS
from surgery.models.patching import attachment, denoisers, module_of, patch, patched_modules, unpatch
from surgery.nn import is_pladis
from surgery.nn.functional import for_all_heads, mask_block, text_and_image
from surgery.nn.hooks import arguments_of

_SDPA = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")  # by position
_NAMED = {"attn_mask": "mask", "scale": "qk_scale"}  # as our operators have it


@dataclass(frozen=True)
class AttentionCall:
    """A call of a module: image queries, text keys and values; of joint attention the block where these meet.

    step: how many timesteps the run had before. query: (1, heads, queries, head_dim); key, value: (1, heads, keys,
    head_dim), of any floating dtype. mask: boolean (True keeps a key) or additive, broadcastable to (1, heads, queries,
    keys), or None. qk_scale: beta, what the scores query key^T are multiplied by. image: of joint attention the key,
    value and mask where image meets image, which share the softmax with the text's.
    """

    path: str
    module: Any  # a PladisModule, or diffusers' own
    step: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    qk_scale: float
    image: tuple[Tensor, Tensor, Tensor | None] | None = None


class Observer:
    """Calls seen(AttentionCall) at the first call of each module at each timestep, while it is open.

    That is the call with the prompt: of a batch [without prompt, with prompt] its second entry is shown, and where
    classifier-free guidance takes two calls the one with the prompt comes first, as do all before a weakened model's.
    So one image may be drawn at a time. entry: the place in a batch of the one with the prompt, where it is known.
    Modules with an `implementation` of their own run "auto" meanwhile, which differs in the last bits.
    Raises UnsupportedModelError, out of the pipeline's run, for modules whose attention cannot be seen.
    """

    def __init__(
        self,
        pipeline: Any,
        paths: Iterable[str],
        seen: Callable[[AttentionCall], object],
        entry: int | None = None,
    ) -> None:
        self._pipeline, self._tell, self._models = pipeline, seen, list(denoisers(pipeline).values())
        self._modules: dict[str, Any] = {path: module_of(pipeline, path) for path in paths}
        self._model: Any = None  # that was called last
        self._handles, self._implementations = [], {}
        self._timestep, self._step, self._done = None, -1, set()
        self._entry, self._given = entry, {}

    def __enter__(self) -> Self:
        for model in self._models:
            self._handles.append(model.register_forward_pre_hook(self._before_model, with_kwargs=True))
        for path, module in self._modules.items():
            if is_pladis(module):
                self._implementations[path] = module.pladis_implementation
                module.pladis_implementation = "auto"
            self._hook(path, module)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for path, implementation in self._implementations.items():
            self._modules[path].pladis_implementation = implementation
        self._implementations.clear()

    def _before_model(self, model, arguments, keywords):
        self._model, self._given = model, arguments_of(type(model).forward, arguments, keywords)
        timestep = float(torch.as_tensor(self._given[getattr(model, "timestep", "timestep")]).flatten()[0])
        if timestep != self._timestep:
            self._timestep, self._step = timestep, self._step + 1
            self._done.clear()

    @property
    def grid(self) -> tuple[int, int, int]:
        """(frames, height, width) of the image's tokens, where attention is finest, in the model's last call."""
        record = record_of(self._model)
        assert record  # as its modules were called
        try:
            return record.grid(self._model.config, self._given)
        except ValueError as error:
            raise UnsupportedModelError(f"where its tokens lie in the image is not known: {error}") from error

    def _hook(self, path, module):
        told = []
        mode = (_Operators if is_pladis(module) else _Sdpa)(lambda given: told.append(given))
        open_modes = []

        def before(_module, _arguments):
            if path not in self._done:
                open_modes.append(mode)
                mode.__enter__()

        def after(_module, _arguments, output):
            if not open_modes:
                return
            open_modes.pop().__exit__(None, None, None)
            calls, told[:] = told[:1], []
            if output is None:  # it failed, and its own error is on its way
                return
            if not calls:
                raise UnsupportedModelError(
                    f"{path} ({type(module).__name__}) computes attention where it cannot be seen; draw without "
                    "gradients, and with the model's default attention processors"
                )
            self._done.add(path)
            self._tell(self._call(path, module, calls[0]))

        self._handles.append(module.register_forward_pre_hook(before))
        self._handles.append(module.register_forward_hook(after, always_call=True))

    def _call(self, path, module, given):
        query, key, value, mask = (given.get(name) for name in ("query", "key", "value", "mask"))
        # diffusers stacks [unconditional, conditional]; perturbed-attention guidance appends a third.
        entry = self._entry
        if entry is None:
            entry = 1 if getattr(self._pipeline, "do_classifier_free_guidance", True) else 0
        entry = entry if entry < len(query) else 0
        query, key, value = (states[entry : entry + 1] for states in (query, key, value))
        key, value = (for_all_heads(states, query.shape[1]) for states in (key, value))
        if mask is not None and mask.ndim == 4 and len(mask) > 1:
            mask = mask[entry : entry + 1]
        image_part = None
        if "text_length" in given:
            text, image = text_and_image(key.shape[2], given["text_length"], given["text_first"])
            of_image = None if given["text_only"] else mask_block(mask, image, image)
            image_part = key[:, :, image], value[:, :, image], of_image
            query, key, value, mask = (
                query[:, :, image],
                key[:, :, text],
                value[:, :, text],
                mask_block(mask, image, text),
            )
        qk_scale = given.get("qk_scale")
        qk_scale = query.shape[-1] ** -0.5 if qk_scale is None else qk_scale
        return AttentionCall(path, module, self._step, query, key, value, mask, qk_scale, image_part)


class _Operators(TorchDispatchMode):
    """Tells the arguments by name of each attention operator of ours."""

    def __init__(self, tell):
        super().__init__()
        self._tell = tell

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "pladis":
            names = [argument.name for argument in func._schema.arguments]
            self._tell({**dict(zip(names, args, strict=False)), **(kwargs or {})})
        return func(*args, **(kwargs or {}))


class _Sdpa(TorchFunctionMode):
    """Tells the arguments by name of each call of torch's scaled_dot_product_attention."""

    def __init__(self, tell):
        super().__init__()
        self._tell = tell

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            named = {
                {"attn_mask": "mask", "scale": "qk_scale"}.get(name, name): value for name, value in kwargs.items()
            }
            self._tell({**dict(zip(_SDPA, args, strict=False)), **named})
        return func(*args, **kwargs)


def refuse_compiled(pipeline: Any) -> None:
    """Raise InputError where hooks would not run: a compiled pipeline, or one that runs an engine."""
    models = denoisers(pipeline).values()
    parts = [part for name in DENOISERS if (part := getattr(pipeline, name, None)) is not None]
    if any(map(is_compiled, [*parts, *(module for model in models for module in model.modules())])):
        raise InputError("the pipeline is compiled, and a compiled module runs no hooks; load it without torch.compile")
    if any(map(attachment, models)):
        raise InputError("the model runs a compiled engine, which runs no hooks; load it without engine")


@contextmanager
def surely_patched(pipeline: Any) -> Iterator[None]:
    """The pipeline patched: as it is, or with the paper's PLADIS until the block is left."""
    if patched_modules(pipeline):
        yield
        return
    patch(pipeline)
    try:
        yield
    finally:
        unpatch(pipeline)
