"""Scores of a patched pipeline beside its untouched base: paired images, metrics, statistics, report, blind study.

from surgery.validate import Drawing, sweep, validate

done = validate("out/shapes", prompts="shapes", limit=60, metrics=["shape_alignment", "ssim"])
done.scores.metrics[0].interval
sweep("shapes", {"scale": [0.5, 1.0, 2.0]}, given={"prompts": "shapes", "limit": 60}, out="out/sweep")
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .jobs import Drawing
    from .rows import Row, score_rows
    from .sweeping import sweep
    from .validating import validate

_HOMES = {
    "Drawing": "surgery.validate.jobs",
    "Row": "surgery.validate.rows",
    "score_rows": "surgery.validate.rows",
    "sweep": "surgery.validate.sweeping",
    "validate": "surgery.validate.validating",
}

__all__ = ["Drawing", "Row", "score_rows", "sweep", "validate"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'surgery.validate' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
