"""The pages of the reports, by the templates beside this file: each one file that loads nothing.

Whatever a recipe, a prompt file or a model says is escaped where it is put in.
"""

import base64
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.artifact import Manifest
from surgery.artifact.scores import PromptsRecord, ReferenceRecord, Scores
from surgery.console import sampling_text

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: str, title: str, pictures: Mapping[str, bytes], facts: Sequence, **values: Any) -> str:
    """A page by the name of its template. pictures: {title: PNG}; facts: (name, value) of how it was measured."""
    shown = [{"title": name, "base64": base64.b64encode(data).decode()} for name, data in pictures.items()]
    page = _environment().get_template(f"{template}.html")
    return page.render(title=title, pictures=shown, facts=facts, **values)


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = FileSystemLoader(Path(__file__).parent / "templates")
    made = Environment(loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters |= {"figure": _figure, "signed": _signed, "span": _span, "percent": _percent}
    return made


def _figure(value):
    return "" if value is None else f"{value:.4g}"


def _signed(value):
    return "" if value is None else f"{value:+.4g}"


def _span(interval, signed):
    low, high = interval
    return f"{low:+.4g} to {high:+.4g}" if signed else f"{low:.4g} to {high:.4g}"


def _percent(share):
    return "" if share is None else f"{100 * share:.1f}%"


def validation_page(manifest: Manifest, scores: Scores, pictures: Mapping[str, bytes], ranked_by: str | None) -> str:
    """The page of a validation. pictures: {file name: PNG}; ranked_by: the metric behind wins and losses, or None."""
    titles = {
        "differences.png": "Differences",
        "wins.png": f"Largest wins by {ranked_by}",
        "losses.png": f"Largest losses by {ranked_by}",
    }
    return render(
        "validation",
        f"{manifest.name}, {manifest.hash[:12]}",
        {title: pictures[name] for name, title in titles.items() if name in pictures},
        list(_facts(scores)),
        summary=manifest.summary,
        worse=[metric.title or metric.name for metric in scores.regressions(scores.purpose)],
        metrics=scores.metrics,
    )


def _facts(scores):
    yield from shared_facts(scores.model_dump())
    yield "sampling", sampling_text(scores.sampling)
    yield "artifact", scores.artifact_hash
    for metric in scores.metrics:
        yield metric.title or metric.name, "; ".join(filter(None, [metric.source, metric.checkpoint]))


def shared_facts(facts: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, value) of how images were made and measured, of the fields of Scores as plain data."""
    for prompts in map(PromptsRecord.model_validate, facts["prompts"]):
        source = " ".join(filter(None, [prompts.source, prompts.revision]))
        origin = f", from {source}" if source else ""
        yield "prompts", f"{prompts.name}: {prompts.count}, sha256 {prompts.sha256}{origin}"
    yield "images per prompt", facts["images_per_prompt"]
    yield "seeds", facts["seeds"]
    yield "drawing", ", ".join(f"{key} {value}" for key, value in facts["drawing"].items())
    if facts["excluded"]:
        yield "left out", f"{facts['excluded']} pairs that a safety checker blackened"
    if facts["reference"]:
        reference = ReferenceRecord.model_validate(facts["reference"])
        count = f"{reference.count} images" if reference.count else "stored statistics"
        yield "reference", f"{reference.name}: {count}, sha256 {reference.sha256}"
    yield "measured", f"{facts['date']} on {facts['hardware']}"
    yield "versions", ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
