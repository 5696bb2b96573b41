"""The words of a prompt, and those of them that were asked for: runs of characters, not of tokens."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from surgery.errors import InputError, nearest

# Punctuation that may stand inside a word: it's, state-of-the-art, 3.5, snake_case, Q&A.
_JOINERS = "'\u2019-._&"


@dataclass(frozen=True)
class Column:
    """A word, or a group of special tokens, with the positions of its tokens among a model's text keys."""

    label: str  # "circle"; "a (2)" for the second "a" of a prompt; "<start>"
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Words:
    """The columns that a prompt gives, and what they leave out."""

    columns: tuple[Column, ...]
    cut_off: tuple[str, ...]  # words that lie, whole or in part, beyond the text encoder's length
    length: int  # text keys, those of special tokens and padding included


def labelled_words(prompt: str) -> list[tuple[str, tuple[int, int]]]:
    """[(word, (first character, behind the last))] of a prompt, "a (2)" for the second "a", and so on.

    A word is a run of characters between white space and punctuation.
    """
    return _labelled(_word_spans(prompt))


def _word_spans(prompt):
    """[(word, (first character, behind the last))] of a prompt."""
    spans = []
    for inside, run in groupby(range(len(prompt)), lambda place: not _separates(prompt[place])):
        places = list(run)
        while inside and places and _is_punctuation(prompt[places[0]]):
            places.pop(0)
        while inside and places and _is_punctuation(prompt[places[-1]]):
            places.pop()
        if inside and places:
            start, end = places[0], places[-1] + 1
            spans.append((prompt[start:end], (start, end)))
    return spans


def _labelled(spans):
    """The spans with "a (2)" for the second "a", and so on."""
    seen, labelled = {}, []
    for word, span in spans:
        seen[word.lower()] = count = seen.get(word.lower(), 0) + 1
        labelled.append((word if count == 1 else f"{word} ({count})", span))
    return labelled


def chosen_words(wanted: Sequence[str], columns: Sequence[Column], cut_off: Sequence[str], length: int) -> list[Column]:
    """The columns of the wanted words, each once, in the order in which they were wanted.

    "a" means each "a" of the prompt, "a (2)" the second alone. Raises InputError for a word that the prompt does not
    have, or that is cut off behind `length` tokens.
    """
    chosen = []
    for word in wanted:
        name = word.strip().lower()
        found = [column for column in columns if name in (column.label.lower(), _without_number(column.label).lower())]
        if not found and name in (label.lower() for label in cut_off):
            raise InputError(f"{word!r} lies beyond the {length} tokens that the text encoder reads; it is cut off")
        if not found:
            labels = [column.label for column in columns]
            near = nearest(word.strip(), labels)
            hint = f"; did you mean {near!r}?" if near else ";"
            raise InputError(f"the prompt has no word {word.strip()!r}{hint} It has: {', '.join(labels) or 'none'}")
        chosen += [column for column in found if column not in chosen]
    return chosen


def _without_number(label):
    word, space, number = label.rpartition(" ")
    return word if space and number.startswith("(") else label


def _separates(character):
    return character.isspace() or (_is_punctuation(character) and character not in _JOINERS)


def _is_punctuation(character):
    return unicodedata.category(character).startswith("P")
