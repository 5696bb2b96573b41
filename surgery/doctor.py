"""What this machine can run, as data."""

import os
import platform
import shutil
import sysconfig

from surgery.engines.backends import ONNX_PACKAGES, PACKAGES, missing_backend
from surgery.engines.machine import backend_version

_PACKAGES = {
    "pladis-surgery": "this package",
    "torch": "",
    "diffusers": "",
    "transformers": "",
    "accelerate": "loading without a second copy in memory, offloading",
    "entmax": "implementation='entmax', the papers' own arithmetic",
    "peft": "loading LoRA beside a patch",
    "safetensors": "",
    "huggingface_hub": "the Hub",
    "triton": "the fused attention kernel and compiled graphs on CUDA",
    "onnxruntime": "engines of --target onnx",
    "torch-tensorrt": "engines of --target tensorrt",
    "ray": "surgery serve, and drawing on several workers",
}


def diagnose():
    """A dict: system, packages, devices, compiler, disk and Hub access. Reads; changes and contacts nothing."""
    return {
        "schema_version": 1,
        "system": {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "cpu_count": os.cpu_count(),
            "memory_bytes": _memory(),
        },
        "packages": {name: {"version": backend_version(name), "for": purpose} for name, purpose in _PACKAGES.items()},
        "devices": _devices(),
        "compiler": _compiler(),
        "engines": _engines(),
        "hub": _hub(),
        "out": {"folder": os.getcwd(), "free_bytes": shutil.disk_usage(os.getcwd()).free},
    }


def _memory():
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _devices():
    import torch

    found = [{"name": "cpu", "description": torch.backends.cpu.get_cpu_capability(), "memory_bytes": _memory()}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": f"cuda:{index}",
                "description": f"{properties.name}, compute capability {properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
            }
        )
    if torch.backends.mps.is_available():
        found.append({"name": "mps", "description": "Apple GPU", "memory_bytes": None})
    return found


def _compiler():
    path = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    headers = os.path.isfile(os.path.join(sysconfig.get_paths()["include"], "Python.h"))
    return {"cxx": path, "python_headers": headers}


def _engines():
    """{backend: None if engines of it can be built and run here, else why not}."""
    import torch

    found = _compiler()
    lacks = None if found["cxx"] else "no C++ compiler was found (Debian: g++)"
    if not lacks and not found["python_headers"]:
        lacks = "Python's headers are missing (Debian: python3-dev)"
    if torch.cuda.is_available() and backend_version("triton") is None:
        lacks = "triton is not installed, which compiles for the GPU"
    onnx = [name for name in ONNX_PACKAGES if backend_version(name) is None]
    tensorrt = missing_backend("tensorrt")
    if not torch.cuda.is_available():
        tensorrt = f"there is no NVIDIA GPU{f', and {tensorrt}' if tensorrt else ''}"
    return {
        "inductor": lacks,
        "onnx": f"{', '.join(onnx)} not installed: {PACKAGES['onnx'][1]}" if onnx else None,
        "tensorrt": tensorrt,
    }


def _hub():
    from huggingface_hub import constants, get_token

    return {
        "logged_in": get_token() is not None,  # whether there is a token; the token itself is never read out
        "offline": bool(constants.HF_HUB_OFFLINE),
        "cache": constants.HF_HUB_CACHE,
    }
