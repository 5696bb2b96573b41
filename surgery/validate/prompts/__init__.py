"""Prompts as a recipe or a command gives them: a set's name, a file of one's own, or the prompts themselves."""

from collections.abc import Sequence
from pathlib import Path

from surgery.errors import InputError, nearest

from .files import SUFFIXES, Prompt, PromptSet, checked_text, read_prompts
from .hub_sets import SETS, published_prompts

__all__ = ["EMPTY", "NAMES", "SHAPES", "Prompt", "PromptSet", "open_prompts"]

SHAPES = ("shapes", "shapes-dev", "shapes-test")  # the sets that ship with the package
EMPTY = "empty"  # no text at all, for unconditional generation: as many images as the limit says
NAMES = (*SETS, *SHAPES, EMPTY)


def open_prompts(given: str | Path | Sequence[str], folder: Path | str = Path(), limit: int | None = None) -> PromptSet:
    """The PromptSet that is meant by `given`; with a limit that many of it, evenly spaced.

    given: the name of a set, the path of a file, absolute or from `folder` on (the recipe's), or a list of prompts,
    whose set is named "recipe". Prompts are empty either all, for unconditional generation, or not at all.
    Raises InputError for an unknown set, a file that cannot be read and a limit under 1, and SurgeryError where a
    published set cannot be fetched.
    """
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise InputError(f"limit must be 1 prompt at least, not {limit!r}; leave it out for the whole set")
    if given == EMPTY:
        if limit is None:
            raise InputError(f"prompts: {EMPTY} needs to know how many images: give --limit, or `limit` in the recipe")
        return PromptSet(EMPTY, (Prompt(""),) * limit)
    return _opened(given, folder).spread(limit)


def _opened(given, folder):
    if isinstance(given, list | tuple):
        if not given:
            raise InputError("the list of prompts is empty; write one, or name a set")
        is_empty = all(text == "" for text in given)
        texts = [text if is_empty else checked_text(text, f"prompts[{index}]") for index, text in enumerate(given)]
        return PromptSet("recipe", tuple(map(Prompt, texts)))
    if not isinstance(given, str | Path):
        raise InputError(f"prompts must be a set's name, a file or a list of prompts, not {given!r}")
    if isinstance(given, str) and given in SHAPES:
        from .shapes import half_of_the_prompts, shapes_prompts

        return shapes_prompts() if given == SHAPES[0] else half_of_the_prompts(given)
    if isinstance(given, str) and given in SETS:
        return published_prompts(given)
    try:
        path = Path(given).expanduser()
        if isinstance(given, Path) or path.suffix or len(path.parts) > 1:
            return read_prompts(Path(folder) / path)
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, ~nobody, a zero byte
        raise InputError(f"{str(given)[:100]!r} is no file of prompts: {error}") from error
    near = nearest(str(given), NAMES)
    hint = f"; did you mean {near}?" if near else "."
    raise InputError(
        f"there is no prompt set {str(given)!r}{hint} There are: {', '.join(NAMES)}. A file of prompts needs its "
        f"suffix: {', '.join(SUFFIXES)}"
    )
