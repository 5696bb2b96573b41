"""Guide a pipeline, and let it be as it was.

What changes is the pipeline's class, so that each of its runs puts a stand-in before the denoiser and takes it away.
The denoiser itself is left alone: compile it, patch it or load a LoRA into it before or after, in any order.
"""

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from surgery.errors import InputError, UnsupportedModelError
from surgery.models.modular import is_modular
from surgery.models.patching import denoiser
from surgery.nn.backbones.record import UNNAMED_CALLS

from .base import WINDOWS
from .guiders import guider_problem
from .layers import guided_backbone
from .methods import MethodName, guidance_of

if TYPE_CHECKING:
    from .driver import Driver

_DRIVER = "pladis_guidance"


def guide(
    pipeline: Any, method: MethodName | dict[str, Any], *, guidance_scale: float | None = None, **settings: Any
) -> Any:
    """Have a live pipeline sample with a guidance method, in place, until `unguide`; returns it.

    method: "cfg", "apg", "cfg-zero", "pag", "seg", "oseg", "sag", "slg", "stg", "autoguidance", "tsg" or "nag", or a
        recipe's `guidance` mapping. settings: its own, surgery/guidance/methods.py and weakening.py list them
        with their defaults.
    guidance_scale: of CFG, for pipelines that do not tell theirs (PixArt, and `true_cfg_scale` of FLUX and others).
        Else it is what the pipeline is called with: w in U + w (C - U), one more than the papers' w (base.py).
    No other pipeline that is made of its components is guided. It may be patched or compiled, before or after.
    Raises InputError for an unknown method, setting or layer and where the pipeline is guided already;
    UnsupportedModelError for a model or module that the method cannot weaken.
    """
    from surgery.nn.schedule import window_problems

    from .driver import Driver

    values = {**method, **settings} if isinstance(method, dict) else {"method": method, **settings}
    try:
        chosen = guidance_of(values)
    except ValueError as error:
        raise InputError(str(error)) from error
    for key in WINDOWS:
        for message in window_problems(key, chosen.window[key]) if key in chosen.window else ():
            raise InputError(f"guidance.{key} {message}")
    model = denoiser(pipeline)
    if driver_of(pipeline) is not None:
        raise InputError("this pipeline is guided already; surgery.unguide takes that away")
    backbone = guided_backbone(model)
    if getattr(pipeline, "transformer_2", None) is not None:
        raise UnsupportedModelError(f"guidance: {type(pipeline).__name__} has a second denoiser, left unguided")
    modular = is_modular(pipeline)
    problem = backbone.unguided if not modular or backbone.unguided != UNNAMED_CALLS else None  # guiders name theirs
    if problem or (problem := guider_problem(pipeline)):
        raise UnsupportedModelError(f"guidance: {type(model).__name__}: {problem}")
    if modular and chosen.method == "nag":
        raise UnsupportedModelError("guidance: nag encodes its negative prompt as modular pipelines do not")
    made = chosen.prepared(model, pipeline)
    if made.needs_pair and (modular or not backbone.batches_cfg):
        raise InputError(
            f"guidance: {chosen.method} needs both of CFG's outputs at once, which {type(pipeline).__name__} computes "
            "one after the other"
        )
    setattr(pipeline, _DRIVER, Driver(pipeline, model, backbone, made, guidance_scale))
    pipeline.__class__ = _guided_class(type(pipeline))
    return pipeline


def _guided_class(own):
    """The subclass of a pipeline's class that runs with a stand-in. It has the name of `own`, which diffusers saves."""

    @functools.wraps(own.__call__)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with getattr(self, _DRIVER).running():
            return own.__call__(self, *args, **kwargs)

    @property
    def components(self: Any) -> dict[str, Any]:  # offloading hangs its hooks on these
        return {name: getattr(part, "stood_for", part) for name, part in own.components.fget(self).items()}

    kept = {name: getattr(own, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(own.__name__, (own,), {"__call__": run, "components": components, **kept})


def unguide(pipeline: Any) -> Any:
    """Take guidance away from a pipeline; returns it."""
    if driver_of(pipeline) is None:
        raise InputError("this pipeline is not guided")
    delattr(pipeline, _DRIVER)
    (pipeline.__class__,) = type(pipeline).__bases__
    return pipeline


@contextmanager
def guided(
    pipeline: Any,
    guidance: MethodName | dict[str, Any] | None,
    sampling: Mapping[str, Any] | None = None,
    scales: Sequence[float] | None = None,
) -> Iterator["Driver | None"]:
    """While it lasts, the pipeline samples with a recipe's `guidance`, or as it is where that is None.

    sampling: the arguments that it will be called with; yields the Driver, or None. scales: the guidance_scale of each
    image of the batch, in place of the one that the pipeline is called with, which must be the largest: it decides
    whether there is CFG. For pipelines that run CFG in one batch.
    """
    if guidance is None:
        yield None
        return
    name = "guidance_scale" if guided_backbone(denoiser(pipeline)).batches_cfg else "true_cfg_scale"
    known = inspect.signature(type(pipeline).__call__).parameters
    scale = (sampling or {}).get(name, known[name].default if name == "guidance_scale" and name in known else None)
    guide(pipeline, guidance, guidance_scale=None if is_modular(pipeline) else scale)
    driver = driver_of(pipeline)
    assert driver is not None
    driver.scales = scales
    try:
        yield driver
    finally:
        unguide(pipeline)


def driver_of(pipeline: Any) -> "Driver | None":
    """The Driver of a guided pipeline, or None."""
    return vars(pipeline).get(_DRIVER)
