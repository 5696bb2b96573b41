"""Scenes: what can be in them, what is held out of them, how they are drawn and what is said of them."""

from collections import Counter
from itertools import combinations, product

import numpy as np
import pytest

from surgery.recipes.shapes.scenes import SHIPPED_HELD_OUT, Drawn, HeldOut, Scene, captions, render, sample_scene
from surgery.recipes.shapes.scenes.scenes import SIZES, relation_of
from surgery.recipes.shapes.scenes.vocabulary import COLOURS, PALETTE, SHAPES

NOTHING = HeldOut()


def scenes(count, held_out=NOTHING, seed=0):
    random = np.random.default_rng(seed)
    return [sample_scene(random, held_out) for _ in range(count)]


def pairs_of(some):
    return {(drawn.colour, drawn.shape) for scene in some for drawn in scene.objects}


def test_scenes_have_one_to_four_objects_of_every_colour_and_shape_apart_and_inside():
    some = scenes(600)
    assert pairs_of(some) == set(product(COLOURS, SHAPES))
    assert Counter(len(scene.objects) for scene in some).keys() == SIZES.keys()
    for scene in some:
        assert 190 <= scene.background <= 250
        smallest, largest = SIZES[len(scene.objects)]
        for drawn in scene.objects:
            assert smallest <= drawn.size <= largest
            assert min(drawn.x, drawn.y) >= 2 and max(drawn.x, drawn.y) + drawn.size <= 62
        for one, other in combinations(scene.objects, 2):
            gaps = [
                max(getattr(b, axis) - getattr(a, axis) - a.size for a, b in ((one, other), (other, one)))
                for axis in "xy"
            ]
            assert max(gaps) >= 4


def test_a_seed_gives_the_same_scenes_and_another_seed_others():
    assert scenes(20, seed=1) == scenes(20, seed=1) != scenes(20, seed=2)


def test_what_is_held_out_is_in_no_scene_and_what_is_not_still_is():
    some = scenes(600, SHIPPED_HELD_OUT)
    assert pairs_of(some) == set(product(COLOURS, SHAPES)) - SHIPPED_HELD_OUT.pairs
    relations = {
        (one.shape, relation_of(one, other), other.shape)
        for scene in some
        if len(scene.objects) == 2
        for one, other in (scene.objects, scene.objects[::-1])
    }
    assert not relations & SHIPPED_HELD_OUT.relations
    assert ("triangle", "above", "circle") in relations  # the other way round is another relation


def test_a_third_of_pairs_and_relations_is_held_out_evenly():
    pairs, relations = SHIPPED_HELD_OUT.pairs, SHIPPED_HELD_OUT.relations
    assert 0.3 <= len(pairs) / 40 <= 0.5 and 0.3 <= len(relations) / 40 <= 0.5
    for place, words in ((0, COLOURS), (1, SHAPES)):
        kept = Counter(pair[place] for pair in set(product(COLOURS, SHAPES)) - pairs)
        assert set(kept) == set(words) and max(kept.values()) - min(kept.values()) <= 1
    # Told one way only, left and above, so that none is counted twice; two of the four ways of a pair at most.
    assert Counter(relation for _, relation, _ in relations) == {"left": 8, "above": 8}
    assert max(Counter(frozenset((one, other)) for one, _, other in relations).values()) == 2


def test_an_image_has_the_palette_inside_and_the_background_around():
    image = render([Drawn("purple", "square", 10, 20, 16)], 200)
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    assert (image[20:36, 10:26] == PALETTE["purple"]).all()
    image[20:36, 10:26] = 200
    assert (image == 200).all()


@pytest.mark.parametrize(("shape", "share"), [("circle", 0.785), ("triangle", 0.5), ("cross", 0.59), ("star", 0.385)])
def test_a_shape_covers_its_share_of_its_box_symmetrically(shape, share):
    covered = (200 - render([Drawn("black", shape, 10, 10, 30)], 200)[10:40, 10:40, 0].astype(float)) / 175
    assert covered.mean() == pytest.approx(share, abs=0.01)
    assert np.abs(covered - covered[:, ::-1]).max() < 0.01


def test_every_true_caption_is_given_once_and_no_other():
    left, right = Drawn("red", "circle", 4, 20, 16), Drawn("orange", "star", 40, 22, 16)
    assert captions(Scene((left,), 200)) == ["a red circle", "a circle"]
    assert captions(Scene((left, right), 200)) == [
        "a red circle and an orange star",
        "an orange star and a red circle",
        "a circle and a star",
        "a star and a circle",
        "a red circle to the left of an orange star",
        "an orange star to the right of a red circle",
        "a circle to the left of a star",
        "a star to the right of a circle",
    ]
    assert captions(Scene((left, Drawn("red", "circle", 40, 20, 16)), 200)) == ["two circles", "two red circles"]
    assert captions(Scene((left, Drawn("blue", "circle", 24, 40, 16)), 200)) == [
        "two circles",
        "a red circle and a blue circle",
        "a blue circle and a red circle",
    ]
    three = captions(Scene((left, right, Drawn("cyan", "cross", 20, 44, 16)), 200))
    assert len(three) == len(set(three)) == 12
    assert {"a cyan cross, a red circle and an orange star", "a circle, a star and a cross"} <= set(three)


def test_every_scene_has_captions():
    assert all(captions(scene) for scene in scenes(300))
