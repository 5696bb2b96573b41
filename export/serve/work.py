"""What is to be drawn, and what came of it: the values that pass between front and replicas."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """All that the images of one batch have in common; None is the pipeline's own default.

    negatives: whether they have negative prompts, since some pipelines take an empty one for something else than none.
    hyperparameters: of the attention operator, (name, value) pairs in order of name.
    """

    steps: int | None = None
    timesteps: tuple[int, ...] | None = None
    guidance_scale: float | None = None
    width: int | None = None
    height: int | None = None
    negatives: bool = False
    hyperparameters: tuple[tuple[str, float], ...] = ()

    def sampling(self):
        """The settings as `surgery.generating.draw` takes them."""
        values = {name: getattr(self, name) for name in ("steps", "guidance_scale", "width", "height")}
        values["timesteps"] = None if self.timesteps is None else list(self.timesteps)
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Picture:
    """One image to draw. It depends on nothing but this and its Setting, so it may be drawn again elsewhere."""

    prompt: str
    seed: int
    negative_prompt: str | None = None
    format: str = "png"  # or "jpeg", "webp"


@dataclass(frozen=True)
class Drawn:
    """An image file as base64 text, or why there is none: `problem` in words, of a kind.

    kind: "memory" (one image alone does not fit), "refused" (the pipeline has no such setting), "failed".
    """

    image: str | None = None
    size: str | None = None  # "512x768", width first
    flagged: bool = False  # blackened by the pipeline's safety checker
    problem: str | None = None
    kind: str | None = None
