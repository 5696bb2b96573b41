"""Guide a pipeline, and let it be as it was.

Each of the pipeline's runs (surgery/models/runs.py) puts a stand-in before the denoiser and takes it away.
The denoiser itself is left alone: compile it, patch it or load a LoRA into it before or after, in any order.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from surgery.errors import InputError, UnsupportedModelError
from surgery.models.modular import is_modular
from surgery.models.patching import denoisers
from surgery.models.runs import stand_around, stand_aside

from .base import WINDOWS
from .guiders import guider_problem
from .layers import guided_backbone
from .methods import MethodName, guidance_of

if TYPE_CHECKING:
    from .driver import Driver

_DRIVER = "pladis_guidance"


def guide(pipeline: Any, method: MethodName | dict[str, Any], **settings: Any) -> Any:
    """Have a live pipeline sample with a guidance method, in place, until `unguide`; returns it.

    method: a name of `METHODS` in surgery/guidance/methods.py, or a recipe's `guidance` mapping. settings: its own, as
        its class there lists them with their defaults. guidance_scale is what the pipeline is called with: w in
        U + w (C - U), one more than the papers' w (base.py).
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
    models = denoisers(pipeline)
    if driver_of(pipeline) is not None:
        raise InputError("this pipeline is guided already; surgery.unguide takes that away")
    if len(models) > 1 and getattr(chosen, "weak", None) is not None:
        raise UnsupportedModelError(
            f"guidance: {chosen.method} names one weaker model, and {type(pipeline).__name__} has two denoisers"
        )
    if is_modular(pipeline) and chosen.method == "nag":
        raise UnsupportedModelError("guidance: nag encodes its negative prompt as modular pipelines do not")
    drivers = []
    for component, model in models.items():
        backbone = guided_backbone(model)
        if problem := backbone.unguided or guider_problem(pipeline, component):
            raise UnsupportedModelError(f"guidance: {type(model).__name__}: {problem}")
        drivers.append(Driver(pipeline, component, model, backbone, chosen.prepared(model, pipeline)))
    signature = inspect.signature(type(pipeline).__call__)
    setattr(pipeline, _DRIVER, drivers[0])
    stand_around(pipeline, _DRIVER, lambda args, kwargs: _running(drivers, signature, pipeline, args, kwargs))
    return pipeline


@contextmanager
def _running(drivers, signature, pipeline, args, kwargs):
    try:
        given = signature.bind(pipeline, *args, **kwargs)
    except TypeError:  # the pipeline says it better
        yield
        return
    given.apply_defaults()
    with ExitStack() as stack:
        stack.enter_context(drivers[0].method.around_run())
        for driver in drivers:
            stack.enter_context(driver.running(given.arguments))
        yield


def unguide(pipeline: Any) -> Any:
    """Take guidance away from a pipeline; returns it."""
    if driver_of(pipeline) is None:
        raise InputError("this pipeline is not guided")
    delattr(pipeline, _DRIVER)
    stand_aside(pipeline, _DRIVER)
    return pipeline


@contextmanager
def guided(
    pipeline: Any,
    guidance: MethodName | dict[str, Any] | None,
    scales: Sequence[float] | None = None,
) -> Iterator["Driver | None"]:
    """While it lasts, the pipeline samples with a recipe's `guidance`, or as it is where that is None.

    Yields the Driver, or None. scales: the guidance_scale of each
    image of the batch, in place of the one that the pipeline is called with, which must be the largest: it decides
    whether there is CFG. For pipelines that run CFG in one batch.
    """
    if guidance is None:
        yield None
        return
    guide(pipeline, guidance)
    driver = driver_of(pipeline)
    assert driver is not None
    driver.scales = scales
    try:
        yield driver
    finally:
        unguide(pipeline)


def driver_of(pipeline: Any) -> "Driver | None":
    """The Driver of a guided pipeline's first denoiser, or None."""
    return vars(pipeline).get(_DRIVER)
