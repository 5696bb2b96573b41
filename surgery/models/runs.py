"""What stands around the runs of a live pipeline: guidance, and the ear for negative prompts.

The pipeline's class becomes one of the same name whose calls run within what was asked for; with the last of it gone
the pipeline has its own class again.
"""

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

_AROUND = "pladis_around"

Enter = Callable[[tuple, Mapping[str, Any]], AbstractContextManager]  # (args, kwargs) of a run -> what is around it


def stand_around(pipeline: Any, name: str, enter: Enter) -> None:
    """Have each run of a pipeline be within `enter(args, kwargs)`, until `stand_aside`; one of each name."""
    held = vars(pipeline).setdefault(_AROUND, {})
    if not held:
        pipeline.__class__ = _class_around(type(pipeline))
    held[name] = enter


def stand_aside(pipeline: Any, name: str) -> None:
    """Take away what stands around a pipeline's runs under this name, if anything does."""
    held = vars(pipeline).get(_AROUND, {})
    if held.pop(name, None) is not None and not held:
        delattr(pipeline, _AROUND)
        (pipeline.__class__,) = type(pipeline).__bases__


def _class_around(own):
    """The subclass of a pipeline's class with its runs changed. It has the name of `own`, which diffusers saves."""

    @functools.wraps(own.__call__)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for enter in vars(self)[_AROUND].values():
                stack.enter_context(enter(args, kwargs))
            return own.__call__(self, *args, **kwargs)

    @property
    def components(self: Any) -> dict[str, Any]:  # offloading hangs its hooks on these
        return {name: getattr(part, "stood_for", part) for name, part in own.components.fget(self).items()}

    kept = {name: getattr(own, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(own.__name__, (own,), {"__call__": run, "components": components, **kept})
