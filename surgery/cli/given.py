"""What the verbs take from a parsed command line."""

import argparse
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from surgery.errors import InputError
from surgery.machine import SHORT_NAMES


def running(arguments: argparse.Namespace) -> dict[str, Any]:
    """{name: value} of the options on engines and compiling, as `surgery.runtime.load.open_model` takes them."""
    return {name: getattr(arguments, name) for name in ("engine", "trust_engines", "fallback", "compile")}


def check_threads(arguments: argparse.Namespace) -> None:
    """Raise InputError for no threads."""
    if arguments.threads is not None and arguments.threads < 1:
        raise InputError(f"--threads must be at least 1, not {arguments.threads}")


def dtype_of(name: str | None) -> Any:
    """The torch dtype of "fp16", "float16" and so on, as --dtype and recipes have them; None of None."""
    if name is None:
        return None
    import torch

    return getattr(torch, SHORT_NAMES.get(name, name))


def given_sampling(arguments: argparse.Namespace, *further: str) -> dict[str, Any]:
    """{setting: value} of the sampling settings on the command line; InputError for values out of range."""
    from surgery.recipe.schema import sampling_problems

    names = ("steps", "guidance_scale", "height", "width", *further)
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if problems := sampling_problems(given):
        raise InputError("\n  ".join(problems))
    return given


def fields_of(kind: type, given: object, **further: Any) -> Any:
    """A dataclass of what `given`, a command line or a part of a recipe, has under the names of its fields.

    further: fields that stand there under another name, or in another form.
    """
    named = {field.name: getattr(given, field.name) for field in fields(kind) if hasattr(given, field.name)}
    return kind(**{**named, **further})


def checkpoints_of(given: Iterable[str]) -> dict[str, str]:
    """{"metric.part": path} of --checkpoint METRIC.PART=PATH options."""
    pairs = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or not path:
            raise InputError(f"--checkpoint {text}: write METRIC.PART=PATH")
        pairs[name] = path
    return pairs
