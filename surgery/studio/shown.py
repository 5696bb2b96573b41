"""What the page shows of what was drawn: images large enough to see, progress, scores, one word's maps."""

import hashlib
import html
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.artifact.scores import Scores
from surgery.errors import InputError
from surgery.runtime.video import Video, video_file

from .session import Told

if TYPE_CHECKING:
    from PIL.Image import Image

    from surgery.analysis.attention_maps import Comparison

_SMALLEST = 256  # pixels that an image is enlarged to, without smoothing


def pictures(drawn: Mapping[int, Any], folder: Path) -> "list[tuple[Image | str, str]]":
    """[(what a gallery shows, its caption)] of {seed: PIL image or Video}; videos as files in a folder."""
    return [(_visible(one, folder), f"seed {seed}") for seed, one in sorted(drawn.items())]


def enlarged(image: "Image") -> "Image":
    """A small image by a whole factor, its pixels as they are."""
    from PIL import Image

    zoom = -(-_SMALLEST // min(image.size))
    plain = image.convert("RGB")
    return plain.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST) if zoom > 1 else plain


def _visible(one, folder):
    if not isinstance(one, Video):
        return enlarged(one)
    data = video_file(one, "webp")
    path = folder / f"{hashlib.sha256(data).hexdigest()[:16]}.webp"
    path.write_bytes(data)
    return str(path)


def status(told: Told) -> str:
    """HTML of a bar and a line on what is being drawn."""
    if told.done:
        return note(told.note or "done")
    bar = f'<progress max="{max(1, told.steps)}" value="{told.step}"></progress>'
    return f'<div class="told">{bar} {html.escape(told.text)}</div>'


def note(text: str) -> str:
    """HTML of a line."""
    return f'<div class="told">{html.escape(text)}</div>'


def problem(error: BaseException | str) -> str:
    """HTML of what was wrong, as the command line would say it."""
    return f'<div class="told problem" role="alert">{html.escape(str(error))}</div>'


def word_sheet(comparison: "Comparison", word: str) -> "Image":
    """The maps of one word of a Comparison beside each other; InputError for one that has none."""
    from surgery.analysis.attention_maps import sheet

    places = [at for at, column in enumerate(comparison.columns) if column.label == word]
    if not places:
        if word in comparison.cut_off:
            raise InputError(f"{word!r} lies beyond the tokens that the text encoder reads; it is cut off")
        labels = ", ".join(column.label for column in comparison.columns)
        raise InputError(f"the prompt has no word {word!r}; It has: {labels or 'none'}")
    columns = tuple(comparison.columns[at] for at in places)
    rows = tuple(replace(row, maps=row.maps[places]) for row in comparison.rows)
    return sheet(replace(comparison, columns=columns, rows=rows))


def words_in(prompt: object) -> list[str]:
    """The words of a prompt by which their maps are asked for."""
    from surgery.analysis.attention_maps.words import labelled_words

    return [word for word, _ in labelled_words(prompt)] if isinstance(prompt, str) else []


def score_rows(scores: Scores) -> list[list[str]]:
    """A row for each metric: name, base, patched, difference, interval, verdict."""
    rows = []
    for metric in scores.metrics:
        low, high = metric.interval
        difference = "" if metric.difference is None else f"{metric.difference:+.4g}"
        base = "" if metric.base is None else f"{metric.base:.4g}"
        sides = [metric.title or metric.name, base, f"{metric.patched:.4g}", difference]
        rows.append([*sides, f"{low:.4g} to {high:.4g}", metric.verdict])
    return rows
