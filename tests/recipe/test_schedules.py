"""Schedules of whole pipelines: recorded by a recipe, loaded, carried out by generate, shown, and put back."""

import json
import re

import numpy as np
import pytest
import torch

import surgery
from surgery.cli.main import VERBS, build_parser
from surgery.errors import InputError
from surgery.nn import is_pladis
from surgery.nn.operators import OPERATORS
from surgery.runtime.draw import base_and_patched, generate

from ..conftest import load_shapes
from ..models.test_operators import apply
from ..quick import quick

SAMPLING = {"steps": 4, "guidance_scale": 4.0, "height": 64, "width": 64}
PROMPTS, SEEDS = ["a red circle to the left of a blue square"], [0, 1]
NEVER = {"steps": [900, None]}
ALWAYS = {"steps": [0, None], "fraction": [0, 1], "sigma": [0, 1e30]}


def images_of(pipeline):
    """The images as one array, (seeds, 64, 64, 3) of 0 to 255."""
    return np.stack([np.asarray(image) for image in generate(pipeline, PROMPTS, SEEDS, SAMPLING).values()]).astype(int)


def buffers_of(pipeline):
    return {name: buffer.clone() for name, buffer in pipeline.unet.named_buffers() if "pladis" in name}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def base():
    """The unpatched pipeline's images."""
    return images_of(load_shapes())


@pytest.mark.parametrize("operator", quick(list(OPERATORS), "gag", "anderson_history"))
def test_a_window_that_is_never_open_draws_the_base_and_one_always_open_the_unscheduled_patch(base, operator):
    plain = images_of(surgery.patch(load_shapes(), operator=operator))
    assert np.abs(plain - base).max() > 20
    never = surgery.patch(load_shapes(), operator=operator, schedule=NEVER)
    before = buffers_of(never)
    assert np.abs(images_of(never) - base).max() <= 2  # another order of rounding than the base's own attention
    assert equal(buffers_of(never), before)
    always = surgery.patch(load_shapes(), operator=operator, schedule=ALWAYS)
    assert np.array_equal(images_of(always), plain)
    assert equal(buffers_of(always), before)


def test_a_schedule_draws_what_tuning_by_hand_between_the_steps_draws():
    pipeline = surgery.patch(load_shapes(), schedule={"steps": [1, 4], "scale": [1.0, 2.0, 3.0, 4.0]})
    by_hand, values = surgery.patch(load_shapes(), scale=0.0), [0.0, 2.0, 3.0, 4.0, 0.0]

    def tune(pipe, step, timestep, tensors):
        surgery.tune(pipe, scale=values[step + 1])
        return tensors

    expected = [
        np.asarray(
            by_hand(
                PROMPTS[0],
                num_inference_steps=4,
                guidance_scale=4.0,
                height=64,
                width=64,
                generator=torch.Generator().manual_seed(seed),
                callback_on_step_end=tune,
            ).images[0]
        )
        for seed in SEEDS
    ]
    assert np.array_equal(images_of(pipeline), np.stack(expected))


def test_a_window_of_noise_levels_is_the_window_of_the_steps_that_have_them():
    scheduler = load_shapes().scheduler
    scheduler.set_timesteps(4)
    alphas = scheduler.alphas_cumprod[scheduler.timesteps]
    sigmas = ((1 - alphas) / alphas).sqrt().tolist()
    by_sigma = surgery.patch(load_shapes(), schedule={"sigma": [sigmas[2] * 0.99, sigmas[0] * 1.01]})
    by_step = surgery.patch(load_shapes(), schedule={"steps": [0, 3]})
    by_other_step = surgery.patch(load_shapes(), schedule={"steps": [1, 3]})
    assert np.array_equal(images_of(by_sigma), images_of(by_step))
    assert not np.array_equal(images_of(by_sigma), images_of(by_other_step))


def test_what_was_tuned_is_kept_even_if_the_pipeline_fails_in_the_middle(monkeypatch):
    pipeline = surgery.patch(load_shapes(), operator="gag", schedule={"steps": [1, 2], "zeta": [0.3]})
    surgery.tune(pipeline, eta=3.3)
    before = buffers_of(pipeline)
    calls = []

    def failing(*arguments, **keywords):
        calls.append(buffers_of(pipeline))
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return step(*arguments, **keywords)

    step = pipeline.scheduler.step
    monkeypatch.setattr(pipeline.scheduler, "step", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        images_of(pipeline)
    assert equal(buffers_of(pipeline), before)
    assert not equal(calls[0], before) and not equal(calls[1], before) and not equal(calls[0], calls[1])


def test_base_and_patched_carry_out_the_schedule_on_the_patched_side_alone(base):
    pipeline = surgery.patch(load_shapes(), schedule={"steps": [0, 2]})
    scheduled = images_of(pipeline)
    plain, patched = base_and_patched(pipeline, PROMPTS, SEEDS, SAMPLING)
    assert np.array_equal(np.stack([np.asarray(image) for image in plain.values()]), base)
    assert np.array_equal(np.stack([np.asarray(image) for image in patched.values()]), scheduled)


def test_offloaded_buffers_are_a_clear_error_and_not_a_schedule_without_effect():
    from accelerate import cpu_offload

    pipeline = surgery.patch(load_shapes(), schedule={"steps": [0, 2]})
    cpu_offload(pipeline.unet, "cpu", offload_buffers=True)
    with pytest.raises(InputError, match="the schedule cannot be carried out: .* offloaded to the meta device"):
        images_of(pipeline)


@pytest.fixture(scope="module")
def scheduled_artifact(tmp_path_factory):
    """The artifact of a recipe with a schedule, and that schedule."""
    schedule = {"steps": [1, None], "zeta": [0.0, 0.5]}
    return apply(tmp_path_factory.mktemp("scheduled"), {"operator": "gag", "alpha": 1.4}, schedule), schedule


def test_a_recipes_schedule_is_recorded_loaded_saved_and_carried_out(scheduled_artifact, tmp_path, capsys):
    folder, schedule = scheduled_artifact
    config = json.loads((folder / "unet/config.json").read_text())["pladis"]
    manifest = json.loads((folder / "surgery.json").read_text())["operations"]
    assert config == manifest and config[0]["schedule"] == schedule
    pipeline = surgery.load(folder, verify=True)
    message = capsys.readouterr().err
    assert "unit head) on schedule steps [1, null], zeta [0, 0.5]; 7 in all" in message
    assert (
        "`with pipe.unet.scheduled(pipe, steps=N) as callback: pipe(..., num_inference_steps=N, callback_on_" in message
    )
    assert all(module.pladis_schedule == schedule for module in pipeline.unet.modules() if is_pladis(module))
    images = images_of(pipeline)
    live = surgery.patch(load_shapes(), operator="gag", alpha=1.4, schedule=schedule)
    assert np.abs(images - images_of(live)).max() <= 2
    assert np.abs(images - images_of(surgery.patch(load_shapes(), operator="gag", alpha=1.4))).max() > 10
    pipeline.save_pretrained(tmp_path)
    assert np.array_equal(images_of(surgery.load(tmp_path, quiet=True)), images)


def test_the_cards_code_for_the_schedule_runs_as_it_stands(scheduled_artifact):
    folder, _ = scheduled_artifact
    card = (folder / "README.md").read_text()
    assert "| steps [1, null], zeta [0, 0.5] | 7 |" in card.replace("\\", "")
    assert "Without it the operator acts at every step with its plain values" in card
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    (code,) = [block for block in blocks if "scheduled" in block]
    pipe = surgery.load(folder, quiet=True)
    pipe.set_progress_bar_config(disable=True)
    module = next(module for module in pipe.unet.modules() if is_pladis(module))
    seen = []
    module.register_forward_pre_hook(lambda module, _: seen.append(module.hyperparameters()))
    exec(code.replace("steps=25", "steps=4"), {"pipe": pipe})
    assert [step["alpha"] for step in seen] == [1.0, 1.4, 1.4, 1.4]
    assert [step["zeta"] for step in seen] == [0, 0, 0.5, 0.5]
    assert module.setting()["zeta"] == 0.0


def test_plan_apply_and_inspect_show_operators_with_their_own_settings_and_schedules(tmp_path, capsys, monkeypatch):
    from importlib import import_module

    def run(*arguments):
        parsed = build_parser().parse_args([str(argument) for argument in arguments])
        getattr(import_module(f"surgery.cli.{VERBS[parsed.verb][0]}"), f"run_{parsed.verb}")(parsed)
        return " ".join(capsys.readouterr().out.split())

    monkeypatch.chdir(tmp_path)
    operations = (
        "operations=[{replace: cross-attention, layers: mid, with: {operator: gag, eta: .inf}},"
        "{replace: cross-attention, layers: [up, down], with: {operator: sparse}, schedule: {fraction: [0, 0.5]}}]"
    )
    gag = "alpha 1.5, scale 10, temperature 1, zeta 0, eta infinite, unit head"
    shown = run("plan", "shapes", "--set", operations)
    assert f"0 gag {gag} none 1" in shown and "1 sparse alpha 1.5, temperature 1 fraction [0, 0.5] 6" in shown
    assert "replaced: 7 of 14 attention modules" in shown
    plan = json.loads(run("plan", "shapes", "--set", operations, "--json"))
    assert plan["operations"][0]["eta"] == 1e30 and "schedule" not in plan["operations"][0]
    assert plan["operations"][1]["schedule"] == {"fraction": [0, 0.5]}
    shown = run("apply", "shapes", "--set", operations, "--out", "x")
    assert f"1 modules with gag ({gag})" in shown
    assert "6 modules with sparse (alpha 1.5, temperature 1) on schedule fraction [0, 0.5]" in shown
    shown = run("inspect", "x")
    for words in (
        "gag (alpha 1.5, scale 10, ",
        "eta infinite, unit head)",
        "sparse (alpha 1.5, temperature 1) on schedule",
    ):
        assert words in shown
    operation = json.loads(run("apply", "shapes", "--set", operations, "--out", "y", "--json"))["operations"][0]
    assert set(operation) == {"operator", *OPERATORS["gag"].defaults, "unit", "layers"}


def test_words_of_long_lists_and_infinite_ends_stay_short_and_true():
    from surgery.console import operation_text, schedule_text

    schedule = {"sigma": [0.5, 1e30], "scale": [step / 10 for step in range(50)]}
    assert schedule_text(schedule) == "sigma [0.5, infinite], scale [0, 0.1, 0.2, ... 4.9] (50 values)"
    operation = {"operator": "pladis", "alpha": 1.5, "scale": 1e30, "schedule": {"steps": [5, None]}, "layers": ["a"]}
    assert operation_text(operation) == "pladis (alpha 1.5, scale 1e+30) on schedule steps [5, null]"
