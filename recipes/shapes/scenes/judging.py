"""Whether the objects found in an image are what a prompt asks for, in the manner of GenEval.

Ghosh et al. 2023 (arXiv 2310.11513; repository djghosh13/geneval, evaluation/evaluate_images.py): what is named must be
there, and more may be; only where a number is asked for must it be that number.
"""

from collections import Counter
from itertools import permutations

from surgery.recipes.shapes.scenes.vocabulary import COLOURS, RELATIONS, SHAPES

_NEAREST = 4  # pixels between two centres, for one to be beside the other
_SLANT = 0.8  # how far, for each pixel that they are apart across the relation, they must be apart along it


def is_satisfied(facts, found):
    """Whether the Found objects of an image are what a prompt's facts ask for.

    facts: {"objects": [[colour or None for any, shape], ...], "relation": None, or "left", "right", "above" or "below"
    of the first object to the second}. A kind that is named more than once must be there exactly so often.
    """
    asked = [tuple(kind) for kind in facts["objects"]]
    for kind, number in Counter(asked).items():
        if number > 1 and sum(_is(kind, one) for one in found) != number:
            return False
    candidates = [one for one in found if any(_is(kind, one) for kind in asked)]
    return any(
        all(_is(kind, one) for kind, one in zip(asked, chosen, strict=True)) and _related(chosen, facts["relation"])
        for chosen in permutations(candidates, len(asked))
    )


def problem_with(facts):
    """What a prompt's facts lack for `is_satisfied`, as words that follow "prompt ...", or None."""
    objects, relation = facts.get("objects"), facts.get("relation")
    if not isinstance(objects, list | tuple) or not objects:
        return "does not say which objects it asks for (`objects`)"
    for kind in objects:
        if not isinstance(kind, list | tuple) or len(kind) != 2:
            return f"has the object {kind!r}, which is not [colour or null, shape]"
        colour, shape = kind
        if colour not in (None, *COLOURS) or shape not in SHAPES:
            return f"asks for {colour} {shape}; colours are {', '.join(COLOURS)}, shapes {', '.join(SHAPES)}"
    if "relation" not in facts or relation not in (None, *RELATIONS):
        return f"has the `relation` {relation!r}, not null, {', '.join(RELATIONS)}"
    if relation and len(objects) != 2:
        return f"has a relation, but {len(objects)} objects instead of two"
    return None


def _is(kind, found):
    colour, shape = kind
    return found.shape == shape and colour in (None, found.colour)


def _related(chosen, relation):
    if relation is None:
        return True
    first, second = chosen
    right, down = first.x - second.x, first.y - second.y
    along = {"left": -right, "right": right, "above": -down, "below": down}[relation]
    across = right if relation in ("above", "below") else down
    return along > max(_NEAREST, _SLANT * abs(across))
