"""The sizes that a server draws where its model runs compiled engines, found before Ray is started."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from surgery.artifact import read_manifest
from surgery.artifact.fetch import model_folder
from surgery.engines.record import AXES, Profile, Span
from surgery.errors import InputError
from surgery.hub.base import read_index
from surgery.hub.listing import components_of
from surgery.machine import best_device

if TYPE_CHECKING:
    from .checking import Limits, ServedModel


def served_profile(model: str, revision: str | None, running: Mapping[str, Any]) -> Profile | None:
    """The Profile that all engines have in common which a replica would run; None where it would run eagerly.

    running: fields of a WorkerConfig. Raises InputError where no engine fits this machine, unless that is no matter
    (`fallback`).
    """
    import torch

    from surgery.runtime.load import chosen_engines, default_dtype, refuse_untrusted

    refuse_untrusted(model, bool(running.get("trust_engines")))
    folder = model_folder(model, revision)
    manifest = read_manifest(folder)
    device = torch.device(running.get("device") or best_device())
    named = running.get("dtype")
    dtype = getattr(torch, named) if named else default_dtype(folder / manifest.component, device)
    modules = dict.fromkeys(components_of(read_index(folder)), SimpleNamespace(device=device, dtype=dtype))
    try:
        _, chosen = chosen_engines(modules, model, revision, folder, manifest, running["engine"])
    except InputError:
        if running.get("fallback"):
            return None
        raise
    profiles = [engine.profile for engine in chosen.values()]
    return Profile(**{axis: _common([getattr(profile, axis) for profile in profiles]) for axis in AXES})


def _common(spans):
    low, high = max(span.low for span in spans), min(span.high for span in spans)
    if low > high:
        raise InputError(f"the engines were built for sizes that none has in common: {', '.join(map(str, spans))}")
    return Span(low, min(max(spans[0].usual, low), high), high)


def check_profile(profile: Profile, served: "ServedModel", limits: "Limits") -> None:
    """Raise InputError where requests that the server would accept are none that the engines can draw.

    limits: as they were given.
    """
    images = profile.images
    own = f"{served.height}x{served.width}"
    if images.low > 1:
        raise InputError(
            f"the engine draws at least {images.low} images at once, and a request may be for one: build another by "
            f"surgery export --shapes 1..{images.high}x{own}"
        )
    if limits.max_batch and limits.max_batch > images.high:
        raise InputError(
            f"--max-batch {limits.max_batch}: the engine draws at most {images.high} at once; leave --max-batch out, "
            f"or build another by surgery export --shapes 1..{limits.max_batch}x{own}"
        )
    if served.height and served.width and (problem := profile.problem(None, served.height, served.width)):
        raise InputError(
            f"a request without a size is for {served.width}x{served.height}, and {problem}: build another by "
            f"surgery export --shapes 1..{images.high}x{own}"
        )
