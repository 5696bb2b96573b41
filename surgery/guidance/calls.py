"""A call of a denoiser, which of its rows have the prompt, and what it gives back."""

import dataclasses
from typing import Any, Self

import torch

from surgery.models.twofold import is_twofold, other_of, plain_of
from surgery.nn.backbones.record import Backbone
from surgery.nn.hooks import arguments_of


class Call:
    """A call of a denoiser. pair: whether its batch has rows without the prompt and with it, as CFG has them.

    first, second, all: rows without the prompt, with it, and both, for `of` and `slice`; without a pair each is all.
    """

    first, second, all = "first", "second", "all"

    def __init__(self, model: torch.nn.Module, args: tuple, kwargs: dict, backbone: Backbone) -> None:
        self.arguments, self._second = arguments_of(type(model).forward, args, kwargs), None
        if is_twofold(self.arguments):
            self.arguments, self._second = plain_of(self.arguments), other_of(self.arguments)
        self.backbone, self.pair = backbone, False
        self.batch = len(self.arguments[backbone.latents])

    @property
    def with_prompt(self) -> Self:
        """The Call of the rows with the prompt alone."""
        return self.of(self.second)

    @property
    def with_second_text(self) -> Self | None:
        """The Call with the text that surgery/models/tempered.py made beside its own, None where none came."""
        return self.with_(**self._second) if self._second is not None else None

    @property
    def timestep(self) -> Any:
        """The timestep as the model is given it."""
        return self.arguments[self._timestep_name]

    @property
    def _timestep_name(self):
        return getattr(self.backbone.patched, "timestep", "timestep")

    @property
    def latents(self) -> torch.Tensor:
        """The noisy latents, those of a list as one tensor."""
        return _stacked(self.arguments[self.backbone.latents])

    @property
    def is_doubled(self) -> bool:
        """Whether both halves of the batch have the same latents."""
        half, latents = self.batch // 2, self.arguments[self.backbone.latents]
        return self.batch % 2 == 0 and all(torch.equal(latents[at], latents[half + at]) for at in range(half))

    def slice(self, rows: str) -> slice:
        """The rows as a slice of the batch."""
        if not self.pair or rows == self.all:
            return slice(0, self.batch)
        in_front = (rows == self.second) == self.backbone.prompt_first
        return slice(0, self.batch // 2) if in_front else slice(self.batch // 2, self.batch)

    def of(self, rows: str) -> Self:
        """A Call of some of the rows: every tensor that has as many rows as the latents is cut."""
        chosen = self.slice(rows)
        if chosen == slice(0, self.batch):
            return self
        lists, second = self.backbone.lists, self.backbone.batch_second
        cut = self.with_(
            **{
                name: value[:, chosen] if name in second else _cut(value, self.batch, chosen, lists)
                for name, value in self.arguments.items()
                if not (name in _IDS and torch.is_tensor(value) and value.ndim == 2)
            }
        )
        cut.pair, cut.batch = False, chosen.stop - chosen.start
        return cut

    def at(self, latents: torch.Tensor, timestep: Any) -> Self:
        """A Call with other latents, (batch, ...), and timestep, given as this one's are."""
        given = self.arguments[self.backbone.latents]
        found: Any = latents if torch.is_tensor(given) else list(latents)
        return self.with_(**{self.backbone.latents: found, self._timestep_name: timestep})

    def with_(self, **arguments: Any) -> Self:
        """A copy with other arguments."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__, arguments={**self.arguments, **arguments})
        return copy


_IDS = ("img_ids", "txt_ids", "position_ids")  # places of tokens, (tokens, axes), of all rows


def _cut(value, batch, chosen, lists):
    if torch.is_tensor(value):
        return value[chosen] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {name: _cut(part, batch, chosen, lists) for name, part in value.items()}
    if isinstance(value, (list, tuple)) and lists and len(value) == batch:
        return value[chosen]
    if isinstance(value, (list, tuple)) and any(torch.is_tensor(part) for part in value):
        return type(value)(_cut(part, batch, chosen, lists) for part in value)
    return value


def _stacked(values):
    return torch.stack(list(values)) if isinstance(values, (list, tuple)) else values


def prediction_of(result: Any) -> torch.Tensor:
    """The tensor that a denoiser predicts, in whatever it returns; a list of one for each image becomes one."""
    return _stacked(result[0])


def with_prediction(result: Any, prediction: torch.Tensor) -> Any:
    """What a denoiser returned, with another prediction in it."""
    found: Any = list(prediction) if isinstance(result[0], (list, tuple)) else prediction
    if isinstance(result, tuple):
        return (found, *result[1:])
    name = next(field.name for field in dataclasses.fields(result))
    return dataclasses.replace(result, **{name: found})
