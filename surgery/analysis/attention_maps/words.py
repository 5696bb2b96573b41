"""Which tokens of a text encoder's input a word of the prompt became: the columns of an attention map."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from surgery.errors import InputError, UnsupportedModelError, nearest

# Punctuation that may stand inside a word: it's, state-of-the-art, 3.5, snake_case, Q&A.
_JOINERS = "'\u2019-._&"
_LONGEST = 4096  # transformers gives a tokenizer without a length of its own one of 1e30


@dataclass(frozen=True)
class Column:
    """A word, or a group of special tokens, with the positions of its tokens among the keys of a cross-attention."""

    label: str  # "circle"; "a (2)" for the second "a" of a prompt; "<start>"
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Words:
    """The columns that a prompt gives, and what they leave out."""

    columns: tuple[Column, ...]
    cut_off: tuple[str, ...]  # words that lie, whole or in part, beyond the text encoder's length
    length: int  # tokens, special ones and padding included: the keys of a cross-attention


def words_of_prompt(tokenizer: Any, prompt: str, wanted: Sequence[str] | None = None, special: bool = False) -> Words:
    """The Words of a prompt: a column for each word in its order, or for each of `wanted`, a list of words.

    A word is a run of characters between white space and punctuation, its tokens those that the tokenizer made of
    that run, found by the tokenizer's own offsets. A wanted word that occurs more than once gives a column each time;
    "a (2)" means the second alone. special: further columns for "<start>", "<end>", "<padding>" and, where there is
    any, "<punctuation>"; with every word of the prompt all columns together then hold every token once.
    Raises InputError for a wanted word that the prompt does not have or that is cut off, and for a prompt without
    words; UnsupportedModelError for a tokenizer without offsets or which pads on the left.
    """
    length = getattr(tokenizer, "model_max_length", 0)
    padded_right = getattr(tokenizer, "padding_side", "right") == "right" and length <= _LONGEST
    if not getattr(tokenizer, "is_fast", False) or not padded_right:
        raise UnsupportedModelError(
            f"{type(tokenizer).__name__} does not tell which characters a token stands for, or does not pad to a "
            "length of its own on the right; words are matched to tokens for tokenizers such as CLIP's"
        )
    offsets = tokenizer(prompt, truncation=False, verbose=False, return_offsets_mapping=True)["offset_mapping"]
    # A special token stands for no character.
    of_text = [position for position, (start, end) in enumerate(offsets) if end > start]
    starts = of_text[0] if of_text else 1
    ends = len(offsets) - starts - len(of_text)
    room = length - ends  # text tokens from this position on are cut off
    columns, cut_off, taken = [], [], set()
    for label, (start, end) in _labelled(_word_spans(prompt)):
        positions = [place for place in of_text if offsets[place][0] < end and offsets[place][1] > start]
        kept = tuple(place for place in positions if place < room)
        taken.update(kept)
        if len(kept) < len(positions):
            cut_off.append(label)
        if kept:
            columns.append(Column(label, kept))
    chosen = columns if wanted is None else _chosen(wanted, columns, cut_off, length)
    if special:
        text_end = min(starts + len(of_text), room)
        rest = {
            "<start>": range(starts),
            "<punctuation>": [place for place in of_text if place < room and place not in taken],
            "<end>": range(text_end, text_end + ends),
            "<padding>": range(text_end + ends, length),
        }
        chosen = [*chosen, *(Column(label, tuple(places)) for label, places in rest.items() if places)]
    if not chosen:
        raise InputError("the prompt has no words, so there are no maps of them; write a prompt, or ask for --special")
    return Words(tuple(chosen), tuple(cut_off), length)


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


def _chosen(wanted, columns, cut_off, length):
    """The columns of the wanted words, each once, in the order in which they were wanted."""
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
