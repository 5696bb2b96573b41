"""The scorer behind the README's alignment figures: it finds what was drawn, and says when a prompt is not met."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from shapes_scenes import PALETTE, Found, Prompt, _templates, detect, is_satisfied, make_prompts

TEMPLATES = {shape: masks[0] for shape, masks in _templates().items()}  # 32 x 32, sharp


def scene(*objects):
    """An image of (colour, shape, left, top) objects of 16 pixels."""
    image = np.full((64, 64, 3), 220, np.uint8)
    for colour, shape, left, top in objects:
        image[top : top + 16, left : left + 16][TEMPLATES[shape][::2, ::2]] = PALETTE[colour]
    return image


@pytest.mark.parametrize("colour", PALETTE)
@pytest.mark.parametrize("shape", TEMPLATES)
def test_every_colour_and_shape_is_found_where_it_is(colour, shape):
    (found,) = detect(scene((colour, shape, 30, 10)))
    assert (found.colour, found.shape) == (colour, shape)
    assert abs(found.x - 37.5) < 3 and abs(found.y - 17.5) < 3


def test_touching_objects_of_two_colours_are_two():
    found = detect(scene(("red", "square", 10, 20), ("blue", "square", 26, 20)))
    assert {(f.colour, f.shape) for f in found} == {("red", "square"), ("blue", "square")}


def test_an_empty_image_and_an_unknown_blob():
    assert detect(scene()) == []
    image = scene()
    image[10:14, 5:60] = (220, 40, 40)  # a bar is none of the shapes
    assert [f.shape for f in detect(image)] == [None]


@pytest.mark.parametrize(
    ("objects", "prompt", "expected"),
    [
        ([("red", "star")], Prompt("colour", "", (("red", "star"),)), True),
        ([("blue", "star")], Prompt("colour", "", (("red", "star"),)), False),
        ([("red", "star")] * 3, Prompt("counting", "", (("red", "star"),) * 2), False),
        ([("red", "star")] * 2, Prompt("counting", "", (("red", "star"),) * 2), True),
        ([("red", "star")], Prompt("two_objects", "", ((None, "star"), (None, "star"))), False),
        ([("red", "star"), ("red", "cross")], Prompt("position", "", ((None, "star"), (None, "cross")), "left"), True),
        ([("red", "cross"), ("red", "star")], Prompt("position", "", ((None, "star"), (None, "cross")), "left"), False),
        (
            [("red", "star"), ("red", "cross")],
            Prompt("position", "", ((None, "star"), (None, "cross")), "above"),
            False,
        ),
    ],
)
def test_a_prompt_is_met_by_what_it_says_only(objects, prompt, expected):
    found = [Found(colour, shape, 10.0 + 20 * index, 30.0) for index, (colour, shape) in enumerate(objects)]
    assert is_satisfied(prompt, found) is expected


def test_prompts_come_from_their_seed():
    assert make_prompts(8, seed=1) == make_prompts(8, seed=1) != make_prompts(8, seed=2)
    assert len({prompt.category for prompt in make_prompts(1)}) == 6
