"""A package for each class of repeated block, without weights, as Spaces on ZeroGPU load them.

The package `spaces` (0.51) knows two layouts of a repository. `aoti_blocks_load(model, repo)` opens
`<Class>/package.pt2` for each name in the model's `_repeated_blocks` and puts it into every block of that class;
`aoti_load(model, repo)` opens `package/submodules/<path>/package.pt2` and puts it into the module of that path, or into
each of a list's. The first takes one package for all blocks of a class, so a UNet, whose blocks have several widths,
has the second. Either shows a package the block's own state dict: weights and hyperparameters are the pipeline's.
"""

import os
import shutil
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from surgery.artifact import read_manifest
from surgery.artifact.manifest import json_text
from surgery.artifact.staging import unwritten
from surgery.compat import compile_package, load_package
from surgery.engines.calls import put_together
from surgery.engines.record import Difference
from surgery.errors import InputError
from surgery.hub.base import local_folder
from surgery.machine import this_machine, versions
from surgery.nn import decompositions
from surgery.nn.backbones.processors import TextNotToldError
from surgery.nn.operators import OPERATIONS

from .build import TOLERANCES, Prepared, Wanted, prepare
from .capture import capture
from .comparing import compare_attached
from .elf import clear_executable_stack
from .inductor import settings_without_weights
from .program import example_of, groups_of, inputs_of, refuse_changing_constants, refuse_changing_tensors
from .recording import RecordedCall

PACKAGE = "package.pt2"
RECORD = "packages.json"


@dataclass(frozen=True)
class Packages:
    """What was built. files: {path in the folder: its size}; load: the call of `spaces` that loads them."""

    folder: Path
    files: dict[str, int]
    load: str
    difference: Difference


def build_packages(
    folder: str | Path, out: str | Path, wanted: Wanted, say: Callable[[str], object] = lambda text: None
) -> Packages:
    """The Packages of an artifact's denoiser, in the folder `out`, which is made: the content of a Hub repository.

    wanted: its target, regional and weights are as they must be. say: called with a line at the beginning of each
    stage. Raises InputError for what cannot be built or a folder that is there, ArtifactError for a folder that is no
    whole artifact, SurgeryError where the blocks do not give what eager gives; nothing is left then.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there already; give --out a folder that is not")
    place = local_folder(folder)
    if wanted.component and place and wanted.component not in (patched := read_manifest(place).patched):
        raise InputError(
            f"--target zerogpu is of the denoiser's repeated blocks ({', '.join(patched)}), and {wanted.component} is "
            "none; leave --component out"
        )
    prepared = prepare(folder, replace(wanted, target="inductor", regional=True, weights="artifact"))
    name = prepared.dtype_name
    operators = [operation["operator"] for operation in prepared.manifest.operations_of(prepared.component)]
    if told := [name for name in operators if OPERATIONS[name].role not in (None, "scores")]:
        raise InputError(f"{told[0]} is told more than `spaces` gives a block's package; export an engine for it")
    building = _made(out)
    try:
        say(f"inputs: {prepared.component}, {prepared.profile}, {name} on {prepared.device}")
        captured = capture(
            prepared.source,
            prepared.manifest,
            prepared.component,
            prepared.profile.sizes(),
            prepared.device,
            prepared.dtype,
            regional=True,
        )
        refuse_changing_tensors(captured.module, captured.recorded.first_calls)
        groups = groups_of(captured.module, captured.blocks)
        places = places_of(captured.module, groups)
        for paths, made in zip(groups, places, strict=True):
            first = building / made[0] / PACKAGE
            first.parent.mkdir(parents=True)
            block = captured.module.get_submodule(paths[0])
            say(f"compile: {type(block).__name__} for {len(paths)} modules")
            compile_block(block, captured.blocks[paths[0]], first, wanted)
            for other in made[1:]:
                (building / other).mkdir(parents=True)
                shutil.copyfile(first, building / other / PACKAGE)
        say("check: against eager")
        opened = {paths[0]: building / made[0] / PACKAGE for paths, made in zip(groups, places, strict=True)}
        difference = _compared(captured, groups, opened, wanted.tolerance or TOLERANCES[name])
        by_class = not places[0][0].startswith("package/")
        load = f"spaces.{'aoti_blocks_load' if by_class else 'aoti_load'}(pipe.{prepared.component}, REPOSITORY)"
        (building / RECORD).write_text(json_text(_record(prepared, load, difference)), encoding="utf-8")
        (building / "README.md").write_text(_readme(prepared, load), encoding="utf-8")
        if out.exists():
            out.rmdir()
        os.replace(building, out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    files = {path.relative_to(out).as_posix(): path.stat().st_size for path in sorted(out.rglob("*")) if path.is_file()}
    return Packages(out, files, load, difference)


def _made(out):
    """The folder beside `out` in which its content is built, empty."""
    building = out.with_name(f".{out.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    try:
        building.mkdir(parents=True)
    except OSError as error:
        raise unwritten(f"to {out}", error, "make room, or name another folder: --out") from error
    return building


def places_of(model: torch.nn.Module, groups: list[list[str]]) -> list[list[str]]:
    """The folders of each group's package: one named by its class where `spaces` can tell blocks by that, else paths.

    groups: as groups_of gives them. A list of which all modules are in one group stands for them.
    """
    by_class = defaultdict(list)
    for paths in groups:
        by_class[type(model.get_submodule(paths[0])).__name__].append(paths)
    everywhere = defaultdict(set)
    for path, module in model.named_modules():
        everywhere[type(module).__name__].add(path)
    named = set(getattr(model, "_repeated_blocks", None) or ())
    if named == set(by_class) and all(
        len(own) == 1 and set(own[0]) == everywhere[kind] for kind, own in by_class.items()
    ):
        return [[type(model.get_submodule(paths[0])).__name__] for paths in groups]
    return [[f"package/submodules/{path}" for path in _as_lists(model, paths)] for paths in groups]


def _as_lists(model, paths):
    """The paths, with a list's own in place of those of all its modules."""
    lists = defaultdict(list)
    for path in paths:
        lists[path.rpartition(".")[0]].append(path)
    found = []
    for parent, own in lists.items():
        module = model.get_submodule(parent)
        whole = isinstance(module, torch.nn.ModuleList) and len(module) == len(own)
        found += [parent] if whole else own
    return found


def compile_block(block: torch.nn.Module, calls: Mapping[str, RecordedCall], path: Path, wanted: Wanted) -> None:
    """Compile a block's forward() into `path`, to be called as the model calls it.

    Raises InputError where it holds tensors that its state dict has not, or its text only the model tells.
    """
    refuse_changing_constants(block, calls)
    args, kwargs = _arguments(calls["usual"])
    bounds = {tensor.name: tensor.shape for tensor in inputs_of(calls)}
    named = {id(tensor): name for name, tensor in calls["usual"].tensors.items()}

    def ranged(value):
        if not isinstance(value, torch.Tensor):
            return None
        spans = enumerate(bounds[named[id(value)]])
        return {axis: torch.export.Dim.AUTO(min=low, max=high) for axis, (low, high) in spans if low != high} or None

    def example(value):
        return example_of(value, bounds[named[id(value)]]) if isinstance(value, torch.Tensor) else value

    by_place, by_name = calls["usual"].form
    shapes = {name: pytree.tree_map(ranged, value) for name, value in zip(by_place, args, strict=True)}
    shapes |= {name: pytree.tree_map(ranged, kwargs[name]) for name in by_name}
    given = pytree.tree_map(example, (args, kwargs))
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            program = torch.export.export(block, *given, dynamic_shapes=shapes, strict=False)
            if wanted.operator == "decomposed":
                program = program.run_decompositions(decompositions())  # pyright: ignore[reportArgumentType]
            compile_package(program, path, settings_without_weights(wanted.max_autotune))
        clear_executable_stack(path)
    except TextNotToldError as error:
        kind = type(block).__name__
        raise InputError(
            f"{kind} has text and image in one stream; only the whole model tells which is which"
        ) from error
    lacking = sorted(set(load_package(path, _index_of(block)).get_constant_fqns()) - set(block.state_dict()))
    if lacking:
        raise InputError(
            f"{type(block).__name__} holds {lacking[0]}, which is not in the weights that a Space shows it"
        )


def _arguments(call):
    """(args, kwargs) of a recorded call as the model made it."""
    given = put_together(call.template, call.tensors)
    by_place, by_name = call.form
    return tuple(given.get(name) for name in by_place), {name: given.get(name) for name in by_name}


def _index_of(module):
    device = next(module.parameters()).device
    return device.index if device.type == "cuda" and device.index is not None else -1


class _Shown:
    """A package in one block's place, shown that block's tensors before each call, as `spaces` does."""

    def __init__(self, package: Any, block: torch.nn.Module) -> None:
        self.package, self.tensors = package, block.state_dict()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = {name: self.tensors[name] for name in self.package.get_constant_fqns()}
        self.package.load_constants(own, check_full_update=True, user_managed=True)
        return self.package(*args, **kwargs)


def _compared(captured, groups, files, tolerance):
    """The Difference from eager with each group's package, by the path of its first module, in its blocks' place."""
    model = captured.module
    packages = {first: load_package(path, _index_of(model)) for first, path in files.items()}

    def attach():
        for paths in groups:
            for path in paths:
                block = model.get_submodule(path)
                block.forward = _Shown(packages[paths[0]], block)

    def detach():
        for path in (path for paths in groups for path in paths):
            vars(model.get_submodule(path)).pop("forward", None)

    return compare_attached(captured, tolerance, True, attach, detach)


def _record(prepared: Prepared, load, difference):
    return {
        "schema_version": 1,
        "artifact": prepared.manifest.hash,
        "component": prepared.component,
        "dtype": prepared.dtype_name,
        "images": str(prepared.profile),
        "built_on": asdict(this_machine(prepared.device)),
        "versions": versions(),
        "load": load,
        "difference": difference.model_dump(mode="json"),
    }


def _readme(prepared: Prepared, load):
    machine = this_machine(prepared.device)
    call = load.replace("REPOSITORY", '"THIS/REPOSITORY"')
    dtype = prepared.dtype_name
    return f"""# Compiled blocks of {prepared.manifest.name}

Of the {prepared.component} of the artifact {prepared.manifest.hash}, without weights, for Spaces on ZeroGPU:
{machine.architecture}, torch {machine.torch}, {dtype}, {prepared.profile} images x height x width. No other release
of torch and no other GPU loads it.

```python
import spaces
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("ARTIFACT", trust_remote_code=True, torch_dtype=torch.{dtype}).to("cuda")
{call}
```
"""
