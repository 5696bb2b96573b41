"""Schedules over the denoising steps: windows, lists, noise levels, what is refused, and that all is put back."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)
from diffusers.models.attention_processor import Attention

from surgery.nn import PladisAttention, attention
from surgery.nn.operators import OPERATORS
from surgery.nn.schedule import StepSchedule, schedule_problems, step_values


def model_with(*conversions):
    """A model of one PladisAttention for each (operator, arguments of convert)."""
    modules = torch.nn.ModuleList(
        Attention(query_dim=8, cross_attention_dim=8, heads=2, dim_head=4) for _ in conversions
    )
    for module, (operator, arguments) in zip(modules, conversions, strict=True):
        PladisAttention.convert(module, operator, **arguments)
    return modules


def run(scheduler, model, steps, told=True):
    """[every module's hyperparameters] at each step of a run that calls the callback as diffusers' pipelines do.

    told: whether the number of steps is given beforehand.
    """
    pipeline, seen = SimpleNamespace(scheduler=scheduler), []
    with StepSchedule(pipeline, model, steps if told else None) as callback:
        scheduler.set_timesteps(steps)
        for step, timestep in enumerate(scheduler.timesteps):
            seen.append([module.hyperparameters() for module in model])
            tensors = {"latents": object()}
            assert callback(pipeline, step, timestep, tensors) is tensors
    return seen


def scales(schedule, scheduler, steps, told=True):
    """The scale of a PLADIS module, 2 where the schedule does not set it, at each step."""
    return [at[0]["scale"] for at in run(scheduler, model_with(("pladis", {"schedule": schedule})), steps, told)]


@pytest.mark.parametrize(
    ("schedule", "steps", "active"),
    [
        ({"steps": [2, 4]}, 6, [2, 3]),
        ({"steps": [0, 1]}, 6, [0]),
        ({"steps": [4, None]}, 6, [4, 5]),
        ({"steps": [0, 100]}, 3, [0, 1, 2]),
        ({"steps": [7, 9]}, 6, []),
        ({"fraction": [0, 0.5]}, 4, [0, 1]),
        ({"fraction": [0.5, 1]}, 5, [3, 4]),
        ({"fraction": [0, 1]}, 5, [0, 1, 2, 3, 4]),
        ({"steps": [1, 4], "fraction": [0.5, 1.0]}, 6, [3]),
    ],
)
def test_a_step_lies_in_every_window_or_is_dense(schedule, steps, active):
    assert schedule_problems(schedule, "pladis") == []
    for step in range(steps):
        expected = {} if step in active else {"scale": 0.0}
        assert step_values(schedule, "pladis", step, steps) == expected
    found = scales(schedule, DDIMScheduler(), steps)
    assert found == [2.0 if step in active else 0.0 for step in range(steps)]


def test_a_window_of_sigma_holds_both_of_its_ends():
    for sigma, inside in ((0.99, False), (1.0, True), (2.0, True), (3.0, True), (3.01, False)):
        assert (step_values({"sigma": [1, 3]}, "pladis", 0, 4, sigma) == {}) is inside


@pytest.mark.parametrize(
    ("values", "steps", "expected"),
    [
        ([0.0, 1.0, 2.0], 3, [0, 1, 2]),
        ([0.0, 1.0, 2.0], 6, [0, 0, 1, 1, 2, 2]),
        ([0.0, 1.0, 2.0], 7, [0, 0, 0, 1, 1, 2, 2]),
        ([5.0], 4, [5, 5, 5, 5]),
        ([0.0, 1.0, 2.0, 3.0], 2, [0, 2]),
    ],
)
def test_a_list_is_stretched_over_the_steps_in_its_order(values, steps, expected):
    assert scales({"scale": values}, DDIMScheduler(), steps) == expected


def test_a_list_runs_over_all_steps_and_counts_within_the_window():
    schedule = {"steps": [1, 3], "scale": [1.0, 2.0, 3.0, 4.0]}
    assert scales(schedule, DDIMScheduler(), 4) == [0.0, 2.0, 3.0, 0.0]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("unit", ["head", "token"])
def test_outside_its_window_every_operator_is_dense_attention(operator, unit):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, length, 8, generator=generator) * 3 for length in (5, 7, 7))
    off = step_values({"steps": [3, 5]}, operator, 0, 10)
    assert off == OPERATORS[operator].off
    found = attention(query, key, value, operator=operator, unit=unit, **off)
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    assert (found - dense).abs().max() < 1e-4  # rounding, times gag's scale of 10
    assert (attention(query, key, value, operator=operator, unit=unit) - dense).abs().max() > 0.01


def ddim_sigmas(scheduler):
    alphas = scheduler.alphas_cumprod[scheduler.timesteps]
    return ((1 - alphas) / alphas).sqrt()


def own_sigmas(scheduler):
    return scheduler.sigmas[: len(scheduler.timesteps)]


SCHEDULERS = {
    "DDIM": (lambda: DDIMScheduler(timestep_spacing="trailing"), ddim_sigmas),
    "DDIM, leading": (lambda: DDIMScheduler(steps_offset=1), ddim_sigmas),
    "LCM": (LCMScheduler, ddim_sigmas),
    "Euler": (EulerDiscreteScheduler, own_sigmas),
    "Euler, trailing, Karras": (
        lambda: EulerDiscreteScheduler(timestep_spacing="trailing", use_karras_sigmas=True),
        own_sigmas,
    ),
    "DPM-Solver": (DPMSolverMultistepScheduler, own_sigmas),
    "flow matching": (lambda: FlowMatchEulerDiscreteScheduler(shift=3.0), own_sigmas),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [4, 10])
def test_a_window_of_sigma_follows_the_schedulers_noise_levels_from_the_first_step_on(name, steps):
    make, sigmas_of = SCHEDULERS[name]
    scheduler = make()
    scheduler.set_timesteps(steps)
    sigmas = sigmas_of(scheduler).tolist()
    assert len(sigmas) == steps and sigmas == sorted(sigmas, reverse=True)
    for index in (0, steps // 2, steps - 1):
        middle = sigmas[index]
        found = scales({"sigma": [middle * 0.999, middle * 1.001]}, make(), steps)
        assert found == [2.0 if step == index else 0.0 for step in range(steps)]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_without_a_number_of_steps_the_first_noise_level_is_the_largest(name):
    scheduler = SCHEDULERS[name][0]()
    found = scales({"sigma": [1.0 if name == "flow matching" else 10.0, 1e30]}, scheduler, 10, told=False)
    assert found[0] == 2.0 and found[-1] == 0.0


def test_a_scheduler_that_starts_from_pure_noise_has_an_infinite_noise_level():
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    assert scales({"steps": [0, 2]}, scheduler, 4) == [2.0, 2.0, 0.0, 0.0]
    assert scales({"sigma": [100, 1e30]}, scheduler, 4)[0] == 2.0


class WithoutNoiseLevels:
    """A scheduler of timesteps alone, as those of masked image models."""

    def set_timesteps(self, steps):
        self.timesteps = torch.arange(steps)


def test_a_scheduler_without_noise_levels_is_refused_for_a_window_of_sigma():
    with pytest.raises(ValueError, match="WithoutNoiseLevels tells no noise level; use a window of steps or fraction"):
        scales({"sigma": [0, 1]}, WithoutNoiseLevels(), 4)


def test_a_window_of_steps_needs_no_noise_levels():
    assert scales({"steps": [0, 2]}, WithoutNoiseLevels(), 4) == [2.0, 2.0, 0.0, 0.0]


def test_each_module_follows_its_own_schedule_and_one_without_stays():
    model = model_with(
        ("gag", {"schedule": {"steps": [1, 2]}, "alpha": 1.3}),
        ("anderson", {"schedule": {"steps": [0, 1], "scale_low": [0.5]}}),
        ("sparse", {}),
        ("sparse", {"schedule": {"fraction": [0.5, 1], "temperature": [3.0]}}),
    )
    plain = [module.hyperparameters() for module in model]
    first, second = run(DDIMScheduler(), model, 2)
    assert first[0] == {**plain[0], "alpha": 1.0, "scale": 0.0} and second[0] == plain[0]
    assert first[1] == {**plain[1], "scale_low": 0.5}
    assert second[1] == {**plain[1], "scale": 0.0, "scale_low": 0.0}
    assert first[2] == second[2] == plain[2]
    assert first[3] == {**plain[3], "alpha": 1.0} and second[3] == {**plain[3], "temperature": 3.0}
    assert [module.hyperparameters() for module in model] == plain


def test_what_was_set_before_the_run_is_put_back_bit_for_bit_whether_it_ends_or_fails():
    model = model_with(("gag", {"schedule": {"steps": [0, 1], "eta": [3.0, 4.0]}}))
    model[0].set_hyperparameters({"alpha": 1.37, "eta": float("inf"), "scale": -0.1})
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    buffers = dict(model.named_buffers())

    def is_as_before():
        return all(buffers[name] is buffer for name, buffer in model.named_buffers()) and all(
            torch.equal(buffer, before[name]) for name, buffer in model.named_buffers()
        )

    run(DDIMScheduler(), model, 4)
    assert is_as_before()
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(4)
    with pytest.raises(KeyError), StepSchedule(SimpleNamespace(scheduler=scheduler), model, steps=4) as callback:
        callback(SimpleNamespace(scheduler=scheduler), 0, scheduler.timesteps[0], {})
        assert not is_as_before()
        raise KeyError
    assert is_as_before()


def test_another_callback_runs_after_this_one_and_its_tensors_are_returned():
    model = model_with(("pladis", {"schedule": {"steps": [1, 2]}}))
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(2)
    pipeline, seen = SimpleNamespace(scheduler=scheduler), []

    def then(*arguments):
        seen.append((arguments, model[0].hyperparameters()["scale"]))
        return "changed"

    with StepSchedule(pipeline, model, steps=2, then=then) as callback:
        assert model[0].hyperparameters()["scale"] == 0.0
        assert callback(pipeline, 0, 500, {"latents": 1}) == "changed"
    assert seen == [((pipeline, 0, 500, {"latents": 1}), 2.0)]


def test_a_model_without_a_schedule_or_with_offloaded_buffers_is_refused():
    pipeline = SimpleNamespace(scheduler=DDIMScheduler())
    with pytest.raises(ValueError, match="no module of this model has a schedule"):
        StepSchedule(pipeline, model_with(("pladis", {})))
    with pytest.raises(ValueError, match="offloaded to the meta device"):
        StepSchedule(pipeline, model_with(("pladis", {"schedule": {"steps": [0, 1]}})).to("meta"))


@pytest.mark.parametrize(
    ("schedule", "key", "message"),
    [
        (None, None, "must name steps, fraction, sigma or a hyperparameter"),
        ({}, None, "must name steps"),
        ([5, 20], None, "must name steps"),
        (
            {"step": [0, 5]},
            "step",
            "is no window and no hyperparameter of pladis; there are steps, fraction, sigma, alpha",
        ),
        ({"eta": [1.0]}, "eta", "is no window and no hyperparameter of pladis"),
        ({"steps": 5}, "steps", "must be a list, not 5"),
        ({"scale": []}, "scale", r"must be a list, not \[\]"),
        ({"steps": [5]}, "steps", "must be two numbers, from and to, not 1"),
        ({"steps": [5, 2]}, "steps", "must rise: 5 to 2 holds no step"),
        ({"steps": [5, 5]}, "steps", "holds no step"),
        ({"steps": [0.5, 2]}, "steps", "must be two step numbers of 0 or above"),
        ({"steps": [-1, 2]}, "steps", "must be two step numbers"),
        ({"steps": [None, 2]}, "steps", "must be two step numbers"),
        ({"steps": [True, 2]}, "steps", "must be two step numbers"),
        ({"fraction": [0, 1.5]}, "fraction", "must rise from 0 or above to at most 1"),
        ({"fraction": [0.5, 0.5]}, "fraction", "must rise"),
        ({"fraction": [0, None]}, "fraction", "must be two numbers"),
        ({"sigma": [-1, 2]}, "sigma", r"must rise from 0 or above, not"),
        ({"sigma": ["0", 2]}, "sigma", "must be two numbers"),
        ({"sigma": [float("nan"), 2]}, "sigma", "must rise"),
        ({"alpha": [1.5, 2.5]}, "alpha", r"must lie in \[1, 2\] .*, not 2.5"),
        ({"scale": ["2"]}, "scale", "must be a finite number, not '2'"),
        ({"temperature": [1.0, 0.0]}, "temperature", "must be above 0"),
        ({"scale": [float("nan")]}, "scale", "must be a finite number"),
    ],
)
def test_a_wrong_schedule_is_named_by_its_key(schedule, key, message):
    import re

    (problem,) = schedule_problems(schedule, "pladis")
    assert problem[0] == key and re.search(message, problem[1]), problem


def test_all_problems_of_a_schedule_are_found_at_once():
    found = schedule_problems({"steps": [5], "scale": [1.0], "alpha": [9.0], "zeta": [0.0]}, "sparse")
    assert [key for key, _ in found] == ["steps", "scale", "alpha", "zeta"]
