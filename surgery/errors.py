"""The errors that a user can do something about: each says what was wrong, where, and the next thing to do.

The command line prints them without a traceback. `exit_code` is its exit status: 2 for bad input, 1 for a job that
failed.
"""

import errno
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


class SurgeryError(Exception):
    """The job failed: a full disk, a server that does not answer, a model that cannot be patched."""

    exit_code = 1


class InputError(SurgeryError):
    """What was asked for cannot be done as it was written: a bad option, a folder that is not there."""

    exit_code = 2


class BaseError(SurgeryError):
    """The base model cannot be read: no such folder or repository, no access, a missing or unusable file."""


class BaseNotFoundError(BaseError):
    """What the recipe or the command names as a base, a revision, a variant or a weight file is not there."""

    exit_code = 2


class UnsupportedModelError(SurgeryError):
    """There is no surgery for this model or module."""


class ArtifactError(SurgeryError):
    """A folder is not a whole, unaltered artifact."""


class PublishError(SurgeryError):
    """Nothing was published, or not all: no right to, a licence against it, a conflict, a server that failed."""


_SHOWN = 50  # of a recipe's problems, in its message


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe: where it stands, what is wrong, what was probably meant."""

    where: str  # "recipes/x.yaml:14" or "--set operations.0.with.scale=x"
    key: str  # "operations[0].with.alhpa"
    message: str
    hint: str = ""

    def __str__(self) -> str:
        place = f"{self.where} {self.key}".rstrip()
        return f"{place}: {self.message}" + (f"; {self.hint}" if self.hint else "")


class RecipeError(InputError):
    """A recipe is wrong; carries every problem that was found, not the first alone."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        title = "1 problem in the recipe" if count == 1 else f"{count} problems in the recipe"
        shown = [*map(str, self.problems[:_SHOWN]), *([f"and {count - _SHOWN} more"] if count > _SHOWN else [])]
        super().__init__("\n  ".join([f"{title}:", *shown]))


_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_ACCESS = (errno.EACCES, errno.EROFS, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ENOLCK)


def disk_problem(error: Exception) -> Literal["full", "no access"] | None:
    """What an error says of the place that was written to; None where it says nothing of it."""
    number = getattr(error, "errno", None)
    return "full" if number in _FULL else "no access" if number in _NO_ACCESS else None


def nearest(word: object, candidates: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The candidate spelt most like `word`, or None."""
    from difflib import get_close_matches

    found = get_close_matches(str(word), list(candidates), n=1, cutoff=cutoff)
    return found[0] if found else None
