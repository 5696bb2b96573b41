"""Guide a pipeline, and let it be as it was."""

import inspect
from contextlib import contextmanager

from surgery.errors import InputError, UnsupportedModelError
from surgery.patching import denoiser
from surgery.recipe.guidance import guidance_of

_DRIVER = "pladis_guidance"


def guide(pipeline, method, *, guidance_scale=None, **settings):
    """Have a live pipeline sample with a guidance method, in place, until `unguide`; returns it.

    method: "cfg", "apg", "cfg-zero", "pag", "seg", "oseg", "sag", "slg", "stg", "autoguidance", "tsg" or "nag", or a
        recipe's `guidance` mapping. settings: its own, surgery/recipe/guidance.py lists them with their defaults.
    guidance_scale: w of CFG, for pipelines that do not tell theirs (PixArt, and `true_cfg_scale` of FLUX and others).
        Else it is what the pipeline is called with.
    The pipeline may be patched, before or after. Raises InputError for an unknown method, setting or layer and where
    the pipeline is guided already; UnsupportedModelError for a model or module that the method cannot weaken.
    """
    from surgery.nn.schedule import window_problems

    from .driver import Driver
    from .families import family_of
    from .methods import CARRIED_OUT

    values = {**method, **settings} if isinstance(method, dict) else {"method": method, **settings}
    try:
        chosen = guidance_of(values)
    except ValueError as error:
        raise InputError(str(error)) from error
    for key, window in chosen.window.items():
        for message in window_problems(key, window):
            raise InputError(f"guidance.{key} {message}")
    model = denoiser(pipeline)
    if driver_of(pipeline) is not None:
        raise InputError("this pipeline is guided already; surgery.unguide takes that away")
    family = family_of(model)
    if getattr(pipeline, "transformer_2", None) is not None:
        raise UnsupportedModelError(f"guidance: {type(pipeline).__name__} has a second denoiser, left unguided")
    made = CARRIED_OUT[chosen.method](chosen, model, pipeline)
    if made.needs_pair and not family.batched:
        raise InputError(
            f"guidance: {chosen.method} needs both of CFG's outputs at once, which {type(pipeline).__name__} computes "
            "one after the other"
        )
    called = _called(pipeline, model)
    driver = Driver(pipeline, model, family, made, called._compiled_call_impl or called._call_impl, guidance_scale)
    driver.before = called._compiled_call_impl
    # Where nn.Module.__call__ looks first: before hooks (offloading) and around a model that is compiled in place.
    called._compiled_call_impl = driver
    object.__setattr__(model, _DRIVER, (called, driver))
    if hasattr(model, "cache_context"):
        context = model.cache_context
        object.__setattr__(model, "cache_context", lambda name, **more: driver.named(name, context(name, **more)))
    return pipeline


def unguide(pipeline):
    """Take guidance away from a pipeline; returns it."""
    model = denoiser(pipeline)
    if _DRIVER not in model.__dict__:
        raise InputError("this pipeline is not guided")
    called, driver = model.__dict__.pop(_DRIVER)
    called._compiled_call_impl = driver.before
    model.__dict__.pop("cache_context", None)
    return pipeline


@contextmanager
def guided(pipeline, guidance, sampling=None):
    """While it lasts, the pipeline samples with a recipe's `guidance`, or as it is where that is None.

    sampling: the arguments that it will be called with; yields the Driver, or None.
    """
    if guidance is None:
        yield None
        return
    from .families import family_of

    name = "guidance_scale" if family_of(denoiser(pipeline)).batched else "true_cfg_scale"
    known = inspect.signature(type(pipeline).__call__).parameters
    scale = (sampling or {}).get(name, known[name].default if name == "guidance_scale" and name in known else None)
    guide(pipeline, guidance, guidance_scale=scale)
    try:
        yield driver_of(pipeline)
    finally:
        unguide(pipeline)


def driver_of(pipeline):
    """The Driver of a guided pipeline, or None."""
    return denoiser(pipeline).__dict__.get(_DRIVER, (None, None))[1]


def _called(pipeline, model):
    """The module that the pipeline calls: the denoiser, or what torch.compile made of it."""
    components = getattr(pipeline, "components", {})
    return next((part for part in components.values() if getattr(part, "_orig_mod", None) is model), model)
