"""The report of a validation: pairs.csv, two pictures, and report.html, which holds all of it in one file."""

import csv
import io
import os
from pathlib import Path

from surgery.artifact.manifest import replace_file
from surgery.errors import SurgeryError

from .page import validation_page
from .pictures import Row, difference_plot, pairs_sheet

__all__ = ["write_report"]

_SHOWN = 8  # pairs on a sheet


def write_report(folder, manifest, scores, jobs, prompts, images, measured):
    """Write pairs.csv, differences.png, wins.png, losses.png and report.html into `folder`; the page's path.

    jobs, prompts, images: what was scored, images as draw_sides gives them. measured: (Info, Metric, values per Job)
    of each metric. SurgeryError where a file cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_pairs(folder / "pairs.csv", jobs, prompts, images, measured, folder)
        pictures = {"differences.png": difference_plot(scores)}
        ranked_by, ranked = _ranked(jobs, scores, measured)
        for name, rows in ranked.items():
            shown = [_row(jobs[at], images, text) for at, text in rows]
            pictures[f"{name}.png"] = pairs_sheet(shown) if shown else None
        for name, data in pictures.items():
            if data is None:
                (folder / name).unlink(missing_ok=True)
            else:
                replace_file(folder / name, data)
        page = validation_page(manifest, scores, {name: data for name, data in pictures.items() if data}, ranked_by)
        replace_file(folder / "report.html", page.encode("utf-8"))
    except OSError as error:
        raise SurgeryError(f"cannot write the report in {folder}: {error.strerror or error}; run it again") from error
    return folder / "report.html"


def _ranked(jobs, scores, measured):
    """(title of the purpose's first metric, {"wins": [(place among the Jobs, its values in words)], "losses": ...})."""
    scored = [(info, metric, values) for info, metric, values in measured if info.kind == "score"]
    scored.sort(key=lambda entry: entry[1].name not in scores.purpose)
    if not scored:
        return None, {"wins": [], "losses": []}
    info, metric, (base, patched) = scored[0]
    gain = (patched - base) * (1 if info.higher_is_better else -1)
    order = sorted(range(len(jobs)), key=lambda at: (-gain[at], jobs[at].key))
    wins, losses = [at for at in order if gain[at] > 0], [at for at in reversed(order) if gain[at] < 0]

    def told(places):
        return [(at, f"{metric.title} {base[at]:.4g}, patched {patched[at]:.4g}") for at in places[:_SHOWN]]

    return metric.title, {"wins": told(wins), "losses": told(losses)}


def _row(job, images, text):
    return Row(job.prompt, f"seed {job.seed}: {text}", images["base"][job.key], images["patched"][job.key])


def _write_pairs(path, jobs, prompts, images, measured, folder):
    columns = []
    for _, metric, values in measured:
        if metric.kind == "score":
            columns += [(f"{metric.name} base", values[0]), (f"{metric.name} patched", values[1])]
        elif metric.kind == "fidelity":
            columns.append((metric.name, values))
    with io.StringIO(newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "category", "seed", "base", "patched", *(name for name, _ in columns)])
        for at, job in enumerate(jobs):
            files = [os.path.relpath(images[side][job.key], folder) for side in ("base", "patched")]
            category = prompts[job.index].category
            writer.writerow([job.prompt, category, job.seed, *files, *(f"{values[at]:.9g}" for _, values in columns)])
        replace_file(path, file.getvalue().encode("utf-8"))
