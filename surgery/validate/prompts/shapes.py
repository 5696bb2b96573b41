"""The shapes prompts: GenEval's six kinds of question, in the words that the pipeline of recipes/shapes knows."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from itertools import permutations, product
from typing import Any

from surgery.recipes.shapes.scenes.scenes import SHIPPED_HELD_OUT, HeldOut
from surgery.recipes.shapes.scenes.vocabulary import (
    COLOURS,
    NUMBERS,
    OPPOSITE,
    RELATIONS,
    SHAPES,
    noun,
    numbered,
    related,
)

from .files import Prompt, PromptSet

CATEGORIES = ("single", "two_objects", "counting", "colours", "position", "colour_attribution")


HALVES = ("shapes-dev", "shapes-test")
_HELD_OUT_SHARE = 0.4  # of the prompts of a half's category, where something of it is held out


def shapes_prompts(per_category: int = 200, seed: int = 0) -> PromptSet:
    """The PromptSet "shapes": `per_category` prompts of each of CATEGORIES, one category after another.

    facts are what `is_satisfied` judges by. A category repeats a text only when it has no other left: there are 5
    single, 20 two_objects, 135 counting, 40 colours, 4560 position and 1120 colour_attribution texts, so that the
    repeats of a text are to be drawn from different seeds. Of position, the 80 without a colour come first.
    """
    prompts = []
    for category in CATEGORIES:
        prompts += _drawn(_prompts(category), per_category, seed)
    return PromptSet("shapes", tuple(prompts))


def half_of_the_prompts(
    name: str, per_category: int = 200, seed: int = 0, held_out: HeldOut = SHIPPED_HELD_OUT
) -> PromptSet:
    """The PromptSet "shapes-dev", to choose a setting with, or "shapes-test", to judge the choice by.

    No text is in both. Of every category that has compositions that are held out, two prompts in five are such, under
    the category "..., held out", so that these and the others are the same mix; else as `shapes_prompts`.
    """
    prompts = []
    for category in CATEGORIES:
        tiers = [_every_other(tier, HALVES.index(name), seed) for tier in _prompts(category)]
        unseen = [
            [replace(one, category=f"{category}, held out") for one in tier if is_held_out(one.facts, held_out)]
            for tier in tiers
        ]
        others = [[one for one in tier if not is_held_out(one.facts, held_out)] for tier in tiers]
        number = round(_HELD_OUT_SHARE * per_category) if any(unseen) else 0
        prompts += _drawn(unseen, number, seed) + _drawn(others, per_category - number, seed)
    return PromptSet(name, tuple(prompts))


def is_held_out(facts: Mapping[str, Any], held_out: HeldOut = SHIPPED_HELD_OUT) -> bool | None:
    """Whether a model with that held out has never seen what the facts ask for: a pair of colour and shape, a relation.

    None where nothing of the kind could be: no colour is asked for and no relation.
    """
    kinds, relation = [tuple(kind) for kind in facts["objects"]], facts["relation"]
    if relation is None and not any(colour for colour, _ in kinds):
        return None
    if not held_out.pairs.isdisjoint(kinds):
        return True
    if relation is None:
        return False
    (_, first), (_, second) = kinds
    return not held_out.relations.isdisjoint({(first, relation, second), (second, OPPOSITE[relation], first)})


def _prompts(category):
    """Lists of Prompts: each that there is in a category, the lists that are used up first before."""
    return [[Prompt(text, category, facts) for text, facts in tier] for tier in _tiers(category)]


def _every_other(prompts, first, seed):
    """Of a shuffle of the prompts the first (0) or the second (1) of every two."""
    return sorted(prompts, key=lambda prompt: _lot(prompt.text, seed, "halves"))[first::2]


def _drawn(tiers, count, seed):
    """`count` prompts: all of the first tier in an order drawn from the seed, then of the next, and so round again."""
    drawn, rounds = [], 0
    while len(drawn) < count:
        for tier in tiers:
            drawn += sorted(tier, key=lambda prompt: _lot(prompt.text, seed, rounds))
        rounds += 1
    return drawn[:count]


def _lot(text, seed, rounds):
    """A text's place in a shuffle; unlike a random generator's, the same with every version of every library."""
    return hashlib.sha256(f"{seed} {rounds} {text}".encode()).digest()


def _tiers(category):
    """Lists of (text, facts): each prompt that there is in a category, the lists that are used up first before."""
    plain = [(None, shape) for shape in SHAPES]
    coloured = list(product(COLOURS, SHAPES))
    pairs = list(permutations(plain, 2))
    coloured_pairs = [pair for pair in permutations(coloured, 2) if _differ(*pair)]
    if category == "single":
        return [[(noun(*kind), _facts(kind)) for kind in plain]]
    if category == "two_objects":
        return [[(f"{noun(*first)} and {noun(*second)}", _facts(first, second)) for first, second in pairs]]
    if category == "counting":
        kinds = product(NUMBERS, plain + coloured)
        return [[(numbered(number, *kind), _facts(*[kind] * number)) for number, kind in kinds]]
    if category == "colours":
        return [[(noun(*kind), _facts(kind)) for kind in coloured]]
    if category == "position":
        return [
            [
                (related(first, relation, second), _facts(first, second, relation=relation))
                for (first, second), relation in product(some, RELATIONS)
            ]
            for some in (pairs, coloured_pairs)
        ]
    return [[(f"{noun(*first)} and {noun(*second)}", _facts(first, second)) for first, second in coloured_pairs]]


def _differ(first, second):
    """Whether two (colour, shape) have neither in common, so that colours which change places are seen."""
    return first[0] != second[0] and first[1] != second[1]


def _facts(*kinds, relation=None):
    return {"objects": [list(kind) for kind in kinds], "relation": relation}
