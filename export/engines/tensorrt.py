"""TensorRT, by torch-tensorrt: one engine with the weights inside, and the hyperparameters as inputs.

What is kept is the engine as TensorRT writes it, so that trtexec and C++ read it too. The exported program in which
torch_tensorrt.save would put it holds it as base64 in a pickle: a third larger, and four copies in memory on the way.

Nothing here has met TensorRT itself, whose libraries were not to be had: it is written against the sources of
torch-tensorrt 2.11 and 2.13, and `tests/engines` runs all of it up to the building of the engine. Both are strongly
typed unless told otherwise, so that each operation keeps the dtype that it was exported with.
"""

import hashlib
import json
import operator
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from surgery.artifact.manifest import replace_file
from surgery.engines.fitting import import_torch_tensorrt, missing_backend, tensorrt_versions
from surgery.errors import InputError, SurgeryError
from surgery.machine import this_machine

from .program import export_portable_program, hyperparameter_buffers, inputs_of
from .recording import RecordedCall

SUFFIX = ".engine"
HOLDS_WEIGHTS = True
_TIMINGS = "timing.bin"


def needs() -> dict[str, str]:
    """{package: version} besides torch; InputError where one is missing."""
    if reason := missing_backend("tensorrt"):
        raise InputError(f"--target tensorrt cannot build here: {reason}")
    return tensorrt_versions()


def build(
    module: torch.nn.Module, method: str, calls: Mapping[str, RecordedCall], path: Path, options: Mapping[str, Any]
) -> dict[str, list[str]]:
    """Compile a module's method, ranged as its calls at the corners differ, into one engine in the file `path`.

    Returns the engine's own names, {"input_names", "output_names"}: of the inputs, those of `graph_names` that it has a
    use for, in its own order; of the outputs in the order of the call's results. Tensors without a dimension are
    vectors of one. options: "max_autotune". The module's weights wait in the CPU's memory meanwhile and come back to
    where they were. Raises InputError where torch-tensorrt has no converter for some operation.
    """
    torch_tensorrt = import_torch_tensorrt()
    calls = {corner: without_scalars(call) for corner, call in calls.items()}
    hyperparameters = hyperparameter_buffers(module)
    first = next(iter(calls["usual"].tensors.values()))
    with torch.cuda.device_of(first), tempfile.TemporaryDirectory() as folder, _timings_in(folder, first.device):
        program = export_portable_program(module, method, calls, hyperparameters)
        try:
            compiled = torch_tensorrt.dynamo.compile(
                program,
                arg_inputs=input_specifications(torch_tensorrt, calls, hyperparameters),
                **settings(first.device, folder, options),
            )
        except AssertionError as error:
            if "require_full_compilation" not in str(error):
                raise
            raise InputError(
                f"{type(module).__name__} does not become one TensorRT engine: {error}. torch-tensorrt has no "
                "converter for some operation of it; logging.getLogger('torch_tensorrt') names which at level DEBUG"
            ) from error
        finally:
            module.to(first.device)  # the program's parameters are the module's own, and were moved with it
        engine, names = engine_of(compiled)
        path.write_bytes(engine)
        return names


def engine_of(compiled: torch.fx.GraphModule) -> tuple[bytes, dict[str, list[str]]]:
    """(the engine that is all of a graph compiled by torch-tensorrt, its names as `build` gives them).

    Raises SurgeryError where the graph around it does more than call it.
    """
    called: torch.fx.Node | None = None
    given: list[Any] = []
    for node in compiled.graph.nodes:
        if node.op == "call_module" and called is None:
            called, given = node, [getattr(one, "target", None) for one in node.args]
        elif node.op not in ("placeholder", "output") and not _is_result(node, called):
            raise SurgeryError(f"torch-tensorrt left {node.op} {node.target} outside of the engine; nothing was kept")
    if called is None:
        raise SurgeryError("torch-tensorrt made no engine of it")
    engine: Any = compiled.get_submodule(str(called.target))
    if engine.input_binding_names != given:  # placeholders, or it is not the graph's inputs that it is given
        raise SurgeryError(f"torch-tensorrt named the engine's inputs {engine.input_binding_names}, not {given}")
    results: Any = compiled.graph.output_node().args[0]
    names = [engine.output_binding_names[0 if one is called else one.args[1]] for one in results]
    return engine.serialized_engine, {"input_names": given, "output_names": names}


def _is_result(node, called):
    return node.target is operator.getitem and node.args[0] is called


@contextmanager
def _timings_in(folder, device):
    """Have the timings of this kind of GPU and TensorRT, of earlier builds, in a folder, and keep those of this one."""
    from huggingface_hub import cached_assets_path

    made_for = {**tensorrt_versions(), "on": this_machine(device).architecture}
    key = hashlib.sha256(json.dumps(made_for, sort_keys=True).encode()).hexdigest()[:16]
    kept = cached_assets_path("pladis-surgery", namespace="tensorrt", subfolder=key) / _TIMINGS
    here = Path(folder, _TIMINGS)
    if kept.is_file():
        shutil.copyfile(kept, here)
    yield
    if here.is_file():
        replace_file(kept, here.read_bytes())


def settings(device: torch.device, folder: str | Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of torch_tensorrt.dynamo.compile besides program and inputs; folder: where the timing cache is."""
    return {
        "device": device,
        "min_block_size": 1,
        "require_full_compilation": True,
        "truncate_double": True,
        # Or the builder's flag REFIT is set, which nothing here makes use of: a changed artifact has another engine.
        "immutable_weights": True,
        "offload_module_to_cpu": True,
        # The scores of attention are float32 on purpose: TF32 has the ten bits of half precision.
        "disable_tf32": True,
        # Its default takes every attention mask for a causal one.
        "attn_bias_is_causal": False,
        # Its own cache of engines does not tell one scalar argument from another; ours is the engine's folder, by key.
        "cache_built_engines": False,
        "reuse_cached_engines": False,
        "timing_cache_path": str(Path(folder, _TIMINGS)),  # not one in /tmp that somebody else may own
        "optimization_level": 5 if options.get("max_autotune") else None,
    }


def input_specifications(
    torch_tensorrt: Any, calls: Mapping[str, RecordedCall], hyperparameters: Mapping[str, list[str]]
) -> list:
    """[torch_tensorrt.Input] of the calls' tensors, ranged and tuned for the usual size, and the hyperparameters."""
    found = []
    for tensor in inputs_of(calls):
        low, high = zip(*tensor.shape, strict=True)
        usual = tuple(calls["usual"].tensors[tensor.name].shape)
        shape = {"shape": usual} if low == high else {"min_shape": low, "opt_shape": usual, "max_shape": high}
        found.append(torch_tensorrt.Input(**shape, dtype=getattr(torch, tensor.dtype), name=tensor.name))
    for name, buffers in hyperparameters.items():
        found.append(torch_tensorrt.Input(shape=(len(buffers),), dtype=torch.float32, name=name))
    return found


def without_scalars(call: RecordedCall) -> RecordedCall:
    """A RecordedCall whose tensors without a dimension (a timestep, say) are vectors of one, which broadcast alike.

    Hyperparameters are vectors for the same reason: whether an engine's input may have no dimension is up to the
    runtime's version.
    """
    return replace(call, tensors={name: t.reshape(1) if t.ndim == 0 else t for name, t in call.tensors.items()})
