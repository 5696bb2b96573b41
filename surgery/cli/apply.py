"""`surgery apply` and `surgery push`: carry out a recipe, say what was done, publish it on the Hub."""

import argparse
import sys
from dataclasses import asdict, fields
from pathlib import Path

from surgery.console import operation_text
from surgery.errors import InputError
from surgery.export.publish import Options, Pushed, check_before_applying, prepare, publish
from surgery.recipe.plan import make_plan, needs_weights

from .export import build_recipes, wanted_by
from .given import fields_of
from .score import announce, show_scores
from .show import print_json, relative, size, table, warn

_SHOWN = {"copy": "copied on the Hub", "send": "sent", "keep": "there already", "delete": "removed"}


def run_apply(arguments: argparse.Namespace) -> None:
    """Write the artifact of a recipe; with --push, publish it."""
    options = _publishing_options(arguments)
    planned = make_plan(arguments.recipe, arguments.overrides)
    warn(planned.plan.warnings)
    if arguments.remote and (reason := needs_weights(planned)):
        raise InputError(f"--remote is not for this recipe: {reason}")
    checked = check_before_applying(planned, options) if options else None
    from surgery.applying import carry_out, default_folder, same_artifact  # of torch: what cannot be is refused before

    out = Path(arguments.out) if arguments.out else default_folder(planned)
    scores = bool(planned.recipe_file.recipe.validation) and not arguments.no_validate and not arguments.remote
    if arguments.remote and planned.recipe_file.recipe.validation:
        print("surgery: not validated, since --remote fetches no weights to draw with", file=sys.stderr)
    settings = None
    if scores:
        from surgery.validate.session import check_recipe

        settings = check_recipe(planned)
    wanted = [] if arguments.no_export or arguments.remote else wanted_by(planned.recipe_file.recipe)
    # A run that was cut short while scoring or publishing goes on from what it wrote.
    goes_on = (options or scores or wanted) and not arguments.force
    found = same_artifact(planned, out, arguments.remote) if goes_on else None
    artifact = None if found else carry_out(planned, out, force=arguments.force, thin=arguments.remote)
    if not arguments.json:
        if found:
            print(f"{relative(out.absolute())} holds the artifact of this recipe already: {found.hash}")
        else:
            _show(artifact)
    scored = _validate(arguments, out, settings) if scores else None
    engines, left_out = build_recipes(out, wanted, arguments.json) if wanted else ([], [])
    record = {"folder": out.absolute(), "seconds": artifact.seconds if artifact else None}
    manifest = artifact.manifest if artifact else found
    assert manifest is not None
    record |= manifest.model_dump(mode="json")
    record["artifact_hash"] = record.pop("hash")  # there are a plan's and a recipe's too
    record |= {"engines": engines, "engines_left_out": left_out}
    if scored:
        record["scores"] = scored.scores.model_dump(mode="json")
    if not arguments.json:
        if scored:
            show_scores(scored)
        for reason in left_out:
            print(f"not built here: {reason}")
        print(f"artifact: {relative(out.absolute())}")
    elif not options:
        print_json(record)
    if options:
        _publish(out, options, arguments.dry_run, arguments.json, {"artifact": record}, checked)


def _validate(arguments, out, settings):
    """The Validation that the recipe asks for."""
    from surgery.validate.validating import validate

    said = None if arguments.json else announce
    return validate(out, settings=settings, announce=said)


def _publishing_options(arguments):
    if arguments.push:
        return fields_of(Options, arguments, repo=arguments.push)
    usual = {"remote": False, **{field.name: field.default for field in fields(Options)}, "dry_run": False}
    for name, value in usual.items():
        if getattr(arguments, name, value) != value:
            raise InputError(f"--{name.replace('_', '-')} goes with --push OWNER/NAME")
    return None


def _show(artifact):
    manifest = artifact.manifest
    replaced = len({path for operation in manifest.operations for path in operation.layers})
    rows = [["base", f"{manifest.base['pipeline']} {(manifest.base['revision'] or '')[:12]}".strip()]]
    for operation in manifest.operations:
        rows.append(["operation", f"{len(operation.layers)} modules with {operation_text(operation.model_dump())}"])
    thin = f"{size(sum(f.size for f in manifest.files.values() if f.weights))} named, none fetched"
    at_hand = f"{size(artifact.linked_bytes)} linked, {size(artifact.copied_bytes)} copied or rewritten"
    rows += [
        ["replaced", f"{replaced} of {replaced + len(manifest.skipped)} attention modules"],
        ["weights", thin if manifest.weights == "thin" else at_hand],
        *(
            row
            for own in manifest.patched.values()
            for row in (
                ["buffers", f"{own.buffers}, {size(manifest.files[own.buffers].size)}"],
                ["code", own.code],
            )
        ),
        ["artifact hash", manifest.hash],
        ["time", f"{artifact.seconds['total']} s, of which {artifact.seconds['hashing']} s hashing"],
    ]
    table(manifest.name, None, rows)


def run_push(arguments: argparse.Namespace) -> None:
    """Publish the artifact of a folder, after showing what will move."""
    _publish(arguments.folder, fields_of(Options, arguments), arguments.dry_run, arguments.json)


def _publish(folder, options, dry_run, as_json, extra=None, checked=None):
    """Push a folder and print what was done; extra: further keys of the JSON; checked: as `prepare` takes it."""
    publication = prepare(folder, options, checked)
    done = publish(publication, dry_run=dry_run, announce=None if as_json else _show_push)
    if as_json:
        print_json({"schema_version": 1, **(extra or {}), **_as_data(done)})
        return
    if not isinstance(done, Pushed):
        print("dry run: nothing was sent")
        return
    tag = f", tag {done.tag}" if done.tag else ""
    if done.pull_request:
        print(f"{'proposed' if done.made else 'proposed already'}: {done.pull_request}")
    else:
        assert done.commit is not None
        print(
            f"{'published' if done.made else 'nothing to do, it is all there'}: {done.url} at {done.commit[:12]}{tag}"
        )
    if done.space:
        print(f"Space {'published' if done.space.made else 'there already'}: {done.space.url}")


def _as_data(done):
    """A Pushed or a PushPlan as plain data."""
    if not isinstance(done, Pushed):
        return {"dry_run": True, "plan": done.to_json()}
    named = ("repo", "url", "commit", "made", "pull_request", "tag")
    space = {"space": asdict(done.space)} if done.space else {}
    return {"dry_run": False, **{name: getattr(done, name) for name in named}, **space, "plan": done.plan.to_json()}


def _short(source):
    """OWNER/NAME@0123456789ab of a copy's source: its path is mostly that of the file."""
    name, _, rest = source.partition("@")
    return f"{name}@{rest[:12]}" if source else ""


def _show_push(plan):
    """The plan's table on standard output: what moves, how much, and why."""
    totals = plan.totals
    where = f"{plan.repo}, branch {plan.branch}" + (" (a pull request)" if plan.create_pr else "")
    at = f"on top of {plan.head[:12]}" if plan.head else "a new repository"
    rows = [
        ["to", f"{where}, {'private' if plan.private else 'public'}, {at}"],
        ["artifact", plan.hash],
        ["licence", plan.license],
        [
            "weights",
            "thin: named by commit and sha256, not published" if plan.weights == "thin" else "in the repository",
        ],
        ["to send", size(totals["sent_bytes"])],
        ["copied on the Hub", size(totals["copied_bytes"])],
        ["there already", size(totals["kept_bytes"])],
    ]
    table(f"push {plan.hash[:12]}", None, rows)
    steps = [step for step in plan.steps if step.action != "keep"]
    rows = [[step.path, size(step.size), _SHOWN[step.action], _short(step.source) or step.why] for step in steps]
    if rows:
        table("one commit", ["file", "size", "how", "from, or why it has to be sent"], rows)
    if plan.space:
        rows = [[step.path, size(step.size), _SHOWN[step.action], ""] for step in plan.space.changes]
        where = f"Space {plan.space.repo}, {'private' if plan.space.private else 'public'}"
        table(f"{where}: {'one commit' if rows else 'nothing to do'}", ["file", "size", "how", ""], rows)
    for note in (*plan.notes, *(plan.space.notes if plan.space else ())):
        print(f"note: {note}")
