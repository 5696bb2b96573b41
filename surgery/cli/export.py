"""`surgery export`: compiled engines of an artifact, each checked against eager before it is kept."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.console import quiet_bars
from surgery.engines.record import parse_profile
from surgery.errors import InputError

from .given import dtype_of, fields_of
from .show import print_json, relative, size, table

if TYPE_CHECKING:
    from surgery.recipe.schema import Recipe


def run_export(arguments: argparse.Namespace) -> None:
    """Build the engines and print what they are."""
    if arguments.tolerance is not None and not arguments.tolerance > 0:
        raise InputError("--tolerance must be positive")
    if (arguments.target == "zerogpu") != bool(arguments.out):
        raise InputError("--out FOLDER goes with --target zerogpu, and that needs it")
    quiet_bars()
    if arguments.target == "zerogpu":
        return _run_zerogpu(arguments)
    wanted = [_wanted(arguments, component) for component in arguments.component or [None]]
    built = build_all(arguments.folder, wanted, arguments.json)
    if arguments.json:
        print_json({"schema_version": 1, "engines": built})


def _run_zerogpu(arguments):
    if arguments.weights == "engine" or len(arguments.component or ()) > 1:
        raise InputError("packages for ZeroGPU are of one denoiser's blocks, without weights; leave --weights out")
    wanted = _wanted(arguments, (arguments.component or [None])[0])

    from surgery.export.engines.zerogpu import build_packages

    made = build_packages(arguments.folder, arguments.out, wanted, _say)
    if arguments.json:
        record = {"folder": str(made.folder), "files": made.files, "load": made.load}
        print_json({"schema_version": 1, **record, "difference": made.difference.model_dump(mode="json")})
        return
    rows = [[path, size(held)] for path, held in made.files.items()]
    rows.append(["from eager", f"relative {made.difference.relative:.2g} of at most {made.difference.tolerance:g}"])
    rows.append(["after a change", f"relative {made.difference.after_change:.2g}"])
    table("blocks", None, rows)
    print(f"in a Space: {made.load}")


def wanted_by(recipe: "Recipe") -> list:
    """[Wanted] of a recipe's `export`; InputError for shapes that cannot be read."""
    return [_wanted(one, one.component) for one in recipe.export or ()]


def _wanted(given, component):
    """The Wanted of a component by the options of the command line, or by an entry of a recipe's `export`."""
    profile = parse_profile(given.shapes) if given.shapes else None  # before what takes seconds to import

    from surgery.export.engines.build import Wanted

    return fields_of(
        Wanted,
        given,
        component=component,
        profile=profile,
        dtype=dtype_of(given.dtype),
        operator="decomposed" if given.decompose else "fused",
    )


def build_recipes(folder: str | Path, wanted: Sequence, as_json: bool = False) -> tuple[list, list[str]]:
    """(engines as build_all gives them, why those are not built that cannot be on this machine)."""
    from .doctor import diagnose

    missing = diagnose()["engines"]
    possible = [one for one in wanted if not missing[one.target]]
    left_out = [f"an engine for {one.target}: {missing[one.target]}" for one in wanted if missing[one.target]]
    return build_all(folder, possible, as_json), left_out


def build_all(folder: str | Path, wanted: Iterable, as_json: bool = False) -> list[dict]:
    """[{"folder", "built", **engine.json}] of the engines that are wanted, one built after the other."""
    from surgery.export.engines.build import build_engine

    built = []
    for one in wanted:
        engine, place, is_new = build_engine(folder, one, _say)
        built.append({"folder": str(place), "built": is_new, **engine.model_dump(mode="json")})
        if not as_json:
            _show(engine, place, is_new)
    return built


def _say(text):
    print(f"surgery: {text}", file=sys.stderr, flush=True)


def _show(engine, place, is_new):
    difference = engine.difference
    functions = f"{len(engine.regions)} compiled for {sum(len(region.modules) for region in engine.regions)} modules"
    changed = difference.after_change
    rows = [
        ["engine", f"{engine.key}{'' if is_new else ' (there already)'}"],
        ["for", f"{engine.component}, {engine.dtype}, images {engine.profile}"],
        ["runs on", f"{engine.built_on.architecture} ({engine.built_on.name}), torch {engine.built_on.torch}"],
        ["functions", functions],
        ["size", f"{size(sum(file.size for file in engine.files.values()))}, weights from the {engine.weights}"],
        ["took", ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in engine.seconds.items())],
        [
            "from eager",
            f"largest {difference.largest:.2g}, mean {difference.mean:.2g}; relative {difference.relative:.2g} of at "
            f"most {difference.tolerance:g}",
        ],
        [
            "hyperparameters",
            f"{engine.hyperparameters}; {changed:.2g} from eager after a change" if changed is not None else "none",
        ],
    ]
    table(engine.component, None, rows)
    print(f"engine: {relative(place.absolute())}")
