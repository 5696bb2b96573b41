"""`surgery doctor`: what this machine can run."""

import argparse
import os
import platform
import shutil
import sysconfig
from importlib import metadata
from typing import Any

from surgery.engines.fitting import ONNX_PACKAGES, PACKAGES, missing_backend
from surgery.machine import backend_version

from .show import print_json, size, table

_PACKAGES = {
    "pladis-surgery": "this package",
    "torch": "",
    "diffusers": "",
    "transformers": "",
    "accelerate": "loading without a second copy in memory, offloading",
    "entmax": "implementation='entmax', the papers' own arithmetic",
    "safetensors": "",
    "huggingface_hub": "the Hub",
    "triton": "the fused attention kernel and compiled graphs on CUDA",
}
_EXTRAS = {
    "lora": "LoRA beside a patch",
    "validate": "validate, sweep, diagnose, invert; attention-maps (matplotlib alone)",
    "video": "mp4 files",
    "ui": "studio",
    "onnx": "engines of --target onnx",
    "tensorrt": "engines of --target tensorrt",
    "ray": "serve, and drawing on several workers",
    "otel": "serve --otel",
}


def diagnose() -> dict[str, Any]:
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
        "extras": {name: {"lacks": _lacking(name), "for": purpose} for name, purpose in _EXTRAS.items()},
        "devices": _devices(),
        "compiler": _compiler(),
        "engines": _engines(),
        "hub": _hub(),
        "out": {"folder": os.getcwd(), "free_bytes": shutil.disk_usage(os.getcwd()).free},
    }


def _lacking(extra):
    """The packages of an extra that are not installed."""
    from packaging.requirements import Requirement

    wanted = [Requirement(text) for text in metadata.requires("pladis-surgery") or ()]
    wanted = [one.name for one in wanted if one.marker and one.marker.evaluate({"extra": extra})]
    return [name for name in wanted if backend_version(name) is None]


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


def run_doctor(arguments: argparse.Namespace) -> None:
    """Print versions, devices, compiler and Hub access."""
    found = diagnose()
    if arguments.json:
        print_json(found)
        return
    system = found["system"]
    print(
        f"{system['platform']}, Python {system['python']}, {system['cpu_count']} CPUs, {size(system['memory_bytes'])}"
    )
    packages = [[n, p["version"] or "not installed", p["for"]] for n, p in found["packages"].items()]
    table("packages", ["package", "version", "for"], packages)
    extras = [
        [name, f"lacks {', '.join(one['lacks'])}" if one["lacks"] else "installed", one["for"]]
        for name, one in found["extras"].items()
    ]
    table("extras: pip install 'pladis-surgery[NAME]', or '.[NAME]' in a checkout", ["extra", "", "for"], extras)
    devices = [[d["name"], d["description"], size(d["memory_bytes"])] for d in found["devices"]]
    table("devices", ["device", "what", "memory"], devices)
    compiler, hub = found["compiler"], found["hub"]
    headers = "" if compiler["python_headers"] else ", but Python's headers are missing (Debian: python3-dev)"
    torch_compile = f"{compiler['cxx']}{headers}" if compiler["cxx"] else "none found (Debian: g++)"
    rows = [
        ["C++ compiler, for the CPU attention kernel and torch.compile", torch_compile],
        ["Hub login", "yes" if hub["logged_in"] else "no; `hf auth login` for gated models and publishing"],
        ["Hub offline mode", "on (HF_HUB_OFFLINE)" if hub["offline"] else "off"],
        ["Hub cache", hub["cache"]],
        ["free disk here", size(found["out"]["free_bytes"])],
    ]
    table("this machine", None, rows)
    rows = [
        [backend, f"not available: {reason}" if reason else "builds and runs"]
        for backend, reason in found["engines"].items()
    ]
    table("compiled engines", None, rows)
