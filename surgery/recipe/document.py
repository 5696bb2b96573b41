"""A recipe file as plain data that remembers where each value stands.

YAML is read with the safe loader's types only. Duplicate keys are refused (YAML's own reader keeps the last without a
word), and so are aliases, which let a small file grow without bound.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from yaml.composer import ComposerError

from surgery.errors import Problem, RecipeError
from surgery.hub.bounded import compose_yaml, parse_yaml, read_text

_LARGEST = 1 << 17  # bytes; a recipe is a page


@dataclass(frozen=True)
class Document:
    """The data of a recipe; `lines` and `overrides` map a key path, as ("operations", 0, "with"), to its origin."""

    path: Path
    text: str
    data: dict
    lines: dict
    overrides: dict = field(default_factory=dict)

    def where(self, location: Sequence[str | int]) -> str:
        """ "x.yaml:14" for a key path, or the --set option that put it there; the nearest known parent's else."""
        below = [text for key, text in self.overrides.items() if key[: len(location)] == tuple(location)]
        if location and below and tuple(location) not in self.lines:
            return f"--set {below[0]}"
        for length in range(len(location), -1, -1):
            part = tuple(location[:length])
            if part in self.overrides:
                return f"--set {self.overrides[part]}"
            if part in self.lines:
                return f"{self.path}:{self.lines[part]}"
        return f"{self.path}:1"

    def problem(self, location: Sequence[str | int], message: str, hint: str = "") -> Problem:
        """A Problem that points at a key path."""
        return Problem(self.where(location), key_text(location), message, hint)


def key_text(location: Sequence[str | int]) -> str:
    """ "operations[0].with.alpha" for ("operations", 0, "with", "alpha")."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def read_document(path: Path, overrides: Sequence[str] = ()) -> Document:
    """The Document of a YAML file with `--set` overrides ("operations.0.with.scale=1.5") put in; RecipeError else."""
    try:
        text = read_text(path, _LARGEST)
    except OSError as error:
        raise RecipeError([Problem(str(path), "", f"cannot be read: {error.strerror}")]) from error
    except UnicodeDecodeError as error:
        raise RecipeError([Problem(str(path), "", f"is not UTF-8 text: {error.reason}")]) from error
    except ValueError as error:
        raise RecipeError([Problem(str(path), "", f"cannot be read: {error}; this is not a recipe")]) from error
    lines = {}
    try:
        node = compose_yaml(text)
        data = None if node is None else _construct(node, (), lines)
    except _Refused as refused:
        raise RecipeError([Problem(f"{path}:{refused.mark.line + 1}", "", refused.message)]) from None
    except ValueError as error:  # such as the date 2020-13-45, or half a character
        raise RecipeError([Problem(str(path), "", f"holds a value that YAML cannot make: {error}")]) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        message = getattr(error, "problem", None) or str(error)
        message = message if isinstance(error, ComposerError) else f"is not YAML: {message}"
        raise RecipeError([Problem(where, "", message)]) from error
    if not isinstance(data, dict):
        raise RecipeError([Problem(f"{path}:1", "", "a recipe is a mapping of keys; this file holds none")])
    document = Document(path, text, data, lines)
    _put_in(document, overrides)
    return document


class _Refused(Exception):
    def __init__(self, mark, message):
        super().__init__(message)
        self.mark, self.message = mark, message


_CONSTRUCTOR = yaml.constructor.SafeConstructor()


def _construct(node, location, lines):
    lines[location] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        mapping = {}
        for key_node, value_node in node.value:
            key = _CONSTRUCTOR.construct_object(key_node) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                raise _Refused(key_node.start_mark, "a key must be a word")
            if key in mapping:
                raise _Refused(key_node.start_mark, f"{key_text((*location, key))} stands twice; keep one")
            mapping[key] = _construct(value_node, (*location, key), lines)
            lines[(*location, key)] = key_node.start_mark.line + 1
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [_construct(child, (*location, index), lines) for index, child in enumerate(node.value)]
    return _CONSTRUCTOR.construct_object(node)


def _put_in(document, overrides):
    problems = []
    for override in overrides:
        path, equals, text = override.partition("=")
        path = re.sub(r"\[(\d+)\]", r".\1", path)  # operations[0] is what messages call operations.0
        location = tuple(int(part) if part.isascii() and part.isdigit() else part for part in path.strip().split("."))
        where = f"--set {override[:200]}"
        if not equals or "" in location:
            problems.append(Problem(where, "", "is not KEY=VALUE", "for example operations.0.with.scale=1.5"))
            continue
        try:
            override.encode("utf-8")
        except UnicodeEncodeError:
            problems.append(Problem(ascii(where), "", "is not UTF-8 text"))
            continue
        try:
            value = parse_yaml(text)
        except (yaml.YAMLError, ValueError):
            value = text  # such as the pattern *attn2, which YAML takes for an alias
        holder = document.data
        for depth, part in enumerate(location):
            last = depth == len(location) - 1
            if isinstance(holder, list):
                if not isinstance(part, int) or part >= len(holder):
                    message = f"there is no entry {part}; {key_text(location[:depth])} has {len(holder)}, from 0 on"
                    problems.append(Problem(where, key_text(location), message))
                    break
            elif not isinstance(holder, dict):
                message = f"{key_text(location[:depth])} is a value and holds no keys"
                problems.append(Problem(where, key_text(location), message))
                break
            if last:
                holder[part] = value  # pyright: ignore[reportCallIssue, reportArgumentType]
                document.overrides[location] = override
            elif isinstance(holder, dict):
                holder = holder.setdefault(part, {})
            else:
                holder = holder[part]  # pyright: ignore[reportCallIssue, reportArgumentType]
    if problems:
        raise RecipeError(problems)
