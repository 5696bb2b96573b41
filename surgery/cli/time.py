"""`surgery time`: what an operator costs a whole pipeline."""

import argparse
import statistics
from pathlib import Path
from textwrap import fill
from typing import Any

from surgery.console import quiet_bars
from surgery.machine import best_device, this_machine, versions

from .given import check_threads, given_sampling
from .show import print_json, size, table


def run_time(arguments: argparse.Namespace) -> None:
    """Print a row for the base and for each operator, eager and compiled."""
    given = given_sampling(arguments, "num_frames")
    check_threads(arguments)
    quiet_bars()
    from surgery.runtime.timing import time_sides

    operators = [text.strip() for text in (arguments.operators or "").split(",") if text.strip()]
    prompts = {"prompts": _prompts(arguments.prompts, arguments.limit * arguments.batch)} if arguments.prompts else {}
    config = _config(arguments, given)
    rows = time_sides(
        config,
        operators,
        rounds=arguments.limit,
        batch=arguments.batch,
        sampling=given,
        compile=arguments.compile,
        memory=not arguments.no_memory,
        **prompts,
    )
    _print(arguments, config, given, rows)


def _config(arguments, given):
    """The WorkerConfig of a model; a recipe is applied first, into out/<its name>-time."""
    from surgery.artifact import read_manifest
    from surgery.artifact.fetch import model_folder
    from surgery.artifact.manifest import MANIFEST
    from surgery.hub.base import local_folder
    from surgery.recipe.reading import shipped_recipes
    from surgery.runtime.worker import WorkerConfig

    model = arguments.model
    if model.endswith((".yaml", ".yml")) or (local_folder(model) is None and model in shipped_recipes()):
        from surgery.applying import kept_artifact
        from surgery.recipe.plan import make_plan

        planned = make_plan(model)
        model = kept_artifact(planned, Path("out") / f"{planned.plan.name}-time")
    folder = model_folder(model, arguments.revision)
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else None
    sampling = dict(manifest.sampling) if manifest else {}
    if "steps" in given:
        sampling.pop("timesteps", None)
    chosen: dict[str, Any] = {name: getattr(arguments, name) for name in ("device", "dtype", "threads")}
    return WorkerConfig(str(folder), None, manifest and manifest.hash, sampling, **chosen)


def _prompts(name, count):
    from surgery.validate.prompts import open_prompts

    return [prompt.text for prompt in open_prompts(name, Path(), limit=count).prompts]


def _print(arguments, config, given, rows):
    from surgery.runtime.peak import HOW
    from surgery.validate.session import hardware

    device = config.device or best_device()
    where = {"hardware": hardware(device), "machine": this_machine(device).to_json(), "versions": versions()}
    settings = {"limit": arguments.limit, "batch": arguments.batch, "dtype": config.dtype, "threads": config.threads}
    how = next((row.how for row in rows if row.how), None)
    if arguments.json:
        told = {
            "model": config.model,
            "artifact": config.hash,
            "sampling": {**config.sampling, **given},
            **settings,
            **where,
        }
        told |= {"memory": how and HOW[how], "rows": [row.to_json() for row in rows]}
        print_json({"schema_version": 1, **told})
        return
    cells = []
    for row in rows:
        ratio = statistics.median(row.ratios)
        spread = f"{min(row.ratios):.3f} to {max(row.ratios):.3f}"
        memory = size(row.memory) if row.memory else ""
        cells.append([row.side.name, row.mode, f"{statistics.median(row.seconds):.4g}", f"{ratio:.3f}", spread, memory])
    title = f"medians of {arguments.limit} rounds, {arguments.batch} at once"
    unit = "s/video" if {**config.sampling, **given}.get("num_frames") else "s/image"
    table(title, ["side", "mode", unit, "of base", "lowest to highest", "peak"], cells)
    for row in rows:
        if row.compile_seconds is not None:
            print(f"{row.side.name}, {row.mode}: {row.compile_seconds:.1f} s for the first call, with compiling")
    text = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    for line in ([f"peak: {HOW[how]}"] if how else []) + [f"on {where['hardware']}: {text}"]:
        print(fill(line, 80))
