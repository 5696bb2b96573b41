"""The card's scores: every metric with the base beside it, or the plain statement that there are none."""

from .sections import cell


def score_lines(manifest, scores):
    """The section on what was measured."""
    if scores is None:
        return ["## Scores", "", "Not scored: nothing has been measured for this artifact.", ""]
    sets = ", ".join(
        f"{cell(prompts.name)} ({prompts.count} prompts{f', sha256 {prompts.sha256[:12]}' if prompts.sha256 else ''})"
        for prompts in scores.prompts
    )
    worse = [cell(metric.name) for metric in scores.metrics if metric.verdict == "worse"]
    lines = [
        "## Scores",
        "",
        "Base and patched images share prompts and seeds. The difference is patched minus base, with its 95% "
        "confidence interval; an interval that holds zero is no difference that this many images can show.",
        "",
    ]
    if worse:
        lines += [f"**Worse than the base on {', '.join(worse)}.**", ""]
    lines += [
        "| metric | better is | base | patched | difference | 95% interval | wins | n | verdict |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_row(metric) for metric in scores.metrics),
        "",
        f"Prompts: {sets}; {scores.images_per_prompt} image{'s' if scores.images_per_prompt != 1 else ''} each"
        + (f", seeds {scores.seeds}" if scores.seeds else "")
        + ".",
        f"Sampling: {_settings(scores.sampling)}." if scores.sampling else "",
        f"Measured {cell(scores.date)} on {cell(scores.hardware)}, with "
        + ", ".join(f"{cell(name)} {cell(version)}" for name, version in scores.versions.items())
        + f"; artifact hash `{scores.artifact_hash}`"
        + (", which is this one." if scores.artifact_hash == manifest.hash else "."),
        "",
    ]
    checkpoints = [f"{metric.name}: {metric.checkpoint}" for metric in scores.metrics if metric.checkpoint]
    return [*lines, *([f"Scored by {'; '.join(checkpoints)}.", ""] if checkpoints else [])]


def _row(metric):
    low, high = metric.interval
    wins = f"{100 * metric.win_rate:.1f}%" if metric.win_rate is not None else ""
    direction = "higher" if metric.higher_is_better else "lower"
    return (
        f"| {cell(metric.name)} | {direction} | {metric.base:.4g} | {metric.patched:.4g} | {metric.difference:+.4g} | "
        f"{low:+.4g} to {high:+.4g} | {wins} | {metric.n} | {metric.verdict} |"
    )


def _settings(sampling):
    return ", ".join(f"{key} {value}" for key, value in sampling.items())
