"""A prompt is met by images of what it says, and not by images that are wrong in one thing."""

import numpy as np
import pytest

from surgery.recipes.shapes.scenes import Found, detect, is_satisfied, render
from surgery.validate.prompts.shapes import shapes_prompts

from .wanted import right_scene, wrong_scenes


@pytest.fixture(scope="module")
def examples():
    """[(facts, whether the scene is right, what is wrong, Scene)] for 25 prompts of each category."""
    random = np.random.default_rng(7)
    rows = []
    for prompt in shapes_prompts(25, seed=3).prompts:
        rows.append((prompt.facts, True, "nothing", right_scene(prompt.facts, random)))
        rows += [(prompt.facts, False, *row) for row in wrong_scenes(prompt.facts, random).items()]
    return rows


def misjudged(examples, images):
    """(share of right scenes refused, share of wrong scenes accepted, what was wrong with these)."""
    verdicts = [is_satisfied(row[0], detect(image)) for row, image in zip(examples, images, strict=True)]
    right = [verdict for row, verdict in zip(examples, verdicts, strict=True) if row[1]]
    wrong = [verdict for row, verdict in zip(examples, verdicts, strict=True) if not row[1]]
    accepted = {row[2] for row, verdict in zip(examples, verdicts, strict=True) if verdict and not row[1]}
    return 1 - np.mean(right), np.mean(wrong), accepted


def test_near_misses_of_every_kind_are_tried(examples):
    assert {row[2] for row in examples} == {
        "nothing",
        "a wrong shape",
        "a wrong colour",
        "one too few",
        "one too many",
        "colours swapped",
        "relation swapped",
        "another relation",
    }


def test_rendered_scenes_are_judged_without_error(examples):
    refused, accepted, kinds = misjudged(examples, [render(row[3].objects, row[3].background) for row in examples])
    assert refused == 0 and accepted == 0, kinds


def test_reconstructed_scenes_are_judged_right_but_for_1_in_100(examples, reconstruct):
    some = examples[::4]
    refused, accepted, kinds = misjudged(some, reconstruct([render(row[3].objects, row[3].background) for row in some]))
    assert refused <= 0.01 and accepted <= 0.01, kinds


STAR, RED_STAR, RED_CROSS, CROSS = [None, "star"], ["red", "star"], ["red", "cross"], [None, "cross"]


@pytest.mark.parametrize(
    ("asked", "relation", "there", "expected"),
    [
        ([RED_STAR], None, [RED_STAR], True),
        ([RED_STAR], None, [["blue", "star"]], False),
        ([RED_STAR], None, [[None, "star"]], False),  # of a colour that was not recognised
        ([RED_STAR], None, [["red", None]], False),
        ([RED_STAR], None, [RED_CROSS, RED_STAR, RED_STAR], True),  # more may be there
        ([RED_STAR], None, [], False),
        ([RED_STAR] * 2, None, [RED_STAR] * 2, True),
        ([RED_STAR] * 2, None, [RED_STAR] * 3, False),
        ([RED_STAR] * 2, None, [RED_STAR], False),
        ([RED_STAR] * 2, None, [RED_STAR, RED_STAR, RED_CROSS, ["blue", "star"]], True),
        ([STAR, CROSS], None, [["blue", "star"], RED_CROSS], True),
        ([STAR, RED_STAR], None, [RED_STAR], False),  # one object cannot be both
        ([STAR, CROSS], "left", [RED_STAR, RED_CROSS], True),
        ([STAR, CROSS], "left", [RED_CROSS, RED_STAR], False),
        ([STAR, CROSS], "right", [RED_CROSS, RED_STAR], True),
        ([STAR, CROSS], "above", [RED_STAR, RED_CROSS], False),
        ([RED_STAR, CROSS], "left", [["blue", "star"], RED_CROSS, RED_STAR], False),  # the red star is right of it
    ],
)
def test_a_prompt_is_met_by_what_it_says(asked, relation, there, expected):
    found = [Found(colour, shape, 10.0 + 15 * index, 30.0) for index, (colour, shape) in enumerate(there)]
    assert is_satisfied({"objects": asked, "relation": relation}, found) is expected


@pytest.mark.parametrize(
    ("right", "down", "relations"),
    [
        (20, 0, {"right"}),
        (-20, 8, {"left"}),
        (4, 20, {"below"}),
        (0, -20, {"above"}),
        (20, -20, {"right", "above"}),
        (3, 3, set()),
    ],
)
def test_a_relation_holds_where_one_is_plainly_beside_the_other(right, down, relations):
    found = [Found("red", "star", 32.0 + right, 32.0 + down), Found("red", "cross", 32.0, 32.0)]
    held = {
        relation
        for relation in ("left", "right", "above", "below")
        if is_satisfied({"objects": [STAR, CROSS], "relation": relation}, found)
    }
    assert held == relations
