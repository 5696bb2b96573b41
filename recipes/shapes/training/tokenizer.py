"""A CLIP tokenizer that needs no download: byte-level merges make one token of each word of the captions."""

import itertools
from collections import Counter

from transformers import CLIPTokenizer

from surgery.recipes.shapes.scenes.vocabulary import COLOURS, NUMBERS, PLURALS, RELATIONS, SHAPES

LENGTH = 77  # tokens of a prompt, padding included, as CLIP's
_GLUE = ("a", "an", "and", "of", "to", "the", "one", ",", ".")


def words():
    """Every word of the captions, each once."""
    relations = (word for relation in RELATIONS.values() for word in relation.split())
    return list(dict.fromkeys([*_GLUE, *relations, *NUMBERS.values(), *COLOURS, *SHAPES, *PLURALS.values()]))


def shapes_tokenizer():
    """The CLIPTokenizer; other words than `words()` come apart into bytes or pieces."""
    letters = list(_byte_letters().values())
    merges = _merges(words())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(left + right for left, right in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


def _byte_letters():
    """byte -> the letter that stands for it in a byte-level vocabulary (GPT-2's way: a printable byte is its own)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _merges(vocabulary):
    """Byte-pair merges, most frequent first, until every word is one token."""
    spelled = {word: [*word[:-1], word[-1] + "</w>"] for word in vocabulary}
    merges = []
    while pairs := Counter(pair for parts in spelled.values() for pair in itertools.pairwise(parts)):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        spelled = {word: _merged(parts, best) for word, parts in spelled.items()}
    return merges


def _merged(parts, pair):
    merged = []
    for part in parts:
        if merged and (merged[-1], part) == pair and not merged[-1].endswith("</w>"):
            merged[-1] += part
        else:
            merged.append(part)
    return merged
