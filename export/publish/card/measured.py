"""The card's scores: every metric with the base beside it, or the plain statement that there are none."""

from surgery.console import sampling_text

from ..gate import regression_text
from .sections import cell, code


def regression_lines(scores, purpose):
    """The card's first lines where the patch hurts the model; none where it does not, or nothing was measured."""
    worse = scores.regressions(purpose) if scores else []
    if not worse:
        return []
    return [
        "> [!WARNING]",
        "> **This patch makes the model significantly worse than its untouched base** on "
        f"{cell(regression_text(worse))}. It is published as it was measured: see Scores.",
        "",
    ]


def score_lines(manifest, scores, purpose=()):
    """The section on what was measured, and on what of the recipe's purpose was not."""
    if scores is None:
        return ["## Scores", "", "Not scored: nothing has been measured for this artifact.", ""]
    sets = ", ".join(
        cell(f"{prompts.name} ({prompts.count} prompts{f', sha256 {prompts.sha256[:12]}' if prompts.sha256 else ''})")
        for prompts in scores.prompts
    )
    worse = [_title(metric) for metric in scores.metrics if metric.verdict == "worse"]
    lines = [
        "## Scores",
        "",
        "Base and patched images share prompts and seeds. The difference is patched minus base, with its 95% "
        "confidence interval; an interval that holds zero is no difference that this many images can show.",
        "",
    ]
    unmeasured = [name for name in purpose if name not in [metric.name for metric in scores.metrics]]
    if unmeasured:
        names = cell(", ".join(unmeasured))
        lines += [f"**Not measured: {names}**, which the recipe names as the surgery's purpose.", ""]
    if worse:
        lines += [f"**Worse than the base on {', '.join(worse)}.**", ""]
    sided = [metric for metric in scores.metrics if metric.kind != "fidelity"]
    if sided:
        lines += [
            "| metric | better is | base | patched | difference | 95% interval | wins | n | verdict |",
            "|---|---|---|---|---|---|---|---|---|",
            *(_row(metric) for metric in sided),
            "",
        ]
    lines += [
        *_category_lines(scores),
        *_fidelity_lines(scores),
        f"Prompts: {sets}; {scores.images_per_prompt} image{'s' if scores.images_per_prompt != 1 else ''} each"
        + (f", seeds: {cell(str(scores.seeds))}" if scores.seeds else "")
        + ".",
        f"Left out: {scores.excluded} pairs in which a safety checker blackened an image." if scores.excluded else "",
        _reference_line(scores.reference) if scores.reference else "",
        f"Sampling: {cell(sampling_text(scores.sampling))}." if scores.sampling else "",
        f"Measured {cell(scores.date)} on {cell(scores.hardware)}, with "
        + ", ".join(f"{cell(name)} {cell(version)}" for name, version in scores.versions.items())
        + f"; artifact hash {code(scores.artifact_hash)}"
        + (", which is this one." if scores.artifact_hash == manifest.hash else "."),
        "",
    ]
    checkpoints = [f"{_title(metric)}: {cell(metric.checkpoint)}" for metric in scores.metrics if metric.checkpoint]
    lines = [line for line, before in zip(lines, ["x", *lines], strict=False) if line or before]  # no empty line twice
    return [*lines, *([f"Scored by {'; '.join(checkpoints)}.", ""] if checkpoints else [])]


def _title(metric):
    return cell(metric.title or metric.name)


def _row(metric):
    low, high = metric.interval
    wins = f"{100 * metric.win_rate:.1f}%" if metric.win_rate is not None else ""
    direction = "higher" if metric.higher_is_better else "lower"
    return (
        f"| {_title(metric)} | {direction} | {metric.base:.4g} | {metric.patched:.4g} | {metric.difference:+.4g} | "
        f"{low:+.4g} to {high:+.4g} | {wins} | {metric.n} | {metric.verdict} |"
    )


def _category_lines(scores):
    """What each category's base and patched values are, where a metric has categories."""
    lines = []
    for metric in scores.metrics:
        if metric.kind == "fidelity" or not metric.categories:
            continue
        parts = "; ".join(
            f"{cell(part.name)} {part.base:.4g} to {part.patched:.4g} "
            f"({part.interval[0]:+.3g} to {part.interval[1]:+.3g})"
            for part in metric.categories
        )
        lines += [f"{_title(metric)} by category, base to patched (95% interval of the difference): {parts}.", ""]
    return lines


def _fidelity_lines(scores):
    """How far the patch moves the images from the base's own."""
    found = [metric for metric in scores.metrics if metric.kind == "fidelity"]
    if not found:
        return []
    parts = "; ".join(
        f"{_title(metric)} {metric.patched:.4g} ({metric.interval[0]:.4g} to {metric.interval[1]:.4g})"
        for metric in found
    )
    return [f"How near the patched images are to the base's of the same seed, mean and 95% interval: {parts}.", ""]


def _reference_line(reference):
    count = f"{reference.count} images" if reference.count else "stored statistics"
    return f"Compared with: {cell(reference.name)} ({count}, sha256 {cell(reference.sha256[:12])})."
