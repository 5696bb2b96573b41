"""An engine in a live model's place: checked at every call, its hyperparameters and weights the model's own.

The model stays the object that it was; its `forward` (a VAE's `decode`) alone is another. So its buffers are where
`tune` and schedules write, its parameters are where a LoRA is fused, and taking the engine away restores eager.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from surgery.compat import has_freeu, has_layers_of_lora, load_package
from surgery.errors import InputError
from surgery.hub.foreign import reading
from surgery.models.patching import ENGINE, attachment

from .calls import parameter_names, put_result_together, take_apart
from .fitting import import_torch_tensorrt, missing_backend
from .record import Engine, Region, Tensor
from .told import TEXT, TEXTS, text_beside, texts_beside


def attach(model: torch.nn.Module, engine: Engine, folder: str | Path) -> "Attachment":
    """Have `model`, a component of a pipeline, run by the Engine in `folder`; returns the Attachment.

    Raises InputError where one is attached already, ArtifactError or InputError where the engine cannot be opened.
    """
    if attachment(model):
        raise InputError("the model runs an engine already; surgery.models.patching.detach takes it away")
    made = Attachment(model, engine, folder)
    setattr(model, ENGINE, made)
    return made


class Attachment:
    """An engine that runs a model."""

    def __init__(self, model: torch.nn.Module, engine: Engine, folder: str | Path) -> None:
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
                self._check_call(names, args, kwargs | texts_beside(module))

        hook = model.register_forward_pre_hook(before, with_kwargs=True)
        self._undo.append(hook.remove)

    @property
    def takes_texts(self) -> bool:
        """Whether its functions take what the model is told of negative or regional prompts."""
        return any(tensor.name.startswith(f"{TEXTS}.") for tensor in self.engine.inputs)

    def undo(self) -> None:
        """Give every module its own method back."""
        while self._undo:
            self._undo.pop()()

    def check(self) -> None:
        """Raise InputError where the model has become one that the engine does not compute."""
        if reason := self.refusal():
            raise InputError(f"the engine {self.engine.key} cannot run this model: {reason}")

    def refusal(self) -> str | None:
        """Why the engine does not compute what the model is now; None if it does."""
        model = self._model
        if type(model) is not self._class or self._settings_now() != self._settings:
            return "it was patched or unpatched after the engine was attached; load it again"
        if model.training and torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters()):
            return "it is in training mode, and an engine has no gradients; use model.eval()"
        if getattr(model, "peft_config", None) and (reason := self._lora_refusal()):
            return reason
        if has_freeu(model):
            return "FreeU changes its blocks, which the engine has compiled in; call disable_freeu()"
        if getattr(model, "is_cache_enabled", False):
            return "a cache (PAB, FasterCache ...) works by hooks on its blocks, which an engine does not run"
        return None

    def _lora_refusal(self):
        if self.engine.weights == "engine":
            return "it has a LoRA, and this engine holds weights of its own; build one with --weights artifact"
        if has_layers_of_lora(self._model):
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
            return self._run(module, region, runner, names, args, kwargs)

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
            if self.takes_texts:
                problem += "; behind the prompt's it takes the tokens of a negative prompt or regions, as many as then"
            raise InputError(
                f"the engine {self.engine.key} ({self.engine.profile} images x height x width) was not built for this "
                f"call: {problem}. Build one that is (`surgery export --shapes ...`) or load without an engine"
            )
        return tensors

    def _run(self, module, region, runner, names, args, kwargs):
        told = texts_beside(module) | (text_beside() if _asks_text(region) else {})
        tensors = self._check_call(names, args, kwargs | told, region)
        returned = runner.run([tensors[tensor.name] for tensor in region.inputs])
        given = dict(zip(names, args, strict=False))
        as_dict = kwargs.get("return_dict", given.get("return_dict"))
        return put_result_together(region.outputs, region.output, returned, as_dict is not False)


def _asks_text(region):
    """Whether a block asks its model where the text is in its one stream."""
    return any(name.startswith(f"{TEXT}.") for name in (*region.constants, *(tensor.name for tensor in region.inputs)))


def constants_problem(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    """Which of a call's constants is not what was compiled in, as one sentence; None if all are."""
    for name in {**found, **wanted}:
        if found.get(name) != wanted.get(name):
            return f"{name} is {found.get(name)!r}, and {wanted.get(name)!r} is compiled in"
    return None


def call_problem(inputs: Iterable[Tensor], tensors: Mapping[str, torch.Tensor]) -> str | None:
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


def open_runner(
    engine: Engine, region: Region, module: torch.nn.Module, model: torch.nn.Module, folder: str | Path
) -> Any:
    """A runner of a Region of an engine for one module of a model; its run(tensors) gives a list of tensors back."""
    if reason := missing_backend(engine.backend):
        raise InputError(f"the engine {engine.key} needs {engine.backend}: {reason}")
    kind = {"inductor": InductorRunner, "onnx": OnnxRunner, "tensorrt": TensorRTRunner}[engine.backend]
    path = Path(folder) / region.file
    with reading(f"the engine {engine.key} cannot be opened", folder):
        return kind(path, engine, region, module, model)


class InductorRunner:
    """An AOTInductor package, with weights of its own or without: then it is shown the module's own tensors.

    With its own it takes the hyperparameters as inputs. Tensors that it is shown are looked at before each call: what
    was written into them in place is seen, and where one was moved or replaced (offloading, a fused LoRA) the package
    is shown the new one.
    """

    def __init__(self, path: Path, engine: Engine, region: Region, module: torch.nn.Module, model: Any) -> None:
        device = model.device
        index = device.index if device.type == "cuda" and device.index is not None else -1
        self._package = load_package(path, index)
        names = {}
        if engine.weights == "artifact":
            names = {name.removeprefix("module."): name for name in self._package.get_constant_fqns()}
        owners = owners_of(module, names, _kept_beside(path, engine))
        self._owners = {names[name]: owner for name, owner in owners.items()}
        self._hyperparameters = Hyperparameters(module, region)
        self._device, self._shown = device, None
        self._dtypes = [owner[name].dtype for owner, name in self._owners.values()]
        self._show()

    def run(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """The package's results, a list."""
        if [owner[name].data_ptr() for owner, name in self._owners.values()] != self._shown:
            self._show()
        # AOTInductor takes any strides for those of the export; PixArt's first block is given a transposed tensor
        given = (*tensors, *self._hyperparameters.vectors())
        result = self._package(*(tensor.contiguous() for tensor in given))
        return [result] if isinstance(result, torch.Tensor) else list(result)

    def _show(self):
        held = {key: owner[name].detach() for key, (owner, name) in self._owners.items()}
        for (key, tensor), dtype in zip(held.items(), self._dtypes, strict=True):
            if tensor.device.type != self._device.type or tensor.dtype != dtype:
                raise InputError(
                    f"{key} is {tensor.dtype} on {tensor.device}, and was {dtype} on {self._device} when the engine "
                    "was attached; load the pipeline with the dtype and device that you want"
                )
            if not tensor.is_contiguous():  # AOTInductor takes any layout for that of the export
                raise InputError(
                    f"{key} is not contiguous, as the engine has it; call .to(memory_format=torch.contiguous_format)"
                )
        self._held = held
        if held:
            self._package.load_constants(held, check_full_update=True, user_managed=True)
        self._shown = [owner[name].data_ptr() for owner, name in self._owners.values()]


class OnnxRunner:
    """An ONNX graph under ONNX Runtime; the weights are the file's, the hyperparameters the module's."""

    def __init__(self, path: Path, engine: Engine, region: Region, module: torch.nn.Module, model: Any) -> None:
        import onnxruntime

        providers = ["CPUExecutionProvider"]
        if model.device.type == "cuda":
            providers = [("CUDAExecutionProvider", {"device_id": model.device.index or 0}), *providers]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        self._names = [entry.name for entry in self._session.get_inputs()]
        self._hyperparameters = Hyperparameters(module, region)

    def run(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """The graph's results as torch tensors on the first input's device."""
        given = [tensor.detach().cpu().numpy() for tensor in (*tensors, *self._hyperparameters.vectors())]
        results = self._session.run(None, dict(zip(self._names, given, strict=True)))
        return [torch.from_numpy(result).to(tensors[0].device) for result in results]


class TensorRTRunner:
    """A TensorRT engine, with weights of its own; the hyperparameters are inputs."""

    def __init__(self, path: Path, engine: Engine, region: Region, module: torch.nn.Module, model: Any) -> None:
        runtime = import_torch_tensorrt().runtime
        self._names, self._hyperparameters = region.input_names, Hyperparameters(module, region)
        self._all = [name.replace(".", "_") for name in (*(one.name for one in region.inputs), *region.hyperparameters)]
        with torch.cuda.device_of(next(model.parameters())):  # the engine goes to the current device
            self._engine = runtime.TorchTensorRTModule(path.read_bytes(), self._names, region.output_names)
        self._engine.serialized_engine = None  # it is on the GPU; this copy would stay in memory

    def run(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """The engine's results, a list."""
        given = [tensor.reshape(1) if tensor.ndim == 0 else tensor for tensor in tensors]
        named = dict(zip(self._all, (*given, *self._hyperparameters.vectors()), strict=True))
        with torch.cuda.device_of(given[0]):
            result = self._engine(*(named[name] for name in self._names))
        return [result] if isinstance(result, torch.Tensor) else list(result)


class Hyperparameters:
    """The buffers that an engine takes as inputs, as they are now."""

    def __init__(self, module: torch.nn.Module, region: Region) -> None:
        self._groups = [list(owners_of(module, names).values()) for names in region.hyperparameters.values()]

    def vectors(self) -> list[torch.Tensor]:
        """A float32 vector for each name of Region.hyperparameters."""
        return [torch.stack([owner[name] for owner, name in group]) for group in self._groups]


def owners_of(
    module: torch.nn.Module, names: Iterable[str], beside: Mapping[str, torch.Tensor] | None = None
) -> dict[str, tuple[Any, str]]:
    """{name: (dictionary, key)}: where each parameter or buffer of a module lies, to be found again when replaced.

    beside: tensors, by name, of what the module does not have. Raises ValueError for a name that is nowhere.
    """
    found = {}
    for name in names:
        path, _, key = name.rpartition(".")
        owner = module
        for part in path.split(".") if path else ():
            owner = owner if part in owner._modules else _without_lora(owner)
            owner = owner._modules.get(part)
            if owner is None:
                break
        if owner is not None and key not in owner._parameters and key not in owner._buffers:
            owner = _without_lora(owner)
        if owner is not None and owner._parameters.get(key) is not None:
            found[name] = (owner._parameters, key)
        elif owner is not None and owner._buffers.get(key) is not None:
            found[name] = (owner._buffers, key)
        elif beside and name in beside:
            found[name] = (beside, name)
        else:
            raise ValueError(f"the engine needs {name}, which this model does not have")
    return found


def _without_lora(module):
    """The layer that a LoRA of peft was put around; any other as it is."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def _kept_beside(path, engine):
    """{name: tensor} of the constants that are no tensor of the model, which lie beside the package."""
    from safetensors.torch import load_file

    beside = path.with_suffix(".safetensors")
    return load_file(beside) if beside.name in engine.files else {}
