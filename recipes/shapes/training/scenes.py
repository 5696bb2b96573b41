"""The scenes that the pipeline is shown, and what is said of them."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from surgery.recipes.shapes.scenes import SHIPPED_HELD_OUT, captions, render, sample_scene
from surgery.recipes.shapes.scenes.vocabulary import COLOURS, NUMBERS, OPPOSITE, PLURALS, RELATIONS, SHAPES

_SINGULAR = {plural: shape for shape, plural in PLURALS.items()} | {shape: shape for shape in SHAPES}
_NOTHING = (0, 0)
_TELLS_RELATION = 0.7
_NUMBERS = {word: number for number, word in NUMBERS.items()}


@dataclass(frozen=True)
class Scenes:
    """`count` scenes drawn from a seed, nothing held out in them; scene i is the same however many there are.

    Half of the scenes with one object are passed over: they are learned first.
    """

    count: int
    seed: int

    @cached_property
    def all(self):
        return [self._scene(number) for number in range(self.count)]

    def images(self, numbers):
        """(n, 3, 64, 64) float32 in [-1, 1]."""
        pixels = np.stack([render(self.all[i].objects, self.all[i].background) for i in numbers])
        return pixels.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1

    def _scene(self, number):
        random = np.random.default_rng([self.seed, number])
        while True:
            scene = sample_scene(random, SHIPPED_HELD_OUT)
            if len(scene.objects) > 1 or random.random() < 0.5:
                return scene


def caption_of(scene, random):
    """One of a scene's captions; where some tell a relation, more often one of those: it is what is learned last."""
    found = captions(scene)
    if random.random() < _TELLS_RELATION:
        found = [caption for caption in found if relation_in(caption)] or found
    return found[int(random.integers(len(found)))]


def relation_in(caption):
    """The relation that a caption tells, of `RELATIONS`; None if it tells none."""
    return next((relation for relation in RELATIONS if relation in caption.split()), None)


def facts_of(caption):
    """What a caption says, as the integers that `text.Heads` learns to read back from the text encoder's states.

    (16,): the number of objects, 0 to 3 for one to four; the relation, 0 for none; of the first three objects named the
    colour and the shape, 0 for none; and the same of what is said to be on the left, on the right, above and below.
    Objects that are numbered ("two stars") are named once.
    """
    named, number, colour = [], 1, 0
    for word in caption.replace(",", "").split():
        if word in COLOURS:
            colour = COLOURS.index(word) + 1
        elif word in _SINGULAR:
            named.append((colour, SHAPES.index(_SINGULAR[word]) + 1))
            colour = 0
        number = _NUMBERS.get(word, number)
    number = max(number, len(named))
    relation = relation_in(caption)
    there = dict(zip((relation, OPPOSITE[relation]), named, strict=True)) if relation else {}
    kinds = [*(*named, *[_NOTHING] * 3)[:3], *(there.get(place, _NOTHING) for place in RELATIONS)]
    return np.array([number - 1, [None, *RELATIONS].index(relation), *(part for kind in kinds for part in kind)])


def is_exchanged(number, share, seed):
    """Whether a noisy data set says of scene `number` what is true of another: of a `share` of all, always the same."""
    lot = hashlib.sha256(f"{seed} exchanged {number}".encode()).digest()
    return int.from_bytes(lot[:4]) < share * 2**32
