"""An engine in a live model's place: checked at every call, its hyperparameters and weights the model's own.

The model stays the object that it was; its `forward` (a VAE's `decode`) alone is another. So its buffers are where
`tune` and schedules write, its parameters are where a LoRA is fused, and taking the engine away restores eager.
"""

import torch

from surgery.errors import InputError

from .attached import ATTRIBUTE, attachment
from .calls import parameter_names, put_result_together, take_apart
from .runners import open_runner


def attach(model, engine, folder):
    """Have `model`, a component of a pipeline, run by the Engine in `folder`; returns the Attachment.

    Raises InputError where one is attached already, ArtifactError or InputError where the engine cannot be opened.
    """
    if attachment(model):
        raise InputError("the model runs an engine already; surgery.engines.attached.detach takes it away")
    made = Attachment(model, engine, folder)
    setattr(model, ATTRIBUTE, made)
    return made


class Attachment:
    """An engine that runs a model."""

    def __init__(self, model, engine, folder):
        self.engine, self._model, self._class = engine, model, type(model)
        self._patched = [m for m in model.modules() if hasattr(m, "pladis_operator")]
        self._settings = self._settings_now()
        self._undo = []
        for region in engine.regions:
            for path in region.modules:
                module = model.get_submodule(path)
                self._take_over(module, region, open_runner(engine, region, module, model, folder))
        names = parameter_names(model, "forward")
        is_whole = any("" in region.modules for region in engine.regions)

        def before(module, args, kwargs):
            self.check()
            if not is_whole:
                self._check_call(names, args, kwargs)

        hook = model.register_forward_pre_hook(before, with_kwargs=True)
        self._undo.append(hook.remove)

    def undo(self):
        """Give every module its own method back."""
        while self._undo:
            self._undo.pop()()

    def check(self):
        """Raise InputError where the model has become one that the engine does not compute."""
        if reason := self.refusal():
            raise InputError(f"the engine {self.engine.key} cannot run this model: {reason}")

    def refusal(self):
        """Why the engine does not compute what the model is now; None if it does."""
        model = self._model
        if type(model) is not self._class or self._settings_now() != self._settings:
            return "it was patched or unpatched after the engine was attached; load it again"
        if model.training and torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters()):
            return "it is in training mode, and an engine has no gradients; use model.eval()"
        if getattr(model, "peft_config", None) and (reason := self._lora_refusal()):
            return reason
        if any(getattr(block, "s1", None) is not None for block in getattr(model, "up_blocks", ())):
            return "FreeU changes its blocks, which the engine has compiled in; call disable_freeu()"
        if getattr(model, "_cache_config", None) is not None:
            return "a cache (PAB, FasterCache ...) works by hooks on its blocks, which an engine does not run"
        return None

    def _lora_refusal(self):
        from peft.tuners.tuners_utils import BaseTunerLayer

        if self.engine.weights == "engine":
            return "it has a LoRA, and this engine holds weights of its own; build one with --weights artifact"
        layers = [module for module in self._model.modules() if isinstance(module, BaseTunerLayer)]
        if any(not layer.merged and not layer.disable_adapters and layer.active_adapters for layer in layers):
            return "its LoRA lies in layers of its own, which are not in the engine; call pipe.fuse_lora()"
        return None

    def _settings_now(self):
        return [(getattr(m, "pladis_operator", None), getattr(m, "pladis_unit", None)) for m in self._patched]

    def _take_over(self, module, region, runner):
        method = region.method
        names = parameter_names(module, method)
        before = module.__dict__.get(method)

        def run(*args, **kwargs):
            if method != "forward":
                self.check()
            return self._run(region, runner, names, args, kwargs)

        setattr(module, method, run)

        def restore():
            if before is None:
                module.__dict__.pop(method, None)
            else:
                setattr(module, method, before)

        self._undo.append(restore)

    def _check_call(self, names, args, kwargs, region=None):
        """The tensors of a call, {name: tensor}; InputError where it is none of a region's, or of the component's."""
        try:
            tensors, constants, _ = take_apart(names, args, kwargs)
        except TypeError as error:
            raise InputError(f"the engine {self.engine.key} was given what it does not know: {error}") from error
        problem = call_problem(region.inputs if region else self.engine.inputs, tensors)
        if not problem and region:
            problem = constants_problem(region.constants, constants)
        if problem:
            raise InputError(
                f"the engine {self.engine.key} ({self.engine.profile} images x height x width) was not built for this "
                f"call: {problem}. Build one that is (`surgery export --shapes ...`) or load without an engine"
            )
        return tensors

    def _run(self, region, runner, names, args, kwargs):
        tensors = self._check_call(names, args, kwargs, region)
        returned = runner.run([tensors[tensor.name] for tensor in region.inputs])
        given = dict(zip(names, args, strict=False))
        as_dict = kwargs.get("return_dict", given.get("return_dict"))
        return put_result_together(region.outputs, region.output, returned, as_dict is not False)


def constants_problem(wanted, found):
    """Which of a call's constants is not what was compiled in, as one sentence; None if all are."""
    for name in {**found, **wanted}:
        if found.get(name) != wanted.get(name):
            return f"{name} is {found.get(name)!r}, and {wanted.get(name)!r} is compiled in"
    return None


def call_problem(inputs, tensors):
    """Why a call's tensors, {name: tensor}, are not those of `record.Tensor`s, as one sentence; None if they are."""
    wanted = {tensor.name: tensor for tensor in inputs}
    unlike = set(wanted) ^ set(tensors)
    if unlike:
        name = sorted(unlike)[0]
        return f"{name} is {'missing' if name in wanted else 'given, and was not when it was built'}"
    for name, tensor in tensors.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        if kind != wanted[name].dtype:
            return f"{name} is {kind}, not {wanted[name].dtype}"
        bounds = wanted[name].shape
        if tensor.ndim != len(bounds) or any(
            not low <= size <= high for size, (low, high) in zip(tensor.shape, bounds, strict=True)
        ):
            text = ", ".join(str(low) if low == high else f"{low}..{high}" for low, high in bounds)
            return f"{name} is {tuple(tensor.shape)}, not ({text})"
    return None
