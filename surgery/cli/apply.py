"""`surgery apply`: carry out a recipe, say what was done, and publish it where that is asked for."""

import sys
from pathlib import Path

from surgery.applying import carry_out, default_folder, same_artifact
from surgery.console import operation_text
from surgery.errors import InputError
from surgery.recipe.plan import make_plan, needs_weights

from .export import build_recipes, wanted_by
from .show import print_json, relative, size, table
from .validate import announce
from .validate import show as show_scores


def run(arguments):
    """Write the artifact of a recipe; with --push, publish it."""
    options = _publishing_options(arguments)
    planned = make_plan(arguments.recipe, arguments.overrides)
    if arguments.remote and (reason := needs_weights(planned)):
        raise InputError(f"--remote is not for this recipe: {reason}")
    checked = None
    if options:
        from surgery.export.publish import check_before_applying

        checked = check_before_applying(planned, options)
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
    record |= (artifact.manifest if artifact else found).model_dump(mode="json")
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
        from .push import publish

        publish(out, options, arguments.dry_run, arguments.json, {"artifact": record}, checked)


def _validate(arguments, out, settings):
    """The Validation that the recipe asks for."""
    from surgery.validate.validating import validate

    said = None if arguments.json else announce
    return validate(out, settings=settings, announce=said)


def _publishing_options(arguments):
    if arguments.push:
        from .push import options_of

        return options_of(arguments, arguments.push)
    switches = ("remote", "private", "create_pr", "revision", "tag", "overwrite", "allow_regression", "dry_run")
    given = [name for name in switches if getattr(arguments, name)] + (
        ["weights"] if arguments.weights != "copy" else []
    )
    if given:
        raise InputError(f"--{given[0].replace('_', '-')} goes with --push OWNER/NAME")
    return None


def _show(artifact):
    manifest = artifact.manifest
    replaced = sum(len(operation.layers) for operation in manifest.operations)
    rows = [["base", f"{manifest.base['pipeline']} {(manifest.base['revision'] or '')[:12]}".strip()]]
    for operation in manifest.operations:
        rows.append(["operation", f"{len(operation.layers)} modules with {operation_text(operation.model_dump())}"])
    thin = f"{size(sum(f.size for f in manifest.files.values() if f.weights))} named, none fetched"
    at_hand = f"{size(artifact.linked_bytes)} linked, {size(artifact.copied_bytes)} copied or rewritten"
    rows += [
        ["replaced", f"{replaced} of {replaced + len(manifest.skipped)} attention modules"],
        ["weights", thin if manifest.weights == "thin" else at_hand],
        ["buffers", f"{manifest.buffers}, {size(manifest.files[manifest.buffers].size)}"],
        ["code", manifest.code],
        ["artifact hash", manifest.hash],
        ["time", f"{artifact.seconds['total']} s, of which {artifact.seconds['hashing']} s hashing"],
    ]
    table(manifest.name, None, rows)
