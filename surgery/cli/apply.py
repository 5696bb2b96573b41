"""`surgery apply`: carry out a recipe and say what was done."""

from surgery.applying import carry_out
from surgery.plan import make_plan
from surgery.wording import operation_text

from .show import print_json, relative, size, table


def run(arguments):
    """Write the artifact of a recipe."""
    planned = make_plan(arguments.recipe, arguments.overrides)
    artifact = carry_out(planned, arguments.out, force=arguments.force)
    manifest = artifact.manifest
    later = [
        key
        for key, value in (
            ("validate", planned.recipe_file.recipe.validation),
            ("export", planned.recipe_file.recipe.export),
        )
        if value
    ]
    if arguments.json:
        print_json(
            {"folder": artifact.folder, "seconds": artifact.seconds, "recorded_only": later, **manifest.model_dump()}
        )
        return
    replaced = sum(len(operation.layers) for operation in manifest.operations)
    rows = [["base", f"{manifest.base['pipeline']} {(manifest.base['revision'] or '')[:12]}".strip()]]
    for operation in manifest.operations:
        rows.append(["operation", f"{len(operation.layers)} modules with {operation_text(operation.model_dump())}"])
    rows += [
        ["replaced", f"{replaced} of {replaced + len(manifest.skipped)} attention modules"],
        ["weights", f"{size(artifact.linked_bytes)} linked, {size(artifact.copied_bytes)} copied or rewritten"],
        ["buffers", f"{manifest.buffers}, {size(manifest.files[manifest.buffers].size)}"],
        ["code", manifest.code],
        ["artifact hash", manifest.hash],
        ["time", f"{artifact.seconds['total']} s, of which {artifact.seconds['hashing']} s hashing"],
    ]
    table(manifest.name, None, rows)
    if later:
        print(f"recorded in recipe.yaml, not carried out by this version: {', '.join(later)}")
    print(f"artifact: {relative(artifact.folder)}")
