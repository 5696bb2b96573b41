"""`surgery inspect`: a model's attention modules."""

from surgery.console import operation_text
from surgery.models.inspecting import inspect_model

from .show import print_json, table


def run(arguments):
    """Print the attention modules of a model, and whether surgery fits it."""
    found = inspect_model(arguments.model, arguments.revision)
    if arguments.json:
        print_json(found)
        return
    print(f"{found['model']}: {found['pipeline_class']}, {found['component']} {found['model_class']}")
    rows = []
    for site in found["sites"]:
        patched = site.operation and operation_text(site.operation)
        verdict = patched or (found["refusal"] if site.kind == "cross" else None) or site.refusal or "can be replaced"
        rows.append([site.path, site.module_class, site.kind, site.block, site.heads, site.head_dim, verdict])
    columns = ["module", "class", "kind", "block", "heads", "head_dim", "surgery"]
    table(f"{len(rows)} attention modules", columns, rows)
    if found["fits"]:
        print(f"surgery fits: {found['replaceable']} cross-attention modules can be replaced")
    else:
        print(f"surgery does not fit: {found['refusal']}")
