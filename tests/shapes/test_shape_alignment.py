"""The metric: 1 or 0 an image, and an error for what it cannot judge."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from surgery.errors import InputError
from surgery.recipes.shapes.scenes import render
from surgery.validate.metrics import metric_class
from surgery.validate.prompts import Prompt
from surgery.validate.prompts.shapes import shapes_prompts

from .wanted import right_scene, wrong_scenes


@pytest.fixture
def metric():
    return metric_class("shape_alignment")({}, "cpu")


def picture(scene):
    return Image.fromarray(render(scene.objects, scene.background))


def test_it_is_a_score_that_needs_no_checkpoint(metric):
    assert (metric.info.name, metric.info.kind, metric.info.checkpoints) == ("shape_alignment", "score", {})
    assert metric.info.higher_is_better


def test_right_images_score_1_and_wrong_ones_0(metric):
    random = np.random.default_rng(0)
    prompts = shapes_prompts(3).prompts
    right = [picture(right_scene(prompt.facts, random)) for prompt in prompts]
    wrong = [picture(next(iter(wrong_scenes(prompt.facts, random).values()))) for prompt in prompts]
    scores = metric.score(right + wrong, [*prompts, *prompts])
    assert scores.dtype == np.float64
    assert scores.tolist() == [1.0] * len(right) + [0.0] * len(wrong)


def test_an_image_of_another_size_is_refused_with_what_the_metric_is_for(metric):
    with pytest.raises(InputError, match="64x64 pixels, as the pipeline of recipes/shapes.*not 64x128"):
        metric.score([Image.new("RGB", (64, 128))], shapes_prompts(1).prompts[:1])


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({}, "does not say which objects"),
        ({"objects": [], "relation": None}, "does not say which objects"),
        ({"tag": "single_object", "include": [{"class": "bench", "count": 1}]}, "does not say which objects"),
        ({"objects": ["star"], "relation": None}, "not \\[colour or null, shape\\]"),
        ({"objects": [["pink", "star"]], "relation": None}, "asks for pink star"),
        ({"objects": [[None, "bench"]], "relation": None}, "asks for None bench"),
        ({"objects": [[None, "star"]]}, "relation"),
        ({"objects": [[None, "star"], [None, "cross"]], "relation": "beside"}, "'beside'"),
        ({"objects": [[None, "star"]], "relation": "left"}, "1 objects instead of two"),
    ],
)
def test_a_prompt_without_facts_to_judge_by_is_refused_with_what_the_metric_is_for(metric, facts, says):
    prompts = [Prompt("a photo of a bench", facts=facts)]
    with pytest.raises(InputError, match=says) as error:
        metric.check_prompts(prompts)
    assert "the pipeline of recipes/shapes" in str(error.value) and "prompts: shapes" in str(error.value)
    with pytest.raises(InputError, match=says):
        metric.score([Image.new("RGB", (64, 64))], prompts)


def test_prompts_are_made_and_the_metric_found_without_importing_scipy():
    code = (
        "import sys; from surgery.validate.prompts.shapes import shapes_prompts; from surgery.validate.metrics import "
        "metric_class; shapes_prompts(); metric_class('shape_alignment'); sys.exit('scipy' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
