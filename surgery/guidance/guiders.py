"""CFG in a modular pipeline is its guider's, which calls the denoiser once with the prompt and once without."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from surgery.models.denoisers import FURTHER
from surgery.models.modular import is_modular


def guider_of(pipeline: Any, component: str) -> Any:
    """The guider of a modular pipeline for a denoiser; None of any other, and of one that samples without."""
    name = "guider_2" if component in FURTHER else "guider"
    return getattr(pipeline, name, None) if is_modular(pipeline) else None


def guider_problem(pipeline: Any, component: str) -> str | None:
    """Why no method can guide a modular pipeline beside its guider, or None."""
    from diffusers import ClassifierFreeGuidance

    guider = guider_of(pipeline, component)
    if guider is None or type(guider) is ClassifierFreeGuidance:
        return None
    return (
        f"its guider is {type(guider).__name__}, which is guidance of its own; a method here goes with "
        "ClassifierFreeGuidance: pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=...))"
    )


def guidance_scale_of(guider: Any) -> float:
    """w of U + w (C - U) at the step that a guider is told of; 1 where it computes none, or there is no guider."""
    if guider is None or guider.num_conditions < 2:
        return 1.0
    return guider.guidance_scale + (1.0 if guider.use_original_formulation else 0.0)


@contextmanager
def heard(guider: Any, tell: Callable[[str | None], None]) -> Iterator[None]:
    """While it lasts `tell` learns before each of a guider's calls whether it is "cond" or "uncond"."""
    if guider is None:
        yield
        return
    prepare = guider.prepare_models

    def prepared(denoiser: Any) -> None:
        prepare(denoiser)
        tell("cond" if guider.is_conditional else "uncond")

    guider.prepare_models = prepared
    try:
        yield
    finally:
        del guider.prepare_models
        tell(None)
