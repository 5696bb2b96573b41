"""What every guidance method is: settings as a recipe has them, and what they do in a pipeline's denoiser.

In the formulas C and U are the model's outputs with and without the prompt (`pred_cond`, `pred_uncond`), W that of a
weakened model with it (`pred_cond_skip`), w `guidance_scale`. Every method starts from CFG, U + w (C - U), or from C
where the pipeline is sampled without it, and all but cfg, apg, cfg-zero and nag add `scale` (C - W). Outside its window
the model is sampled as without the method.

The papers write CFG as C + w (C - U) (PLADIS, arXiv 2503.07677, eq. 4; GAG, arXiv 2603.02531, eq. 2; OSEG): their w is
guidance_scale - 1.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, Field, model_serializer

from surgery.models.parts import Part, Selector, as_list, finite

if TYPE_CHECKING:
    import torch

    from surgery.nn.schedule import Window

    from .calls import Call
    from .driver import Driver

WINDOWS: "tuple[Window, ...]" = ("steps", "fraction", "sigma")  # as in surgery/nn/schedule.py


def _finite(value):
    return finite(value) if isinstance(value, float) else value


def _finite_ends(ends):
    return [_finite(end) for end in ends] if isinstance(ends, (list, tuple)) else ends


Layers = Annotated[
    list[Selector],
    BeforeValidator(as_list, json_schema_input_type=Selector | list[Selector]),
    Field(min_length=1),
]
Blur = Annotated[float, Field(gt=0, allow_inf_nan=True), BeforeValidator(_finite)]


@dataclass(frozen=True)
class Grid:
    """The image's tokens as frames x height x width.

    has_levels, text_first, fills_to, channels_last: as a backbone's record has them. start: where the image begins in a
    sequence that has text too, or, (batch,), in that of each entry; None for behind all else or before it, by
    text_first.
    """

    frames: int
    height: int
    width: int
    has_levels: bool
    text_first: bool
    start: "int | torch.Tensor | None" = None
    fills_to: int = 1
    channels_last: bool = False

    @property
    def count(self) -> int:
        """How many tokens the image has where attention is finest."""
        return self.frames * self.height * self.width

    @property
    def filled(self) -> int:
        """The same with what fills them up."""
        return self.count + -self.count % self.fills_to

    def at(self, tokens: int) -> "tuple[int, int, int, int | torch.Tensor] | None":
        """(frames, height, width, first token) of the image in a sequence of so many tokens; None where it has none.

        Such as the text's own, in joint attention of two streams. The first token: an int, or (batch,).
        """
        height, width = self.height, self.width
        while self.has_levels and height * width > tokens and height * width > 1:
            height, width = -(-height // 2), -(-width // 2)
        count = self.frames * height * width
        if count == tokens or self.has_levels:
            return (self.frames, height, width, 0) if count == tokens else None
        if count > tokens:
            return None
        if self.start is not None:
            return self.frames, height, width, self.start
        return self.frames, height, width, tokens - count if self.text_first else 0


@dataclass(frozen=True)
class Step:
    """One call of the model. index: from 0, of the steps asked for (surgery/nn/schedule.py).

    level: its timestep as a part of the training's, 0 to 1.
    """

    index: int
    level: float
    grid: Grid | None  # where the image's tokens are, for methods that need it

    def in_planes(
        self, function: "Callable[..., torch.Tensor]", prediction: "torch.Tensor", *more: object
    ) -> "torch.Tensor":
        """What a function of planes, (batch, channels, height, width) float32, makes of a prediction.

        Of latents (batch, channels, [frames,] height, width) each frame's are one image of the batch, and of tokens
        (batch, tokens, channels) those that the grid puts them into.
        """
        grid = self.grid
        packed = prediction.ndim == 3
        moved = packed or (grid is not None and grid.channels_last)
        planes = prediction
        if packed:
            assert grid is not None  # needs_grid
            planes = planes.unflatten(1, (grid.frames, grid.height, grid.width))
        planes = planes.movedim(-1, 1) if moved else planes
        has_frames, count = planes.ndim == 5, planes.shape[2]
        if has_frames:
            planes = planes.transpose(1, 2).flatten(0, 1)  # (batch * frames, channels, height, width)
        found = function(planes.float(), *more).to(prediction.dtype)
        if has_frames:
            found = found.unflatten(0, (-1, count)).transpose(1, 2)
        found = found.movedim(1, -1) if moved else found
        return found.flatten(1, 3) if packed else found


class Method(Part):
    """A guidance method. Its fields are a recipe's; `prepared` gives the copy that runs in one pipeline.

    steps, fraction, sigma: the window in which it acts, as in an operation's schedule, [from, to] each.
    """

    steps: list[int | None] | None = None
    fraction: list[float] | None = None
    sigma: Annotated[list[float], BeforeValidator(_finite_ends)] | None = None
    method: str

    weakens: ClassVar[bool] = False  # evaluates a weakened model besides
    needs_grid: ClassVar[bool] = False
    changes_modules: ClassVar[bool] = True  # an engine, which is compiled, cannot follow

    _pipeline: Any = None
    _replacements: list = []  # of submodules, [(parent, name, module)]: what stands in their place

    @model_serializer(mode="wrap")
    def _without_what_is_not_said(self, handler):
        return {key: value for key, value in handler(self).items() if value is not None}

    @property
    def window(self) -> dict[str, list]:
        """{key: [from, to]} of the windows that are named."""
        return {key: getattr(self, key) for key in WINDOWS if getattr(self, key) is not None}

    @property
    def needs_pair(self) -> bool:
        """Whether it needs the outputs with and without the prompt at once."""
        return False

    @property
    def is_plain(self) -> bool:
        """Whether inside its window it combines the outputs as CFG does."""
        return not self.weakens and type(self).combined is Method.combined

    @property
    def asks_with_prompt_alone(self) -> bool:
        """Whether the model's own output without the prompt is not needed."""
        return False

    def outputs(
        self,
        driver: "Driver",
        call: "Call",
        step: Step,
        pred_cond: "torch.Tensor",
        pred_uncond: "torch.Tensor | None",
    ) -> "tuple[torch.Tensor | None, torch.Tensor | None]":
        """(U, W): what more it evaluates, after the ordinary call; U as given unless it takes another, W or None."""
        return pred_uncond, None

    def without_prompt(self, call: "Call") -> "Call":
        """What is evaluated where a pipeline's call without the prompt comes, after the one with it."""
        return call

    def evaluations(self, guided: bool) -> int:
        """Evaluations of the denoiser for one image at a step in the window; guided: whether CFG is on."""
        return 1 + guided + self.weakens

    def pinned(self, model: "torch.nn.Module", folder: Path = Path()) -> Self:
        """The same with the commit of every other checkpoint that it names, for a plan; model: live or meta.

        folder: where relative folders begin. Raises InputError for one that does not fit the model.
        """
        return self

    def prepared(self, model: "torch.nn.Module", pipeline: Any) -> Self:
        """A copy for one pipeline; InputError and UnsupportedModelError for a model that it cannot guide."""
        made = self.model_copy()
        made._pipeline = pipeline
        made._prepare(model)
        return made

    def _prepare(self, model):
        """Find what is to be replaced in a model."""

    def around_run(self) -> AbstractContextManager[object]:
        """A context for each run of the pipeline, its text encoders' calls among it."""
        return nullcontext()

    def begin(self) -> None:
        """A run of the pipeline begins: what is kept from call to call is forgotten."""

    def around(self, call: "Call", step: Step) -> AbstractContextManager[object]:
        """A context for the ordinary call."""
        return nullcontext()

    def combined(
        self,
        pred_cond: "torch.Tensor",
        pred_uncond: "torch.Tensor | None",
        guidance_scale: "float | torch.Tensor",
        step: Step,
    ) -> "torch.Tensor":
        """CFG, or C where there is no U. guidance_scale: of all images, or of each, (batch, 1, ...)."""
        return pred_cond if pred_uncond is None else pred_uncond + guidance_scale * (pred_cond - pred_uncond)
