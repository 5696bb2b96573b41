"""The shapes prompts: GenEval's six kinds of question, in the words that the pipeline of recipes/shapes knows."""

import hashlib
from itertools import permutations, product

from surgery.validate.prompts.prompt import Prompt, PromptSet

from .vocabulary import COLOURS, NUMBERS, RELATIONS, SHAPES, noun, numbered, related

CATEGORIES = ("single", "two_objects", "counting", "colours", "position", "colour_attribution")


def shapes_prompts(per_category=200, seed=0):
    """The PromptSet "shapes": `per_category` prompts of each of CATEGORIES, one category after another.

    facts are what `is_satisfied` judges by. A category repeats a text only when it has no other left: there are 5
    single, 20 two_objects, 135 counting, 40 colours, 4560 position and 1120 colour_attribution texts, so that the
    repeats of a text are to be drawn from different seeds. Of position, the 80 without a colour come first.
    """
    prompts = []
    for category in CATEGORIES:
        tiers = [[Prompt(text, category, facts) for text, facts in tier] for tier in _tiers(category)]
        prompts += _drawn(tiers, per_category, seed)
    return PromptSet("shapes", tuple(prompts))


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
