"""The detector finds what was drawn, in clean images and in what the autoencoder makes of them."""

from collections import Counter
from itertools import product

import numpy as np
import pytest

from surgery.recipes.shapes.scenes import Drawn, detect, render, sample_scene
from surgery.recipes.shapes.scenes.vocabulary import COLOURS, SHAPES


@pytest.fixture(scope="module")
def scenes():
    random = np.random.default_rng(2024)
    return [sample_scene(random) for _ in range(1000)]


def share_right(scenes, images):
    """The share of images in which exactly the scene's (colour, shape) are found."""
    right = [
        Counter((drawn.colour, drawn.shape) for drawn in scene.objects)
        == Counter((found.colour, found.shape) for found in detect(image))
        for scene, image in zip(scenes, images, strict=True)
    ]
    return np.mean(right)


def test_it_is_right_on_995_in_1000_rendered_scenes(scenes):
    images = [render(scene.objects, scene.background) for scene in scenes]
    assert share_right(scenes, images) >= 0.995


def test_it_is_right_on_97_in_100_reconstructions(scenes, reconstruct):
    some = scenes[:300]
    images = reconstruct([render(scene.objects, scene.background) for scene in some])
    assert share_right(some, images) >= 0.97


def test_the_smallest_stars_of_every_colour_survive_the_autoencoder_as_stars(reconstruct):
    places = [(4, 6), (40, 9), (7, 42), (41, 40)]
    images = [render([Drawn(colour, "star", x, y, 14) for x, y in places], 225) for colour in COLOURS]
    found = [one.shape for image in reconstruct(images) for one in detect(image)]
    assert len(found) == 4 * len(COLOURS)
    assert found.count("star") >= 0.95 * len(found)


def test_the_smallest_circles_of_every_colour_survive_it_as_circles(reconstruct):
    images = [render([Drawn(colour, "circle", x, x + 3, 14) for x in (4, 40)], 225) for colour in COLOURS]
    found = [one.shape for image in reconstruct(images) for one in detect(image)]
    assert found == ["circle"] * (2 * len(COLOURS))


@pytest.mark.parametrize(("colour", "shape"), product(COLOURS, SHAPES))
def test_every_colour_and_shape_is_found_where_it_is(colour, shape):
    (found,) = detect(render([Drawn(colour, shape, 30, 10, 16)], 220))
    assert (found.colour, found.shape) == (colour, shape)
    assert found.x == pytest.approx(37.5, abs=0.5)
    assert found.y == pytest.approx(17.5 + (2.5 if shape == "triangle" else 0), abs=1)  # its centroid is lower


def test_the_same_image_gives_the_same_objects():
    image = render([Drawn("red", "star", 5, 5, 14), Drawn("blue", "cross", 40, 30, 18)], 230)
    assert detect(image) == detect(image.copy())


def test_touching_objects_of_two_colours_are_two():
    image = render([Drawn("yellow", "square", 10, 20, 16), Drawn("green", "star", 24, 30, 16)], 220)
    assert {(found.colour, found.shape) for found in detect(image)} == {("yellow", "square"), ("green", "star")}


def test_touching_objects_of_one_colour_are_no_known_shape():
    image = render([Drawn("red", "square", 10, 20, 16), Drawn("red", "square", 24, 26, 16)], 220)
    assert [(found.colour, found.shape) for found in detect(image)] == [("red", None)]


def test_an_object_that_is_half_one_colour_and_half_another_keeps_its_shape():
    image = render([Drawn("orange", "star", 20, 20, 24)], 220)
    image[:, 32:] = render([Drawn("yellow", "star", 20, 20, 24)], 220)[:, 32:]
    (found,) = detect(image)
    assert found.shape == "star" and found.colour in ("orange", "yellow")


def test_an_empty_image_has_no_objects():
    assert detect(np.full((64, 64, 3), 220, np.uint8)) == []
    assert detect(np.zeros((64, 64, 3), np.uint8)) == []


@pytest.mark.parametrize("box", [(10, 14, 5, 60), (20, 48, 20, 32)])
def test_a_bar_is_no_known_shape(box):
    image = np.full((64, 64, 3), 220, np.uint8)
    top, bottom, left, right = box
    image[top:bottom, left:right] = (220, 40, 40)
    assert [(found.colour, found.shape) for found in detect(image)] == [("red", None)]


def test_a_colour_far_from_the_palette_is_none():
    image = render([Drawn("red", "square", 20, 20, 20)], 220)
    image[20:40, 20:40] = (120, 120, 60)
    assert [(found.colour, found.shape) for found in detect(image)] == [(None, "square")]
