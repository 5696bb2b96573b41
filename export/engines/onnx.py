"""ONNX: a graph for ONNX Runtime, trtexec and whatever else reads it; weights inside, hyperparameters as inputs."""

import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from surgery.engines.fitting import ONNX_PACKAGES, PACKAGES
from surgery.errors import InputError
from surgery.machine import versions

from .program import export_portable_program, graph_names, hyperparameter_buffers, inputs_of, values_of
from .recording import RecordedCall

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
    The graph's metadata says what `engine.json` says of its inputs, and nothing of the machine that built it.
    """
    hyperparameters = hyperparameter_buffers(module)
    program = export_portable_program(module, method, calls, hyperparameters)
    inputs, outputs = graph_names(calls["usual"], hyperparameters)
    written = torch.onnx.export(
        program, input_names=inputs, output_names=outputs, opset_version=OPSET, dynamo=True, verbose=False
    )
    assert written is not None
    _forget_builder(written.model)
    given = [tensor.model_dump() for tensor in inputs_of(calls)]
    told = {
        "inputs": [{**tensor, "name": name} for tensor, name in zip(given, inputs, strict=False)],
        "hyperparameters": values_of(module, hyperparameters),
        "modules": [name.rpartition(".")[0] for name in next(iter(hyperparameters.values()), ())],
        "outputs": outputs,
    }
    written.model.metadata_props["pladis-surgery"] = versions()["pladis-surgery"]
    written.model.metadata_props.update({f"pladis-surgery.{name}": json.dumps(value) for name, value in told.items()})
    written.save(str(path), external_data=True)


def _forget_builder(model):
    """Take the exporter's stack traces and paths out of an onnx_ir model; they are most of a file without weights."""
    import onnx_ir

    for graph in (model.graph, *model.functions.values()):
        for node in onnx_ir.traversal.RecursiveGraphIterator(getattr(graph, "graph", graph)):
            for part in (node, *node.outputs):
                part.metadata_props.clear()
                part.doc_string = None
        for value in (*graph.inputs, *getattr(graph, "initializers", {}).values()):
            value.metadata_props.clear()
            value.doc_string = None
        graph.metadata_props.clear()
        graph.doc_string = None
    model.metadata_props.clear()
    model.doc_string = None
