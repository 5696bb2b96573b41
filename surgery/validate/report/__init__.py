"""The report of a validation: pairs.csv, two pictures, and report.html, which holds all of it in one file."""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

from surgery.artifact import Manifest
from surgery.artifact.manifest import replace_file
from surgery.artifact.scores import Scores
from surgery.errors import SurgeryError
from surgery.recipe.guidance_scale import is_range, scale_of

from ..scoring import MetricResult
from .page import validation_page
from .pictures import LabelledPair, difference_plot, pairs_sheet

__all__ = ["write_report"]

_SHOWN = 8  # pairs on a sheet


def write_report(folder: Path | str, manifest: Manifest, scores: Scores, results: Sequence[MetricResult]) -> Path:
    """Write pairs.csv, differences.png, wins.png, losses.png and report.html into `folder`; the page's path.

    results: of every metric, over the same pairs. SurgeryError where a file cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_pairs(folder / "pairs.csv", results, folder)
        pictures = {"differences.png": difference_plot(scores)}
        ranked_by, ranked = _ranked(scores, results)
        for name, shown in ranked.items():
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


def _ranked(scores, results):
    """(title of the purpose's first metric, {"wins" and "losses": LabelledPairs, the largest first})."""
    scored = [result for result in results if result.metric.kind == "score"]
    if not scored:
        return None, {"wins": [], "losses": []}
    result = min(scored, key=lambda each: each.metric.name not in scores.purpose)
    metric, pairs = result.metric, result.images.pairs
    gain = (result.patched - result.base) * (1 if metric.higher_is_better else -1)
    order = sorted(range(len(pairs)), key=lambda at: (-gain[at], pairs[at].job.key))
    wins, losses = [at for at in order if gain[at] > 0], [at for at in reversed(order) if gain[at] < 0]

    def told(at):
        values = f"{metric.title} {result.base[at]:.4g}, patched {result.patched[at]:.4g}"
        return LabelledPair(pairs[at], f"seed {pairs[at].job.seed}: {values}")

    return metric.title, {
        name: [told(at) for at in some[:_SHOWN]] for name, some in (("wins", wins), ("losses", losses))
    }


def _write_pairs(path, results, folder):
    columns = []
    sampling = results[0].images.base.identity["sampling"]
    scales = is_range(sampling)
    for result in results:
        name = result.metric.name
        if result.metric.kind == "score":
            columns += [(f"{name} base", result.base), (f"{name} patched", result.patched)]
        elif result.metric.kind == "fidelity":
            columns.append((name, result.patched))
    with io.StringIO(newline="") as file:
        writer = csv.writer(file)
        known = ["seed", "guidance_scale"] if scales else ["seed"]
        writer.writerow(["prompt", "category", *known, "base", "patched", *(name for name, _ in columns)])
        for at, pair in enumerate(results[0].images.pairs):
            prompt = pair.job.prompt
            files = [os.path.relpath(image, folder) for image in (pair.base, pair.patched)]
            values = [f"{values[at]:.9g}" for _, values in columns]
            known = [pair.job.seed, *([scale_of(sampling, pair.job.seed)] if scales else [])]
            writer.writerow([prompt.text, prompt.category, *known, *files, *values])
        replace_file(path, file.getvalue().encode("utf-8"))
