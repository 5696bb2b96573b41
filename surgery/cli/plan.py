"""`surgery plan`: the plan as tables or JSON."""

from surgery.console import guidance_text, schedule_text, settings_text
from surgery.recipe.plan import make_plan

from .show import print_json, size, table


def run(arguments):
    """Print what `apply` would do."""
    plan = make_plan(arguments.recipe, arguments.overrides).plan
    if arguments.json:
        print_json(plan.to_json())
        return
    show_plan(plan)


def show_plan(plan):
    """The plan's tables on standard output."""
    base, totals = plan.base, plan.totals
    at = f" at {base['revision'][:12]}" if base["revision"] else ""
    print(f"{plan.name}: {base['pipeline']}{at} ({base['pipeline_class']}, {plan.component} {plan.model_class})")
    rows = []
    for index, operation in enumerate(plan.operations):
        schedule = schedule_text(operation["schedule"]) if "schedule" in operation else "none"
        rows.append([index, operation["operator"], settings_text(operation), schedule, len(operation["layers"])])
    table("operations", ["operation", "operator", "settings", "schedule", "modules"], rows)
    sites = {site.path: site for site in plan.sites}
    rows = [
        [path, sites[path].kind, sites[path].block, sites[path].heads, sites[path].head_dim, index]
        for index, operation in enumerate(plan.operations)
        for path in operation["layers"]
    ]
    columns = ["module", "kind", "block", "heads", "head_dim", "operation"]
    table(f"replaced: {totals['replaced']} of {totals['attention_modules']} attention modules", columns, rows)
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
    print(f"sampling: {plan.evaluations} evaluations of the {plan.component} a step for each image{guidance}")
    rewritten = f", of which {size(totals['rewritten_bytes'])} are rewritten" if totals["rewritten_bytes"] else ""
    print(f"weights: {size(totals['weight_bytes'])}{rewritten}\nplan hash: {plan.hash}")


def _origin(origin):
    if origin.kind == "surgery":
        return "this plan"
    whole = origin.path is None or origin.source.endswith(origin.path)
    source = origin.source if whole else f"{origin.source}/{origin.path}".replace("./", "", 1)
    at = f"@{origin.revision[:12]}" if origin.revision else ""
    loras = "".join(f" + {lora['scale']:g} x {lora['source']}/{lora['path']}" for lora in origin.loras)
    verb = {"base": "", "component": "", "converted": ", converted to safetensors", "fused": ", LoRA fused"}[
        origin.kind
    ]
    return f"{source}{at}{loras}{verb}"
