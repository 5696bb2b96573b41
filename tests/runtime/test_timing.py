"""`surgery time`: which sides there are, in what order they draw, and what is made of their times and memory."""

import json
import mmap
import statistics

import numpy as np
import pytest

import surgery
from surgery.artifact import read_manifest
from surgery.engines.compiling import repeated_blocks
from surgery.errors import InputError
from surgery.models.patching import denoiser, patched_modules
from surgery.runtime.peak import process_peak, resident_peak
from surgery.runtime.timing import time_sides, timed_sides
from surgery.runtime.worker import ImageRequest, Worker, WorkerConfig

from ..conftest import load_shapes

SAMPLING = {"steps": 3, "guidance_scale": 4.0, "height": 64, "width": 64}


def config_of(folder):
    manifest = read_manifest(folder)
    return WorkerConfig(str(folder), None, manifest.hash, manifest.sampling, device="cpu", threads=1)


def test_a_side_has_the_models_own_settings_or_the_operators_defaults_on_its_layers():
    pipeline = surgery.patch(load_shapes(), scale=1.25, layers="up")
    own = denoiser(pipeline).pladis_operations()
    sides = timed_sides(pipeline, ["pladis", "pladis:alpha=2", "gag:unit=token"])
    assert [side.name for side in sides] == ["base", "pladis", "pladis:alpha=2", "gag:unit=token"]
    assert sides[0].operations is None and sides[1].operations == own
    assert sides[2].operations == [{**own[0], "alpha": 2.0}]
    (gag,) = sides[3].operations
    assert (gag["scale"], gag["eta"], gag["unit"], gag["layers"]) == (10.0, 15.0, "token", own[0]["layers"])
    assert [side.name for side in timed_sides(pipeline, [])] == ["base", "pladis"]
    plain = load_shapes()
    assert len(timed_sides(plain, ["gag"])[1].operations[0]["layers"]) == 7 and not patched_modules(denoiser(plain))


@pytest.mark.parametrize(
    ("operators", "words"),
    [
        (["gga"], "did you mean gag"),
        (["pladis:alhpa=2"], "alhpa: Extra inputs"),
        (["pladis:alpha=3"], "alpha: Input should be less"),
        (["pladis:alpha"], "'alpha' has no value; write pladis:KEY=VALUE"),
        (["gag", "gag"], "named twice"),
    ],
)
def test_what_is_no_operator_is_told(operators, words):
    with pytest.raises(InputError, match=words):
        timed_sides(load_shapes(), operators)


def test_sides_take_turns_and_ratios_are_to_the_base_of_the_same_round(shapes_artifact, monkeypatch):
    drawn, draw = [], Worker.draw

    def recording(self, requests, sampling=None, **more):
        operations = denoiser(self.pipeline).pladis_operations() if patched_modules(denoiser(self.pipeline)) else [None]
        drawn.append((operations[0] and operations[0]["operator"], sampling["steps"], [r.seed for r in requests]))
        return draw(self, requests, sampling, **more)

    monkeypatch.setattr(Worker, "draw", recording)
    rows = time_sides(config_of(shapes_artifact), ["pladis", "gag"], rounds=3, batch=2, sampling=SAMPLING, memory=False)
    there, back = [None, "pladis", "gag"], ["gag", "pladis", None]
    assert [name for name, *_ in drawn] == [*there, *there, *back, *there]  # the first three warm up
    assert [steps for _, steps, _ in drawn] == [2] * 3 + [3] * 9 and drawn[3][2] == [0, 1] and drawn[6][2] == [2, 3]
    assert [(row.side.name, row.mode) for row in rows] == [(name, "eager") for name in ("base", "pladis", "gag")]
    for row in rows:
        assert len(row.seconds) == 3 and min(row.seconds) > 0 and row.memory is None
        assert row.ratios == pytest.approx(np.array(row.seconds) / rows[0].seconds)
        assert row.to_json()["median_seconds"] == statistics.median(row.seconds)


def test_resident_memory_is_what_the_call_took_and_not_what_was_before():
    def touch(size):  # pages of its own: malloc may have a hole of any size that is resident already
        np.frombuffer(mmap.mmap(-1, size), np.uint8)[:] = 1

    large, how = resident_peak(lambda: touch(320_000_000))
    small, _ = resident_peak(lambda: touch(8000))
    assert how in ("cpu", "whole") and large > 320e6
    if how == "cpu":
        assert large - small > 300e6


@pytest.mark.slow
def test_a_process_of_its_own_measures_memory(shapes_artifact):
    warm = {**SAMPLING, "steps": 1}
    most, how = process_peak(config_of(shapes_artifact), None, [ImageRequest("a star", 0)], SAMPLING, warm)
    assert how in ("cpu", "whole") and 1e8 < most < 4e9


def test_the_verb_takes_a_recipe_and_says_where_it_was_measured(run, tmp_path):
    options = ["--operators", "pladis,gag", "--limit", "2", "--steps", "1", "--device", "cpu", "--no-memory"]
    told = json.loads(run("time", "shapes", *options, "--json", cwd=tmp_path, check=0).stdout)
    assert [row["side"] for row in told["rows"]] == ["base", "pladis", "gag"] and told["sampling"]["steps"] == 1
    assert told["versions"]["torch"] and "CPU" in told["hardware"] and told["memory"] is None
    (folder,) = (tmp_path / "out" / "shapes-pladis-time").iterdir()
    shown = run("time", folder, *options, cwd=tmp_path, check=0).stdout
    assert max(map(len, map(str.rstrip, shown.splitlines()))) <= 80 and "lowest to highest" in shown
    for wrong, words in ((["--limit", "0"], "--limit must be at least 1"), (["--dtype", "half"], "--dtype")):
        refused = run("time", folder, *options, *wrong, cwd=tmp_path)
        assert refused.returncode == 2 and words in refused.stderr


def test_each_side_is_compiled_anew_and_timed_beside_the_base_that_was_compiled_too(shapes_artifact, monkeypatch):
    modes = []

    def traced(model, mode):  # as compile_model, without a C++ compiler's minute
        modes.append(mode)
        for block in repeated_blocks(model).values():
            block.compile(fullgraph=True, backend="eager")

    monkeypatch.setattr("surgery.runtime.timing.compile_model", traced)
    config, sampling = config_of(shapes_artifact), {**SAMPLING, "steps": 1}
    rows = time_sides(config, ["gag"], rounds=1, sampling=sampling, compile="regional", memory=False)
    assert modes == ["regional"]
    assert [(row.side.name, row.mode) for row in rows] == [
        ("base", "eager"),
        ("gag", "eager"),
        ("base", "regional"),
        ("gag", "regional"),
    ]
    assert rows[2].ratios == (1.0,) and rows[3].ratios[0] == rows[3].seconds[0] / rows[2].seconds[0]
    assert rows[0].compile_seconds is None and rows[3].compile_seconds > rows[3].seconds[0]
