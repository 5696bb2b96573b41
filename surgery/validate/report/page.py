"""report.html: one file that holds tables and pictures, and loads nothing."""

import base64
from html import escape

from surgery.console import sampling_text

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1f2328 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .3rem .7rem; border-bottom: 1px solid #d0d7de }
th { text-align: left } td.number { text-align: right; font-variant-numeric: tabular-nums }
.worse { color: #b3261e; font-weight: 600 } .better { color: #1a7f37; font-weight: 600 } .part td { color: #57606a }
img { max-width: 100%; height: auto } code { font-size: .9em }
.warning { border-left: 4px solid #b3261e; padding: .5rem 1rem }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def html_page(title, body):
    """A whole HTML page; body: its HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>\n<h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def picture(data, text):
    """An HTML image that carries its PNG (bytes) in itself."""
    return f'<p><img alt="{escape(text)}" src="data:image/png;base64,{base64.b64encode(data).decode()}"></p>'


def html_table(columns, rows):
    """An HTML table; rows: (CSS class, cells), a cell being text, or (text, CSS class)."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    lines = []
    for kind, cells in rows:
        parts = [cell if isinstance(cell, tuple) else (cell, "") for cell in cells]
        line = "".join(f'<td class="{css}">{escape(str(text))}</td>' for text, css in parts)
        lines.append(f'<tr class="{kind}">{line}</tr>')
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{chr(10).join(lines)}\n</tbody></table>"


def validation_page(manifest, scores, pictures, ranked_by):
    """The page of a validation. pictures: {file name: PNG}; ranked_by: the metric behind wins and losses, or None."""
    parts = [f"<p>{escape(manifest.summary)}</p>" if manifest.summary else ""]
    worse = scores.regressions(scores.purpose)
    if worse:
        names = ", ".join(metric.title or metric.name for metric in worse)
        parts.append(
            f'<p class="warning"><b>This patch makes the model significantly worse on {escape(names)}.</b></p>'
        )
    parts += [
        "<p>Base and patched images share prompts and seeds. Intervals are 95% bootstrap intervals over prompts of "
        "the paired difference, patched minus base; one that holds zero is no difference that so few can show.</p>",
        html_table(
            ["metric", "better is", "base", "patched", "difference", "95% interval", "wins", "ties", "n", "verdict"],
            [row for metric in scores.metrics for row in _rows(metric)],
        ),
    ]
    titles = {
        "differences.png": "Differences",
        "wins.png": f"Largest wins by {ranked_by}",
        "losses.png": f"Largest losses by {ranked_by}",
    }
    for name, title in titles.items():
        if name in pictures:
            parts += [f"<h2>{escape(title)}</h2>", picture(pictures[name], title)]
    parts += ["<h2>How it was measured</h2>", html_table(["", ""], [("", row) for row in _facts(scores)])]
    return html_page(f"{manifest.name}, {manifest.hash[:12]}", "\n".join(parts))


def _rows(metric):
    better = "higher" if metric.higher_is_better else "lower"
    cells = [metric.title or metric.name, better, *_figures(metric)]
    cells += [(_percent(metric.win_rate), "number"), (_percent(metric.tie_rate), "number"), (metric.n, "number")]
    yield "", [*cells, (metric.verdict, metric.verdict)]
    for part in metric.categories:
        yield "part", [f"- {part.name}", "", *_figures(part), "", "", (part.n, "number"), ""]


def _figures(part):
    low, high = part.interval
    shown = [part.base, part.patched, part.difference]
    cells = ["" if value is None else f"{value:+.4g}" if value is shown[2] else f"{value:.4g}" for value in shown]
    signed = "+.4g" if part.difference is not None else ".4g"
    return [(cell, "number") for cell in [*cells, f"{low:{signed}} to {high:{signed}}"]]


def _percent(share):
    return "" if share is None else f"{100 * share:.1f}%"


def _facts(scores):
    for prompts in scores.prompts:
        source = " ".join(filter(None, [prompts.source, prompts.revision]))
        yield [
            "prompts",
            f"{prompts.name}: {prompts.count}, sha256 {prompts.sha256}" + (f", from {source}" if source else ""),
        ]
    yield ["images per prompt", scores.images_per_prompt]
    yield ["seeds", scores.seeds]
    yield ["sampling", sampling_text(scores.sampling)]
    yield ["drawing", ", ".join(f"{key} {value}" for key, value in scores.drawing.items())]
    if scores.excluded:
        yield ["left out", f"{scores.excluded} pairs that a safety checker blackened"]
    if scores.reference:
        count = f"{scores.reference.count} images" if scores.reference.count else "stored statistics"
        yield ["reference", f"{scores.reference.name}: {count}, sha256 {scores.reference.sha256}"]
    yield ["measured", f"{scores.date} on {scores.hardware}"]
    yield ["versions", ", ".join(f"{name} {version}" for name, version in scores.versions.items())]
    yield ["artifact", scores.artifact_hash]
    for metric in scores.metrics:
        yield [metric.title or metric.name, "; ".join(filter(None, [metric.source, metric.checkpoint]))]
