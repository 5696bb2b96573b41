"""Scenes that are what a prompt's facts ask for, and scenes that just fail to be."""

from surgery.recipes.shapes.scenes.scenes import Scene, place, relation_of
from surgery.recipes.shapes.scenes.vocabulary import COLOURS, OPPOSITE, SHAPES


def right_scene(facts, random):
    """A Scene of exactly what the facts ask for, in colours drawn at random where they name none."""
    kinds = [(colour or _other(random, COLOURS), shape) for colour, shape in facts["objects"]]
    return _scene(kinds, facts["relation"], random)


def wrong_scenes(facts, random):
    """{what is wrong: Scene}, each as `right_scene` but for one thing."""
    relation = facts["relation"]
    right = [(drawn.colour, drawn.shape) for drawn in right_scene(facts, random).objects]
    (colour, shape), *others = right
    shapes = [kind[1] for kind in right]
    wrong = {"a wrong shape": ([(colour, _other(random, SHAPES, shapes)), *others], relation)}
    if facts["objects"][0][0]:
        wrong["a wrong colour"] = ([(_other(random, COLOURS, [colour]), shape), *others], relation)
    if others:
        wrong["one too few"] = (others, None)
    if others and len(set(shapes)) == 1 and len(right) < 4:
        wrong["one too many"] = ([right[0], *right], None)
    if len(set(shapes)) == 2 and facts["objects"][0][0]:
        (other_colour, other_shape) = right[1]
        wrong["colours swapped"] = ([(other_colour, shape), (colour, other_shape)], relation)
    if relation:
        wrong["relation swapped"] = (right, OPPOSITE[relation])
        wrong["another relation"] = (right, _other(random, list(OPPOSITE), [relation, OPPOSITE[relation]]))
    return {what: _scene(kinds, relation, random) for what, (kinds, relation) in wrong.items()}


def _scene(kinds, relation, random):
    while True:
        objects = place(random, kinds)
        if relation is None or relation_of(*objects) == relation:
            return Scene(objects, int(random.integers(190, 251)))


def _other(random, names, but=()):
    left = [name for name in names if name not in but]
    return left[int(random.integers(len(left)))]
