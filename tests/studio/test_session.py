"""Runs of a session: both sides, tuned or patched alike, told of, stopped, and unharmed by bad input."""

import errno
import os
import threading
import time

import numpy as np
import pytest

from surgery.errors import InputError, UnsupportedModelError
from surgery.models.patching import operations_of, patched_modules, read_hyperparameters
from surgery.studio.answers import Answers
from surgery.studio.screen import screen_of, sliders_of
from surgery.studio.session import Session
from surgery.studio.shown import word_sheet, words_in

from ..conftest import load_shapes
from .conftest import PROMPT, QUICK


def drawn(session, opened, **values):
    """{side: {seed: array}} of a screen."""
    *_, last = session.draw(screen_of({**QUICK, **values}, opened))
    return {side: {seed: np.asarray(image) for seed, image in images.items()} for side, images in last.drawn.items()}


def test_it_tells_of_each_step_and_image(session, opened):
    told = list(session.draw(screen_of({**QUICK, "prompt": "two green stars", "images": 2}, opened)))
    steps = [one.step for one in told]
    assert steps == sorted(steps) and set(steps) == set(range(13)) and {one.steps for one in told} == {12}
    assert [one.done for one in told] == [False] * (len(told) - 1) + [True]
    assert {side: list(images) for side, images in told[-1].drawn.items()} == {"base": [0, 1], "patched": [0, 1]}
    assert told[0].text == "base, seed 0: step 0 of 3" and any(one.text.startswith("patched, seed 1") for one in told)


def test_the_base_is_the_base_and_is_drawn_once(session, opened):
    from surgery.runtime.draw import draw

    first = drawn(session, opened)
    [image] = draw(load_shapes(), [(PROMPT, 0)], {**opened.sampling, "steps": 3})
    assert np.array_equal(first["base"][0], np.asarray(image))
    told = list(session.draw(screen_of({**QUICK, "value.0.1": 2.0}, opened)))
    assert told[0].steps == 3 and told[0].text.startswith("patched")
    assert not np.array_equal(np.asarray(told[-1].drawn["patched"][0]), first["patched"][0])


def test_a_number_is_tuned_in_place_and_draws_as_when_patched_anew(session, opened):
    drawn(session, opened)
    before = patched_modules(opened.pipeline)
    tuned = drawn(session, opened, **{"value.0.1": 3.0})
    assert all(module is before[path] for path, module in patched_modules(opened.pipeline).items())
    assert {values["scale"] for values in read_hyperparameters(opened.pipeline).values()} == {3.0}
    drawn(session, opened, **{"layers.0": ["mid"]})
    assert len(patched_modules(opened.pipeline)) == 1
    anew = drawn(session, opened, **{"value.0.1": 3.0})
    assert np.array_equal(tuned["patched"][0], anew["patched"][0])


def test_closing_or_stopping_ends_the_run_and_the_next_one_is_whole(session, opened):
    whole = drawn(session, opened, prompt="a purple triangle")
    run = session.draw(screen_of({**QUICK, "prompt": "a yellow cross", "steps": 200}, opened))
    next(run)
    run.close()
    told = []
    for one in session.draw(screen_of({**QUICK, "prompt": "a yellow cross", "steps": 200}, opened), "page"):
        told.append(one)
        if len(told) == 3:
            assert not session.stop("another page") and session.stop("page")
    assert told[-1].done and "stopped at step" in told[-1].note and told[-1].step < 200
    assert not session.stop("page")
    again = drawn(session, opened, prompt="a purple triangle")
    assert np.array_equal(whole["patched"][0], again["patched"][0])


def test_one_draws_after_the_other_and_who_waits_may_stop(session, opened):
    first = session.draw(screen_of({**QUICK, "prompt": "two stars", "steps": 200}, opened), "one")
    next(first)
    second = session.draw(screen_of(QUICK, opened), "two")
    assert next(second).text.startswith("waiting")
    threading.Timer(0.2, lambda: session.stop("two")).start()
    began = time.monotonic()
    assert [one.text for one in second] == ["stopped"] and time.monotonic() - began < 5
    first.close()
    assert list(session.draw(screen_of(QUICK, opened)))[-1].done


@pytest.mark.parametrize(
    ("values", "kind", "words"),
    [
        ({"layers.0": ["dwn"]}, InputError, "'dwn' matches no module of this model; did you mean \"down\"?"),
        (
            {"operator.1": "sparse", "value.1.0": 1.5, "value.1.1": 1.0},
            InputError,
            "is already replaced by operations[0]",
        ),
        ({"operator.1": "regions", "value.1.0": 0.3, "regions": "0.6,0,0.5,1=x"}, InputError, "regions"),
        ({"steps": 1001}, InputError, "steps must be at most 1000"),
        ({"seed": 2**70}, InputError, "a seed must fit 64 bits"),
        ({"operator.0": "taca", "value.0.0": 1.2}, InputError, "taca"),
        ({"method": "seg", "guidance": "layers: nowhere"}, InputError, "nowhere"),
    ],
)
def test_bad_input_is_told_and_the_session_lives_on(session, opened, values, kind, words):
    with pytest.raises((kind, UnsupportedModelError)) as caught:
        list(session.draw(screen_of({**QUICK, **values}, opened)))
    assert words in str(caught.value)
    assert list(drawn(session, opened)["patched"]) == [0]


def test_guidance_negative_prompts_and_regions_change_the_images(session, opened):
    plain = drawn(session, opened)
    guided = drawn(session, opened, method="seg", guidance="{scale: 3.0, layers: mid}")
    negative = drawn(session, opened, negative_prompt="circle")
    nag = {f"value.1.{place}": one.value for place, one in enumerate(sliders_of("nag"))}
    led = drawn(session, opened, negative_prompt="circle", **{"operator.1": "nag", **nag})
    area = {"operator.1": "regions", "value.1.0": 0.3, "regions": "0,0,0.5,1=a green star"}
    regional = drawn(session, opened, **area)
    for one in (guided, negative, led, regional):
        assert not np.array_equal(one["patched"][0], plain["patched"][0])
    assert np.array_equal(led["base"][0], negative["base"][0])
    assert np.array_equal(regional["base"][0], plain["base"][0])
    assert {one["operator"] for one in operations_of(opened.pipeline)} == {"pladis", "regions"}


def test_maps_are_of_the_words_and_are_drawn_once(session, opened):
    pytest.importorskip("matplotlib")
    screen = screen_of({**QUICK, "prompt": "a red circle, a star", "steps": 2}, opened)
    told = list(session.maps(screen))
    found = told[-1].maps
    assert (
        [column.label for column in found.columns] == words_in(screen.prompt) == ["a", "red", "circle", "a (2)", "star"]
    )
    assert max(one.step for one in told) == 6 and [row.mode for row in found.rows] == ["dense", "sparse", "pladis"]
    assert word_sheet(found, "circle").size == word_sheet(found, "star").size
    assert word_sheet(found, "circle").tobytes() != word_sheet(found, "star").tobytes()
    with pytest.raises(InputError, match="the prompt has no word 'blue'"):
        word_sheet(found, "blue")
    again = list(session.maps(screen))
    assert len(again) == 1 and again[0].maps is found


def test_a_model_without_surgery_is_refused_in_the_words_of_apply(opened):
    from dataclasses import replace

    from ..tiny import tiny_svd_unet

    class StableVideoDiffusionPipeline:
        unet = tiny_svd_unet()

    other = Session(replace(opened, pipeline=StableVideoDiffusionPipeline()))
    with pytest.raises(UnsupportedModelError, match="UNetSpatioTemporalConditionModel"):
        list(other.draw(screen_of(QUICK, opened)))


def test_a_recipe_that_cannot_be_written_is_told_as_everywhere(session, tmp_path, monkeypatch):
    answers = Answers(session, saves=tmp_path / "out")
    assert f"recipe: {tmp_path}/out/" in answers.save(QUICK)["status"]

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    told = answers.save(QUICK)["status"]
    assert "-2.yaml: the disk is full; make room and save it again" in told and len(list(answers.saves.iterdir())) == 1
    (tmp_path / "file").write_text("")
    told = Answers(session, saves=tmp_path / "file").save(QUICK)["status"]
    assert f"cannot write {tmp_path}/file/" in told and "disk" not in told
