"""Scenes of one to four coloured shapes: drawn at random, rendered, and captioned."""

from dataclasses import dataclass
from functools import cache
from itertools import permutations, product

import numpy as np

from surgery.recipes.shapes.scenes.vocabulary import COLOURS, OPPOSITE, PALETTE, SHAPES, noun, numbered, related

_SAMPLES = 6  # per pixel and direction


@cache
def coverage(shape, size):
    """(size, size) float32 in [0, 1], read-only: the shape, stretched to fill its box, anti-aliased."""
    steps = (np.arange(size * _SAMPLES) + 0.5) / (size * _SAMPLES)
    inside = _inside(shape, *np.meshgrid(steps, steps))
    # (size, samples, size, samples) -> (size, size)
    covered = inside.reshape(size, _SAMPLES, size, _SAMPLES).mean((1, 3), dtype=np.float32)
    covered.flags.writeable = False
    return covered


def _inside(shape, x, y):
    """Whether points of the unit box, y downwards, are in the shape."""
    if shape == "circle":
        return (x - 0.5) ** 2 + (y - 0.5) ** 2 <= 0.25
    if shape == "square":
        return np.ones_like(x, bool)
    if shape == "triangle":
        return np.abs(x - 0.5) <= y / 2
    if shape == "cross":
        return (np.abs(x - 0.5) <= 0.18) | (np.abs(y - 0.5) <= 0.18)
    return _inside_star(x, y)


def _inside_star(x, y):
    corner = np.arange(10)
    radius, angle = np.where(corner % 2 == 0, 1.0, 0.45), corner * np.pi / 5
    corners = np.stack([radius * np.sin(angle), -radius * np.cos(angle)], axis=1)
    corners = (corners - corners.min(0)) / np.ptp(corners, axis=0)
    inside = np.zeros_like(x, bool)
    # A point is inside where a ray to its right crosses the outline an odd number of times.
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, 1, axis=0), strict=True):
        if ay != by:
            inside ^= ((ay > y) != (by > y)) & (x < (bx - ax) * (y - ay) / (by - ay) + ax)
    return inside


SIDE = 64  # pixels of an image
BACKGROUNDS = (190, 250)  # grey levels, both ends included
SIZES = {1: (18, 30), 2: (16, 24), 3: (15, 20), 4: (14, 18)}  # pixels of an object's box, by the number of objects
_MARGIN, _GAP = 2, 4  # pixels to the image's edge and between two objects
_KINDS = {"one": 0.22, "same": 0.23, "two": 0.40, "three": 0.15}


@dataclass(frozen=True)
class Drawn:
    """One object of a scene: x and y are the left and upper edge of its square box in pixels, size the box's side."""

    colour: str
    shape: str
    x: int
    y: int
    size: int


@dataclass(frozen=True)
class Scene:
    """Objects on a plain background, a grey level from 0 to 255."""

    objects: tuple[Drawn, ...]
    background: int


@dataclass(frozen=True)
class HeldOut:
    """What a model is not trained on, so that it can be asked for it later.

    pairs: (colour, shape), in no scene. relations: (shape, relation, shape), in no scene of two objects, nor its
    converse.
    """

    pairs: frozenset[tuple[str, str]] = frozenset()
    relations: frozenset[tuple[str, str, str]] = frozenset()


def _a_third_of_the_pairs_and_of_the_relations():
    """13 of the 40 pairs and 16 of the 40 relations of two unlike shapes, spread evenly.

    Every colour keeps at least three shapes and every shape five colours; of the four ways in which two shapes can be
    placed, at least two remain.
    """
    pairs = {
        (colour, shape)
        for (i, colour), (j, shape) in product(enumerate(COLOURS), enumerate(SHAPES))
        if (i + j) % 3 == 0
    }
    relations = {
        (first, relation, second)
        for ((i, first), (j, second)), (number, relation) in product(
            permutations(enumerate(SHAPES), 2), enumerate(("left", "above"), start=1)
        )
        if (i - j + number) % 3 == 0
    }
    return HeldOut(frozenset(pairs), frozenset(relations))


# What the pipeline of recipes/shapes was not trained on.
SHIPPED_HELD_OUT = _a_third_of_the_pairs_and_of_the_relations()


def render(objects, background):
    """(64, 64, 3) uint8: the objects, anti-aliased, on a grey background; a later object covers an earlier one."""
    image = np.full((SIDE, SIDE, 3), background, np.float32)
    for drawn in objects:
        box = (slice(drawn.y, drawn.y + drawn.size), slice(drawn.x, drawn.x + drawn.size))
        covered = coverage(drawn.shape, drawn.size)[..., None]
        image[box] += covered * (np.array(PALETTE[drawn.colour], np.float32) - image[box])
    return image.round().astype(np.uint8)


def sample_scene(random, held_out=HeldOut()):
    """A Scene drawn from a numpy Generator, with nothing in it that is held out.

    One object; two to four of one shape, mostly of one colour; two different objects; or three different shapes.
    """
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in held_out.pairs]
    kinds = _kinds(random, pairs)
    while True:
        scene = Scene(place(random, kinds), int(random.integers(BACKGROUNDS[0], BACKGROUNDS[1] + 1)))
        if len(kinds) != 2 or not _has_held_out_relation(scene.objects, held_out.relations):
            return scene


def place(random, kinds):
    """Drawn objects of these (colour, shape), at random places, apart from each other and from the image's edge."""
    smallest, largest = SIZES[len(kinds)]
    while True:
        boxes = []
        for _ in range(30 * len(kinds)):
            size = int(random.integers(smallest, largest + 1))
            x, y = (int(edge) for edge in random.integers(_MARGIN, SIDE - _MARGIN - size + 1, 2))
            if all(_apart((x, y, size), other) for other in boxes):
                boxes.append((x, y, size))
            if len(boxes) == len(kinds):
                return tuple(Drawn(*kind, *box) for kind, box in zip(kinds, boxes, strict=True))


def relation_of(first, second):
    """What the first of two Drawn plainly is to the second: "left", "right", "above", "below"; None if neither."""
    across = (first.x + first.size / 2) - (second.x + second.size / 2)
    down = (first.y + first.size / 2) - (second.y + second.size / 2)
    if abs(across) > max(12, 1.4 * abs(down)):
        return "left" if across < 0 else "right"
    if abs(down) > max(12, 1.4 * abs(across)):
        return "above" if down < 0 else "below"
    return None


def captions(scene):
    """Every caption of a scene, in the wordings that the pipeline is trained on, each once.

    None for what these wordings cannot say: more than three objects of several shapes, or two alike beside another.
    """
    kinds = [(drawn.colour, drawn.shape) for drawn in scene.objects]
    colours, shapes = ({kind[part] for kind in kinds} for part in (0, 1))
    found = []
    if len(kinds) > 1 and len(shapes) == 1:
        found.append(numbered(len(kinds), None, kinds[0][1]))
        if len(colours) == 1:
            found.append(numbered(len(kinds), *kinds[0]))
    if len(set(kinds)) == len(kinds) <= 3:
        found += _lists(kinds)
        if len(shapes) == len(kinds):
            found += _lists([(None, shape) for _, shape in kinds])
    if len(kinds) == 2 and len(set(kinds)) == 2 and relation_of(*scene.objects):
        found += _relations(kinds, relation_of(*scene.objects))
        if len(shapes) == 2:
            found += _relations([(None, shape) for _, shape in kinds], relation_of(*scene.objects))
    return found


def _lists(kinds):
    """ "a, b and c" in every order."""
    lists = []
    for order in permutations(kinds):
        *others, last = (noun(*kind) for kind in order)
        lists.append(f"{', '.join(others)} and {last}" if others else last)
    return lists


def _relations(kinds, relation):
    first, second = kinds
    return [related(first, relation, second), related(second, OPPOSITE[relation], first)]


def _kinds(random, pairs):
    """The (colour, shape) of each object of a scene to be."""

    def draw(allowed):
        return allowed[int(random.integers(len(allowed)))]

    what = random.choice(list(_KINDS), p=list(_KINDS.values()))
    first = draw(pairs)
    if what == "one":
        return [first]
    if what == "same":
        count = int(random.integers(2, 5))
        if random.random() < 0.7:
            return [first] * count
        return [draw([pair for pair in pairs if pair[1] == first[1]]) for _ in range(count)]
    if what == "two":
        return [first, draw([pair for pair in pairs if pair != first])]
    second = draw([pair for pair in pairs if pair[1] != first[1]])
    return [first, second, draw([pair for pair in pairs if pair[1] not in (first[1], second[1])])]


def _has_held_out_relation(objects, relations):
    first, second = objects
    relation = relation_of(first, second)
    if relation is None:
        return False
    ways = {(first.shape, relation, second.shape), (second.shape, OPPOSITE[relation], first.shape)}
    return bool(ways & relations)


def _apart(box, other):
    """Whether two (x, y, size) boxes leave the gap between them."""
    (x, y, size), (other_x, other_y, other_size) = box, other
    beside = x + size + _GAP <= other_x or other_x + other_size + _GAP <= x
    return beside or y + size + _GAP <= other_y or other_y + other_size + _GAP <= y
