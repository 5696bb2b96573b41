"""The verbs that only look: `surgery plan`, `inspect`, `diagnose` and `verify`, as tables or JSON."""

import argparse
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

from surgery.console import guidance_text, operation_text, quiet_bars, schedule_text, settings_text
from surgery.errors import InputError

from .show import many, print_json, relative, size, table, warn


def run_plan(arguments: argparse.Namespace) -> None:
    """Print what `apply` would do."""
    from surgery.recipe.plan import make_plan

    plan = make_plan(arguments.recipe, arguments.overrides).plan
    warn(plan.warnings)
    if arguments.json:
        print_json(plan.to_json())
        return
    _show_plan(plan, arguments.verbose)


def _show_plan(plan, verbose):
    """The plan's tables on standard output."""
    base, totals = plan.base, plan.totals
    at = f" at {base['revision'][:12]}" if base["revision"] else ""
    single = base.get("single_file")
    read_as = f"{single}, read as " if single else ""
    print(f"{plan.name}: {read_as}{base['pipeline']}{at} ({base['pipeline_class']}, {_denoisers(plan.denoisers)})")
    rows = []
    for index, operation in enumerate(plan.operations):
        schedule = schedule_text(operation["schedule"]) if "schedule" in operation else "none"
        rows.append([index, operation["operator"], settings_text(operation), schedule, len(operation["layers"])])
    table("operations", ["operation", "operator", "settings", "schedule", "modules"], rows)
    sites = {site.path: site for site in plan.sites}
    placed = [(sites[path], [index]) for index, one in enumerate(plan.operations) for path in one["layers"]]
    title = f"replaced: {totals['replaced']} of {totals['attention_modules']} attention modules"
    _show_sites(title, ["operation"], placed, verbose)
    by_reason = {}
    for path, reason in plan.skipped.items():
        by_reason.setdefault(reason, []).append(path)
    table("left as they are", ["modules", "first", "why"], [[len(p), p[0], reason] for reason, p in by_reason.items()])
    files = [
        [file.path, size(file.size) if file.size is not None else "new", _origin(file.origin), (file.sha256 or "")[:12]]
        for file in plan.files
        if file.weights or file.origin.kind == "surgery"
    ]
    table("weights, and files that are written anew", ["file", "size", "from", "sha256"], files)
    if plan.scheduler:
        settings = ", ".join(f"{key}={value}" for key, value in plan.scheduler.items() if key != "class")
        print(f"scheduler: {plan.scheduler['class']} {settings}")
    guidance = f", guided by {guidance_text(plan.guidance)}" if plan.guidance else ""
    whose = " or ".join(plan.denoisers)
    print(f"sampling: {many(plan.evaluations, 'evaluation')} of the {whose} a step for each image{guidance}")
    rewritten = f", of which {size(totals['rewritten_bytes'])} are rewritten" if totals["rewritten_bytes"] else ""
    print(f"weights: {size(totals['weight_bytes'])}{rewritten}\nplan hash: {plan.hash}")


def _denoisers(found):
    return " and ".join(f"{name} {kind}" for name, kind in found.items())


def _show_sites(title, columns, placed, verbose):
    """A table of (AttentionSite, [further cells]): a row for each alike in a block, or for each module."""
    if verbose:
        rows = [[site.path, site.kind, site.heads, site.head_dim, *cells] for site, cells in placed]
        table(title, ["module", "kind", "heads", "head_dim", *columns], rows)
        return
    alike = Counter((site.block, site.kind, site.heads, site.head_dim, *cells) for site, cells in placed)
    rows = [[block, count, *others] for (block, *others), count in sorted(alike.items(), key=_down_to_up)]
    table(title, ["block", "modules", "kind", "heads", "head_dim", *columns], rows)


def _down_to_up(row):
    """Where a row belongs: a UNet's middle, which it has last, comes before the way up."""
    return {"up": 2, "mid": 1}.get(row[0][0], 0)


def _origin(origin):
    if origin.kind == "surgery":
        return "this plan"
    whole = origin.path is None or origin.source.endswith(origin.path)
    source = origin.source if whole else f"{origin.source}/{origin.path}".removeprefix("./")
    at = f"@{origin.revision[:12]}" if origin.revision else ""
    loras = "".join(f" + {lora['scale']:g} x {lora['source']}/{lora['path']}" for lora in origin.loras)
    verb = {"base": "", "component": "", "converted": ", converted to safetensors", "fused": ", LoRA fused"}[
        origin.kind
    ]
    return f"{source}{at}{loras}{verb}"


_DENSE = re.compile(r"(.*)(?:, so|;) it stays dense")


def run_inspect(arguments: argparse.Namespace) -> None:
    """Print the attention modules of a model, and whether surgery fits it."""
    from surgery.models.inspecting import inspect_model

    found = inspect_model(arguments.model, arguments.revision)
    if arguments.json:
        print_json(found)
        return
    print(f"{found['model']}: {found['pipeline_class']}, {_denoisers(found['denoisers'])}")
    placed, reasons = [], {}
    for site in found["sites"]:
        patched = site.operation and operation_text(site.operation)
        verdict = patched or (found["refusal"] if site.kind == "cross" else None) or site.refusal or "can be replaced"
        if reason := _DENSE.match(verdict):
            reasons[reason[1]] = verdict = "stays dense"
        placed.append((site, [verdict]))
    _show_sites(many(len(placed), "attention module"), ["surgery"], placed, arguments.verbose)
    for reason, verdict in reasons.items():  # once, as most rows have the same
        print(f"{verdict}: {reason}")
    if found["fits"]:
        print(f"surgery fits: {many(found['replaceable'], 'module')} can be replaced")
    else:
        print(f"surgery does not fit: {found['refusal']}")


# of `diagnose`'s table, which fits 80 columns
_COLUMNS = ("support", "residual", "update", "bounded", "negative", "separated", "margin")
_MOST_STEPS = 10


def run_diagnose(arguments: argparse.Namespace) -> None:
    """Draw with the model's own settings and write the statistics of its attention as JSON and as a plot."""
    from surgery.recipe.schema import sampling_with

    from .given import given_sampling

    given, out = given_sampling(arguments), Path(arguments.out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; name a folder")
    quiet_bars()
    from surgery.analysis.diagnostics import STATISTICS, diagnose, picture
    from surgery.artifact.manifest import replace_file, write_json
    from surgery.artifact.staging import unwritten
    from surgery.runtime.load import open_model
    from surgery.validate.report.pictures import new_figure

    new_figure(1, 1)  # the error that matplotlib is not installed comes before the work
    prompts = _prompts(arguments)
    pipeline, recorded, artifact_hash = open_model(
        arguments.model, arguments.revision, arguments.device, arguments.verify
    )
    found = diagnose(
        pipeline,
        prompts,
        sampling=sampling_with(recorded, given),
        seed=arguments.seed,
        layers=arguments.layers or "all",
        base=arguments.base,
        alpha=arguments.alpha,
        each_word=arguments.words,
    )
    files = {kind: out / f"diagnostics.{kind}" for kind in ("png", "json")}
    record = {"model": str(arguments.model), "artifact": artifact_hash, "prompt_set": arguments.prompts}
    record = {**found.to_json(), **record, "category": arguments.category}
    try:
        out.mkdir(parents=True, exist_ok=True)
        replace_file(files["png"], picture(found, f"{arguments.model}, {found.drawn}, {len(prompts)} prompts"))
        write_json(files["json"], record)
    except OSError as error:
        raise unwritten(f"to {out}", error, "make room and run it again") from error
    if arguments.json:
        print_json({**record, "files": files})
        return
    titles = [STATISTICS[name].title for name in _COLUMNS]
    blocks, steps = found.by_block(), found.by_step()
    table(f"{len(prompts)} prompts, {found.drawn}: means by block", ["block", *titles], _figures(blocks))
    chosen = {1 + place * (found.steps - 1) // max(1, _MOST_STEPS - 1) for place in range(_MOST_STEPS)}
    steps = {step: steps[step] for step in map(str, sorted(chosen)) if step in steps}
    table("means by denoising step", ["step", *titles], _figures(steps))
    print(f"what each is, every module and step: {relative(files['json'].absolute())}")
    print(f"plot: {relative(files['png'].absolute())}")


def _prompts(arguments):
    """The texts of a prompt set, or of one category of it."""
    from surgery.validate.prompts import open_prompts

    whole = open_prompts(arguments.prompts)
    prompts = tuple(one for one in whole.prompts if arguments.category in (None, one.category))
    if not prompts:
        known = ", ".join(sorted({one.category for one in whole.prompts if one.category}))
        raise InputError(f"{arguments.prompts} has no category {arguments.category!r}; it has {known or 'none'}")
    if arguments.limit < 1:
        raise InputError(f"--limit must be at least 1, not {arguments.limit}")
    return [prompt.text for prompt in replace(whole, prompts=prompts).spread(arguments.limit).prompts]


def _figures(groups):
    return [
        [group, *("-" if figures.get(name) is None else f"{figures[name]:.3g}" for name in _COLUMNS)]
        for group, figures in groups.items()
    ]


def run_verify(arguments: argparse.Namespace) -> int:
    """Verify an artifact's folder or repository; exit status 0 only if all of it is as it should be."""
    from surgery.artifact.verify import verify

    report = verify(arguments.model, arguments.revision)
    if arguments.json:
        print_json(report.to_json())
    else:
        at = f" at {report.commit[:12]}" if report.commit else ""
        rows = [[check.what, check.subject, check.status, check.detail] for check in report.checks]
        table(f"{report.model}{at}, artifact {report.hash[:12]}", ["what", "subject", "status", "detail"], rows)
        alone = [check.subject for check in report.checks if check.what == "weights" and check.status == "note"]
        but = f", but for weights that there is no base to compare with: {', '.join(alone)}" if alone else ""
        print(f"verified{but}" if report.verified else "not verified")
    return 0 if report.verified else 1
