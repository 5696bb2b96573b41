"""The gate: what is significantly worse than its base is not published, unless somebody says that it should be."""

from surgery.errors import PublishError


def check_regressions(scores, purpose, folder, allowed=False):
    """Raise PublishError where scores are significantly below the base's on what the surgery is for.

    That is where the 95% interval of the paired difference lies entirely on the worse side of zero. scores: a Scores
    or None. purpose: the metrics that the recipe names; where it names none, or none of those was measured, all with a
    value for each side count.
    """
    worse = scores.regressions(purpose) if scores else []
    if worse and not allowed:
        raise PublishError(
            f"{folder} is significantly worse than its untouched base on {regression_text(worse)}. Nothing was "
            "published: look at the report of `surgery validate` and try other settings (`surgery sweep`), or publish "
            "it all the same with --allow-regression; its card then begins with this"
        )


def regression_text(worse):
    """ "Shape alignment (0.565 to 0.473, 95% interval of the difference -0.13 to -0.053)", with commas between."""
    return ", ".join(
        f"{metric.title or metric.name} ({metric.base:.4g} to {metric.patched:.4g}, 95% interval of the difference "
        f"{metric.interval[0]:+.3g} to {metric.interval[1]:+.3g}, n {metric.n})"
        for metric in worse
    )
