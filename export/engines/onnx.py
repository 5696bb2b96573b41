"""ONNX: a graph for ONNX Runtime, trtexec and whatever else reads it; weights inside, hyperparameters as inputs."""

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from surgery.engines.fitting import ONNX_PACKAGES, PACKAGES
from surgery.errors import InputError

from .capture import RecordedCall
from .program import export_portable_program, hyperparameter_buffers

SUFFIX = ".onnx"
HOLDS_WEIGHTS = True
OPSET = 18


def needs() -> dict[str, str]:
    """{package: version} besides torch; InputError where one is missing."""
    try:
        return {name: metadata.version(name) for name in ONNX_PACKAGES}
    except metadata.PackageNotFoundError as error:
        raise InputError(f"--target onnx needs {error.name}: {PACKAGES['onnx'][1]}") from error


def build(
    module: torch.nn.Module, method: str, calls: Mapping[str, RecordedCall], path: Path, options: Mapping[str, Any]
) -> None:
    """Write a module's method as an ONNX graph (opset 18, IR of torch.onnx's dynamo exporter) to `path`.

    Inputs are named as the call's tensors with dots as underscores, then the hyperparameters, each a vector with a
    value for each patched module: an initialiser would be merged with others of its value. Weights lie in `path`.data.
    """
    hyperparameters = hyperparameter_buffers(module)
    program = export_portable_program(module, method, calls, hyperparameters)
    names = [*calls["usual"].tensors, *hyperparameters]
    written = torch.onnx.export(
        program,
        input_names=[name.replace(".", "_") for name in names],
        output_names=[f"output_{name}".replace(".", "_") for name in calls["usual"].results],
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    assert written is not None
    written.save(str(path), external_data=True)
