"""Videos of every row, as the folders that other projects' tools score: VBench, and what measures FVD."""

import re
from pathlib import Path

from surgery.artifact.manifest import replace_file
from surgery.errors import InputError
from surgery.runtime.video import require_mp4
from surgery.validate.prompts import NAMES
from surgery.validate.report.rows import row_sheets
from surgery.validate.video_folders import write_video_folders

from .scored import rows_of
from .task import Drawn, Task


def draw_videos(task: Task) -> Drawn:
    """Draw every row; its videos go into a folder of its own. The images of the shapes model are shown instead."""
    ((name, part),) = task.sets.items()
    if name not in NAMES and not task.given.prompts:
        raise InputError(
            f"{task.table.place} is drawn from the prompts of {name}, which do not ship: give them as --prompts FILE"
        )
    if not task.given.on:
        require_mp4()
    result = rows_of(task, name, part, part.metrics)
    if task.given.on:
        files = {}
        for title, data in row_sheets([result.rows], result).items():
            files[title] = Path(f"{title.replace(' ', '-')}.png")
            replace_file(task.folder / files[title], data)
        return Drawn(files=files, notes=("the shapes model draws images, not videos: there is no folder to score",))
    sides = {re.sub(r"[^A-Za-z0-9.-]+", "-", row.name): row.images for row in result.rows}
    write_video_folders([job.prompt.text for job in result.jobs], sides, task.folder / "videos")
    return Drawn(
        files={f"videos of {row.name}": Path("videos") / side for side, row in zip(sides, result.rows, strict=True)},
        facts={"videos of a row": len(result.jobs)},
    )
