"""The verb `surgery reproduce`: the papers' tables and figures, listed, planned, drawn."""

import argparse

from surgery.console import quiet_bars
from surgery.errors import InputError

from .given import checkpoints_of, fields_of
from .score import announce
from .show import print_json, relative, table


def run_reproduce(arguments: argparse.Namespace) -> None:
    """List the tables, plan one, or draw it; a run that was cut short goes on where it stopped."""
    from surgery.papers.manifest import read_table

    if arguments.table is None:
        _list(arguments)
        return
    read_table(arguments.table)  # so that a name that is none is told before anything is imported
    if arguments.plan:
        _plan(arguments)
        return
    quiet_bars()
    from surgery.papers.reproducing import Given, reproduce
    from surgery.validate.jobs import Drawing

    done = reproduce(
        arguments.table,
        Given(
            on=arguments.on,
            limit=arguments.limit,
            out=arguments.out,
            reference=arguments.reference,
            prompts=arguments.prompts,
            images=arguments.images,
            drawing=fields_of(Drawing, arguments),
            checkpoints=checkpoints_of(arguments.checkpoints),
            announce=None if arguments.json else announce,
        ),
    )
    if arguments.json:
        print_json(done.to_json())
        return
    from surgery.papers.page import cell_text, heading

    columns, rows = heading(done), [[row.name, *cell_text(done, row)] for row in done.rows]
    if any(row.cells for row in done.rows):
        table(f"{done.table.title} ({done.name})", ["row", *columns], rows)
    for note in done.notes:
        print(f"note: {note}")
    for what, path in done.files.items():
        print(f"{what}: {relative(path.absolute())}")


def _list(arguments):
    """Every table with its cost."""
    from surgery.papers.costs import cost_of
    from surgery.papers.manifest import PAPERS, read_table, table_names

    found = []
    for name in table_names():
        given = read_table(name)
        cost = None if given.cannot else cost_of(given)
        images = "-" if cost is None else "by --prompts" if given.kind == "video" else f"{cost.images:,}"
        hours = cost.hours_text if cost else "cannot be drawn"
        found.append((name, given, images, hours))
    if arguments.json:
        entries = [
            {"name": name, "paper": PAPERS[given.paper], "place": given.place, "title": given.title}
            | {"kind": given.kind, "images": images, "gpu_hours": hours, "cannot": given.cannot}
            for name, given, images, hours in found
        ]
        print_json({"schema_version": 1, "tables": entries})
        return
    rows = [[name, given.title, given.kind, images, hours] for name, given, images, hours in found]
    table("surgery reproduce TABLE", ["table", "what it shows", "kind", "images", "GPU hours"], rows)
    print(_rate_text())


def _rate_text():
    from surgery.papers.manifest import rates

    measured = rates()
    models = ", ".join(sorted({rate["pipeline"] for rate in measured["steps"]}))
    return (
        f"GPU hours: of the denoiser alone, at the step measured of {models} on an {measured['device']} "
        f"({measured['source']}). --limit N draws N prompts of each set, --on shapes the model that ships."
    )


def _plan(arguments):
    """What drawing a table takes; nothing is fetched."""
    from surgery.papers.costs import cost_of, count_of, fetched_for
    from surgery.papers.entries import entries_of, sets_of
    from surgery.papers.manifest import PAPERS, read_table

    given, on = read_table(arguments.table), arguments.on
    if given.cannot and on is None:
        raise InputError(f"{arguments.table} cannot be drawn: {given.cannot}; --on shapes draws its rows in small")
    entries, sets = entries_of(given, on), sets_of(given, on)
    cost, fetched = cost_of(given, on, arguments.limit), fetched_for(entries, sets)
    if arguments.json:
        print_json(
            {
                "schema_version": 1,
                "table": arguments.table,
                "paper": PAPERS[given.paper],
                "place": given.place,
                "kind": given.kind,
                "on": on,
                "rows": [
                    {"name": e.name, "recipe": e.recipe, "overrides": e.overrides, "patched": e.patched}
                    | {"reported": e.reported}
                    for e in entries
                ],
                "sets": {name: part.model_dump() for name, part in sets.items()},
                "fetched": fetched,
                "images": cost.images,
                "gpu_hours": cost.hours_text,
                "notes": given.notes,
            }
        )
        return
    print(f"{arguments.table}: {given.title}. {PAPERS[given.paper]}, {given.place}")
    rows = [[e.name, e.recipe, "patched" if e.patched else "base", "\n".join(e.overrides)] for e in entries]
    table("rows", ["row", "recipe", "side", "--set"], rows)
    if sets:
        shown = [
            [name, count_of(part, name, arguments.limit), part.images_per_prompt, ", ".join(part.metrics)]
            for name, part in sets.items()
        ]
        table("prompts", ["set", "images a side", "of each prompt", "metrics"], shown)
    if fetched:
        table(
            "fetched, unless in the cache",
            ["repository", "revision", "what"],
            [[part.repo, (part.revision or "newest")[:12], part.what] for part in fetched],
        )
    print(f"{cost.images:,} images; GPU hours: {cost.hours_text}")
    for note in given.notes:
        print(f"note: {note}")
