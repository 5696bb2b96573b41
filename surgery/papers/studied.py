"""A blind study's page: the rows' images of the same prompts, each model's beside each other, and the key to them."""

from pathlib import Path

from .scored import rows_of
from .task import Drawn, Task

_PAGE, _KEY = Path("study.html"), Path("study-key.json")


def draw_study(task: Task) -> Drawn:
    """Write the page that raters vote on and its key; a key that is there is kept, for votes may be on their way."""
    from surgery.analysis.study import choose_exhibits, read_sources, write_study

    ((name, part),) = task.sets.items()
    result = rows_of(task, name, part, part.metrics)
    facts = {"prompts": len(result.jobs)}
    if not (task.folder / _KEY).exists():
        sources = read_sources([result.folder])
        exhibits = choose_exhibits(sources, len(result.jobs) * len(sources), task.table.seed)
        write_study(
            exhibits,
            task.folder / _PAGE,
            task.folder / _KEY,
            models={source.model: source.origin for source in sources},
            title="Which image is better?",
            seed=task.table.seed,
        )
        facts |= {"models": ", ".join(source.model for source in sources)}
    votes = f"surgery study {task.work} --out {task.folder / _PAGE} --votes votes-*.json"
    return Drawn(
        files={"page to vote on": _PAGE, "key, to be kept from those who vote": _KEY},
        notes=(f"when the votes have come: {votes}",),
        facts=facts,
    )
