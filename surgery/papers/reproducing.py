"""Draw a table or figure: checked before anything is drawn, resumable, written as Markdown, JSON and HTML."""

from collections.abc import Callable, Sequence
from pathlib import Path

from surgery.artifact.manifest import replace_file, write_json
from surgery.errors import InputError, SurgeryError
from surgery.machine import best_device
from surgery.recipe.plan import make_plan
from surgery.validate.session import hardware

from .costs import cost_of
from .entries import Entry, entries_of, sets_of
from .filmed import draw_videos
from .manifest import read_table
from .observed import draw_attention_maps, draw_diagnostics, draw_inversion
from .page import html, markdown
from .results import Reproduction, compared_rows, result_rows
from .scored import draw_images, draw_scores
from .studied import draw_study
from .task import Drawn, Given, Task
from .timed import draw_times

_KINDS: dict[str, Callable[[Task], Drawn]] = {
    "scores": draw_scores,
    "images": draw_images,
    "time": draw_times,
    "study": draw_study,
    "video": draw_videos,
    "inversion": draw_inversion,
    "diagnostics": draw_diagnostics,
    "attention-maps": draw_attention_maps,
}


def reproduce(name: str, given: Given | None = None) -> Reproduction:
    """The Reproduction of a table's name, also written as result.md, result.json and result.html.

    Every table keeps its results in a folder of its own below `given.out`, and its images in one that all share, so
    that a side that two tables have is drawn once and a run that was cut short goes on.
    Raises InputError for a name that is no table and options out of range, SurgeryError, which names every repository
    that cannot be had and what to do about it, before anything is drawn.
    """
    given = given or Given()
    table, on = read_table(name), given.on
    if given.limit is not None and given.limit < 1:
        raise InputError(f"--limit must be at least 1, not {given.limit}")
    entries, sets = entries_of(table, on), sets_of(table, on)
    check_models(entries)
    work = Path(given.out or "out/papers")
    folder = work / (f"{name}-on-{on}" if on else name)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = _KINDS[table.kind](Task(table, entries, sets, given, folder, work))
    reported = {entry.name: entry.reported for entry in entries}
    device = given.drawing.device or best_device()
    done = Reproduction(
        name=name,
        table=table,
        on=on,
        cost=cost_of(table, on, given.limit),
        rows=result_rows(compared_rows(table, entries), reported, drawn.measured, comparable=on is None),
        notes=(*(f"of the paper's own table: {note}" if on else note for note in table.notes), *drawn.notes),
        files=drawn.files,
        facts={"hardware": hardware(device), **drawn.facts},
        folder=folder,
    )
    write_json(folder / "result.json", done.to_json())
    replace_file(folder / "result.md", markdown(done).encode("utf-8"))
    replace_file(folder / "result.html", html(done).encode("utf-8"))
    return done


def check_models(entries: Sequence[Entry]) -> None:
    """Raise SurgeryError or InputError for every model that cannot be had, or whose recipe does not fit it, at once."""
    problems: dict[str, SurgeryError] = {}
    for entry in {(e.recipe, e.overrides if e.patched else _of_base(e)): e for e in entries}.values():
        base = entry.recipe_file.recipe.base.name
        if base in problems:
            continue
        try:
            make_plan(entry.recipe, entry.overrides)
        except SurgeryError as error:
            problems[base] = error
    if problems:
        kind = InputError if all(isinstance(error, InputError) for error in problems.values()) else SurgeryError
        texts = [f"{base} ({error})" for base, error in problems.items()]
        raise kind("nothing was drawn, because of " + "\n  ".join(["these models:", *texts]))


def _of_base(entry: Entry) -> tuple[str, ...]:
    """The overrides on which an untouched base depends."""
    return tuple(override for override in entry.overrides if not override.startswith("operations."))
