"""What runs a compiled function: AOTInductor's packages, ONNX Runtime, TensorRT."""

from pathlib import Path

import torch

from surgery.errors import InputError
from surgery.foreign import reading

from .backends import import_torch_tensorrt, missing_backend


def open_runner(engine, region, module, model, folder):
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

    def __init__(self, path, engine, region, module, model):
        device = model.device
        index = device.index if device.type == "cuda" and device.index is not None else -1
        self._package = torch._inductor.aoti_load_package(str(path), device_index=index)
        names = {}
        if engine.weights == "artifact":
            names = {name.removeprefix("module."): name for name in self._package.get_constant_fqns()}
        owners = owners_of(module, names, _kept_beside(path, engine))
        self._owners = {names[name]: owner for name, owner in owners.items()}
        self._hyperparameters = Hyperparameters(module, region)
        self._device, self._shown = device, None
        self._dtypes = [owner[name].dtype for owner, name in self._owners.values()]
        self._show()

    def run(self, tensors):
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

    def __init__(self, path, engine, region, module, model):
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

    def run(self, tensors):
        """The graph's results as torch tensors on the first input's device."""
        given = [tensor.detach().cpu().numpy() for tensor in (*tensors, *self._hyperparameters.vectors())]
        results = self._session.run(None, dict(zip(self._names, given, strict=True)))
        return [torch.from_numpy(result).to(tensors[0].device) for result in results]


class TensorRTRunner:
    """A program around one TensorRT engine, as torch-tensorrt saved it; the hyperparameters are inputs."""

    def __init__(self, path, engine, region, module, model):
        torch_tensorrt = import_torch_tensorrt()
        with torch.cuda.device_of(next(model.parameters())):  # the engine goes to the current device
            self._program = torch_tensorrt.load(str(path)).module()
        self._hyperparameters = Hyperparameters(module, region)

    def run(self, tensors):
        """The program's results, a list."""
        given = [tensor.reshape(1) if tensor.ndim == 0 else tensor for tensor in tensors]
        with torch.cuda.device_of(given[0]):
            result = self._program(*given, *self._hyperparameters.vectors())
        return [result] if isinstance(result, torch.Tensor) else list(result)


class Hyperparameters:
    """The buffers that an engine takes as inputs, as they are now."""

    def __init__(self, module, region):
        self._groups = [list(owners_of(module, names).values()) for names in region.hyperparameters.values()]

    def vectors(self):
        """A float32 vector for each name of Region.hyperparameters."""
        return [torch.stack([owner[name] for owner, name in group]) for group in self._groups]


def owners_of(module, names, beside=None):
    """{name: (dictionary, key)}: where each parameter or buffer of a module lies, to be found again when replaced.

    beside: tensors, by name, of what the module does not have. Raises ValueError for a name that is nowhere.
    """
    found = {}
    for name in names:
        path, _, key = name.rpartition(".")
        owner = module
        for part in path.split(".") if path else ():
            owner = owner._modules.get("base_layer", owner) if part not in owner._modules else owner
            owner = owner._modules.get(part)
            if owner is None:
                break
        if owner is not None and key not in owner._parameters and key not in owner._buffers:
            owner = owner._modules.get("base_layer", owner)  # a Linear within a LoRA's layer
        if owner is not None and owner._parameters.get(key) is not None:
            found[name] = (owner._parameters, key)
        elif owner is not None and owner._buffers.get(key) is not None:
            found[name] = (owner._buffers, key)
        elif beside and name in beside:
            found[name] = (beside, name)
        else:
            raise ValueError(f"the engine needs {name}, which this model does not have")
    return found


def _kept_beside(path, engine):
    """{name: tensor} of the constants that are no tensor of the model, which lie beside the package."""
    from safetensors.torch import load_file

    beside = path.with_suffix(".safetensors")
    return load_file(beside) if beside.name in engine.files else {}
