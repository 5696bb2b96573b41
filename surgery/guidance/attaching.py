"""Guide a pipeline, and let it be as it was.

What changes is the pipeline's class, so that each of its runs puts a stand-in before the denoiser and takes it away.
The denoiser itself is left alone: compile it, patch it or load a LoRA into it before or after, in any order.
"""

import functools
import inspect
from contextlib import contextmanager

from surgery.errors import InputError, UnsupportedModelError
from surgery.models.patching import denoiser
from surgery.recipe.guidance import guidance_of

_DRIVER = "pladis_guidance"


def guide(pipeline, method, *, guidance_scale=None, **settings):
    """Have a live pipeline sample with a guidance method, in place, until `unguide`; returns it.

    method: "cfg", "apg", "cfg-zero", "pag", "seg", "oseg", "sag", "slg", "stg", "autoguidance", "tsg" or "nag", or a
        recipe's `guidance` mapping. settings: its own, surgery/recipe/guidance.py lists them with their defaults.
    guidance_scale: w of CFG, for pipelines that do not tell theirs (PixArt, and `true_cfg_scale` of FLUX and others).
        Else it is what the pipeline is called with.
    No other pipeline that is made of its components is guided. It may be patched or compiled, before or after.
    Raises InputError for an unknown method, setting or layer and where the pipeline is guided already;
    UnsupportedModelError for a model or module that the method cannot weaken.
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
    setattr(pipeline, _DRIVER, Driver(pipeline, model, family, made, guidance_scale))
    pipeline.__class__ = _guided_class(type(pipeline))
    return pipeline


def _guided_class(own):
    """The subclass of a pipeline's class that runs with a stand-in. It has the name of `own`, which diffusers saves."""

    @functools.wraps(own.__call__)
    def run(self, *args, **kwargs):
        with getattr(self, _DRIVER).running():
            return own.__call__(self, *args, **kwargs)

    @property
    def components(self):  # offloading hangs its hooks on these
        return {name: getattr(part, "stood_for", part) for name, part in own.components.fget(self).items()}

    kept = {name: getattr(own, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(own.__name__, (own,), {"__call__": run, "components": components, **kept})


def unguide(pipeline):
    """Take guidance away from a pipeline; returns it."""
    if driver_of(pipeline) is None:
        raise InputError("this pipeline is not guided")
    delattr(pipeline, _DRIVER)
    (pipeline.__class__,) = type(pipeline).__bases__
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
    return vars(pipeline).get(_DRIVER)
