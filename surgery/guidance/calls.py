"""A call of a denoiser taken apart: its arguments by name, and the rows of its batch."""

import dataclasses
import inspect

import torch


class Call:
    """A call of a denoiser. pair: whether its batch is [without prompt, with prompt], as CFG has it.

    first, second, all: which rows, for `of` and `slice`; without a pair, each is all of them.
    """

    first, second, all = "first", "second", "all"

    def __init__(self, model, args, kwargs, latents, pair):
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        self.arguments = dict(zip(names, args, strict=False)) | kwargs
        self.latents, self.pair = latents, pair
        self.batch = self.arguments[latents].shape[0]

    @property
    def with_prompt(self):
        """The Call of the rows with the prompt alone."""
        return self.of(self.second)

    def slice(self, rows):
        """The rows as a slice of the batch."""
        if not self.pair or rows == self.all:
            return slice(0, self.batch)
        return slice(0, self.batch // 2) if rows == self.first else slice(self.batch // 2, self.batch)

    def of(self, rows):
        """A Call of some of the rows: every tensor that has as many rows as the latents is cut."""
        chosen = self.slice(rows)
        if chosen == slice(0, self.batch):
            return self
        cut = self.with_(**{name: _cut(value, self.batch, chosen) for name, value in self.arguments.items()})
        cut.pair, cut.batch = False, chosen.stop - chosen.start
        return cut

    def with_(self, **arguments):
        """A copy with other arguments."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__, arguments={**self.arguments, **arguments})
        return copy


def _cut(value, batch, chosen):
    if torch.is_tensor(value):
        return value[chosen] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {name: _cut(part, batch, chosen) for name, part in value.items()}
    if isinstance(value, (list, tuple)) and any(torch.is_tensor(part) for part in value):
        return type(value)(_cut(part, batch, chosen) for part in value)
    return value


def prediction_of(result):
    """The tensor that a denoiser predicts, in whatever it returns."""
    return result[0]


def with_prediction(result, prediction):
    """What a denoiser returned, with another prediction in it."""
    if isinstance(result, tuple):
        return (prediction, *result[1:])
    name = next(field.name for field in dataclasses.fields(result))
    return dataclasses.replace(result, **{name: prediction})
