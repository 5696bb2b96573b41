"""Which keys of a model the words of a prompt became: the columns of an attention map."""

from collections.abc import Sequence
from typing import Any

from surgery.errors import InputError, UnsupportedModelError
from surgery.models.encoded import Encoded

from .words import Column, Words, chosen_words, labelled_words

_SPECIAL = ("<start>", "<punctuation>", "<end>", "<padding>")


def words_of(
    encoded: Sequence[Encoded], length: int, prompt: str, wanted: Sequence[str] | None = None, special: bool = False
) -> Words:
    """The Words of a prompt among `length` keys: a column for each word in its order, or for each of `wanted`.

    A word's tokens are those that the tokenizer made of its characters, by the tokenizer's own offsets; where several
    encoders read the prompt, those of each. special: further columns for "<start>" and "<end>", what a template puts
    around the prompt included, "<padding>" and, where there is any, "<punctuation>"; with every word of the prompt all
    columns together then hold every key once.
    Raises InputError for words as `chosen_words` does and for a prompt without words; UnsupportedModelError where a
    tokenizer does not tell which characters a token stands for, or a pipeline gave its encoder another prompt.
    """
    words = labelled_words(prompt)
    keys: dict[str, list[int]] = {label: [] for label in [label for label, _ in words] + list(_SPECIAL)}
    whole = set()
    for one in encoded:
        kinds, complete = _kinds(one, prompt, words)
        whole |= complete
        for place, key in one.keys.items():
            keys[kinds[place]].append(key)
    taken = {key for found in keys.values() for key in found}
    keys["<padding>"] = sorted({*keys["<padding>"], *range(length)} - (taken - set(keys["<padding>"])))
    cut_off = tuple(label for label, _ in words if label not in whole)
    columns = [Column(label, tuple(sorted(keys[label]))) for label, _ in words if keys[label]]
    chosen = columns if wanted is None else chosen_words(wanted, columns, cut_off, length)
    if special:
        chosen = [*chosen, *(Column(label, tuple(sorted(keys[label]))) for label in _SPECIAL if keys[label])]
    if not chosen:
        raise InputError("the prompt has no words, so there are no maps of them; write a prompt, or ask for --special")
    return Words(tuple(chosen), cut_off, length)


def _kinds(one, prompt, words):
    """([label of each token], {words that have all their tokens})."""
    start, offsets, read = prompt_tokens(one.tokenizer, one.ids, prompt)
    kinds = ["<start>"] * start + ["<punctuation>"] * read + ["<end>"] * (len(one.ids) - start - read)
    _mark_padding(kinds, one, start, start + read)
    complete = set()
    for label, (begin, end) in words:
        own = [at for at, (first, last) in enumerate(offsets) if first < end and last > begin]
        kept = [start + at for at in own if at < read and start + at in one.keys]
        for place in kept:
            kinds[place] = label
        if own and len(kept) == len(own):
            complete.add(label)
    return kinds, complete


def prompt_tokens(tokenizer: Any, ids: Sequence[int], prompt: str) -> tuple[int, list[tuple[int, int]], int]:
    """(where the prompt's tokens begin among `ids`, the characters of each of them, how many of them are there).

    They are fewer than the prompt has where the end was cut off. Raises UnsupportedModelError where they are not there.
    """
    ids, found = list(ids), (0, 0, [])
    for text in dict.fromkeys((prompt, prompt.lower())):  # PixArt's pipeline writes it small
        own, offsets = _tokens(tokenizer, text)
        if not own:  # an empty prompt
            return int(ids[:1] == [tokenizer.bos_token_id]), [], 0
        for start in range(len(ids)):
            if (read := _run(ids, start, own)) > found[0]:
                found = read, start, offsets
        for start in range(1, len(ids)):  # behind a template a first token may be another, without its space
            if (read := 1 + _run(ids, start, own[1:])) > max(found[0], 1):
                found = read, start - 1, offsets
    read, start, offsets = found
    behind = ids[start + read : start + read + 1]
    if not read or (read < len(offsets) and behind and behind[0] not in tokenizer.all_special_ids):
        raise UnsupportedModelError(
            f"the prompt's tokens are not among those that {type(tokenizer).__name__} was asked for, so its words have "
            "no maps"
        )
    return start, offsets, read


def _tokens(tokenizer, text):
    """([id], [(first character, behind the last)]) of a text's tokens, special ones left out."""
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedModelError(f"{type(tokenizer).__name__} does not tell which characters a token stands for")
    made = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False, return_offsets_mapping=True)
    return list(made["input_ids"]), [tuple(pair) for pair in made["offset_mapping"]]


def _run(ids, start, own):
    """How many of `own` stand in `ids` from a place on."""
    read = 0
    while read < len(own) and ids[start + read : start + read + 1] == own[read : read + 1]:
        read += 1
    return read


def _mark_padding(kinds, one, start, end):
    """Name the padding on either side of the prompt; where the end's own token pads, the first one is the end."""
    pad, ids = one.tokenizer.pad_token_id, one.ids
    first = 0
    while first < start and ids[first] == pad:
        kinds[first] = "<padding>"
        first += 1
    last = len(ids)
    while last > end and ids[last - 1] == pad:
        last -= 1
    if pad == one.tokenizer.eos_token_id and last == end:
        last += 1
    kinds[max(last, end) :] = ["<padding>"] * (len(ids) - max(last, end))
