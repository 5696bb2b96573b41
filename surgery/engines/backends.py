"""What has to be installed for engines of each backend."""

from surgery.errors import InputError

from .machine import backend_version

# backend: (package, what installs it)
PACKAGES = {
    "inductor": None,
    "onnx": ("onnxruntime", "pip install 'pladis-surgery[onnx]'"),
    "tensorrt": (
        "torch-tensorrt",
        "pip install 'pladis-surgery[tensorrt]' --extra-index-url https://download.pytorch.org/whl/cu130",
    ),
}
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # building and checking a graph takes more than running it
# What TensorRT is called depends on how it was installed.
_TENSORRT = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")


def missing_backend(backend):
    """Why a backend cannot be used here, with what installs it; None if it can."""
    package = PACKAGES[backend]
    if package and backend_version(package[0]) is None:
        return f"{package[0]} is not installed: {package[1]}"
    if backend == "tensorrt" and len(tensorrt_versions()) < 2:
        return f"TensorRT is not installed: {package[1]}"
    return None


def tensorrt_versions():
    """{package: version} of torch-tensorrt and of TensorRT, as far as they are installed."""
    found = {name: backend_version(name) for name in _TENSORRT}
    tensorrt = next(((name, version) for name, version in found.items() if version), None)
    own = backend_version("torch-tensorrt")
    return {**({"torch-tensorrt": own} if own else {}), **dict([tensorrt] if tensorrt else ())}


def import_torch_tensorrt():
    """The module torch_tensorrt; InputError where it or a library of TensorRT cannot be loaded."""
    try:
        import torch_tensorrt
    except Exception as error:  # where TensorRT's libraries are lacking it raises Exception itself
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"torch_tensorrt cannot be imported ({lines[0]}): {PACKAGES['tensorrt'][1]}") from error
    return torch_tensorrt
