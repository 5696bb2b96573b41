"""What a recipe may say about operators and schedules: each operator's own hyperparameters, problems at their lines."""

import json
import math

import pytest
from pydantic import ValidationError

from surgery.nn import operators
from surgery.recipe.reading import read_recipe
from surgery.recipe.schema import OPERATORS

from .test_recipe import GOOD, problems_of, write

WITH = "{operator: pladis, alpha: 1.5, scale: 2.0}"
NAMES = list(operators.OPERATORS)


def read(tmp_path, settings, schedule=None):
    """The one operation of a recipe with these `with:` and `schedule:` texts."""
    text = GOOD.replace(WITH, settings) + (f"    schedule: {schedule}\n" if schedule else "")
    return read_recipe(write(tmp_path, text)).recipe.operations[0]


def test_an_operator_takes_what_the_table_says_it_does():
    for name, own in operators.OPERATORS.items():
        unit = {"unit": "head"} if own.projects else {}
        setting = {"operator": name, **own.defaults, **unit}
        assert list(OPERATORS[name](operator=name).model_dump().items()) == list(setting.items())
    for unit in operators.UNITS:
        assert OPERATORS["gag"](operator="gag", unit=unit).unit == unit


@pytest.mark.parametrize("operator", NAMES)
def test_a_hyperparameter_is_refused_where_the_table_says_it_has_no_meaning(operator):
    def value_of(name, value):
        return getattr(OPERATORS[operator](operator=operator, **{name: value}), name)

    for name in operators.OPERATORS[operator].defaults:
        limits = operators.HYPERPARAMETERS[name]
        low, high = limits.low, limits.high
        assert value_of(name, low) == low and value_of(name, high) == min(high, operators.LARGEST)
        outside = [math.nextafter(low, -math.inf), math.nan]
        outside += [] if math.isinf(high) else [math.nextafter(high, math.inf), math.inf]
        for value in outside:
            assert operators.value_problem(name, value)
            with pytest.raises(ValidationError):
                value_of(name, value)


@pytest.mark.parametrize("operator", NAMES)
def test_what_is_left_out_takes_the_operators_own_default(tmp_path, operator):
    settings = read(tmp_path, f"{{operator: {operator}, alpha: 1.25}}").settings.model_dump()
    unit = {"unit": "head"} if operators.OPERATORS[operator].projects else {}
    assert settings == {"operator": operator, **operators.OPERATORS[operator].defaults, **unit, "alpha": 1.25}


def test_an_infinite_eta_is_kept_as_a_number_that_json_has(tmp_path):
    settings = read(tmp_path, "{operator: gag, eta: .inf}").settings
    assert settings.eta == 1e30
    json.dumps(settings.model_dump(), allow_nan=False)
    (problem,) = problems_of(write(tmp_path, GOOD.replace(WITH, "{operator: gag, eta: .nan}")))
    assert ":8 operations[0].with.eta" in problem and "greater than or equal to 0" in problem


@pytest.mark.parametrize(
    ("operator", "key", "message"),
    [
        ("sparse", "scale: 1.0", "sparse has no scale; it has alpha, temperature"),
        ("pladis", "eta: 3.0", "pladis has no eta; it has alpha, scale, temperature, sparse_temperature"),
        ("pladis", "unit: head", "pladis has no unit; it has alpha, scale, temperature, sparse_temperature"),
        ("gag", "alpha_low: 1.1", "gag has no alpha_low; it has alpha, scale, temperature, zeta, eta, sparse_temp"),
        ("anderson", "zeta: 0.5", "anderson has no zeta; it has alpha, scale, temperature, alpha_low, scale_low"),
        ("gag", "etta: 3.0", 'unknown key; did you mean "eta"?'),
        ("gag", "unit: heads", 'is "heads" but must be "head", "token" or "image"; did you mean "head"?'),
        ("gag", "zeta: .inf", "finite"),
        ("anderson", "alpha_low: 2.5", "is 2.5 but should be less than or equal to 2"),
    ],
)
def test_what_an_operator_does_not_take_is_a_problem_at_its_line(tmp_path, operator, key, message):
    path = write(tmp_path, GOOD.replace(f" {WITH}", f"\n      operator: {operator}\n      {key}"))
    (problem,) = problems_of(path)
    assert problem.startswith(f"{path}:10 operations[0].with.{key.split(':')[0]}: ") and message in problem


def test_an_unknown_operator_names_the_known_ones_and_hides_no_other_mistake(tmp_path):
    path = write(tmp_path, GOOD.replace(WITH, "{operator: gagg, eta: -1.0, unit: heads, foo: 1}"))
    found = problems_of(path)
    assert len(found) == 4
    *first, last = (f'"{name}"' for name in operators.OPERATIONS)
    expected = f'is "gagg" but must be {", ".join(first)} or {last}; did you mean "gag"?'
    assert f"{path}:8 operations[0].with.operator: {expected}" in found
    for key in ("eta", "unit", "foo"):
        assert any(f"operations[0].with.{key}: " in problem for problem in found)
    (problem,) = problems_of(write(tmp_path, GOOD.replace(WITH, "{scale: 3.0}")))
    assert problem.endswith("operations[0].with.operator: this key is required; write `operator: pladis`")
    (problem,) = problems_of(write(tmp_path, GOOD.replace(WITH, "gag")))
    assert problem.endswith('operations[0].with: is "gag" but should be a mapping of keys')


def test_set_changes_the_operator_and_says_which_settings_no_longer_fit(tmp_path):
    path = write(tmp_path, GOOD)
    change = ["operations.0.with.operator=gag"]
    settings = read_recipe(path, change).recipe.operations[0].settings
    assert (settings.scale, settings.eta, settings.unit) == (2.0, 15.0, "head")
    (problem,) = problems_of(path, ["operations.0.with.operator=sparse"])
    assert f"{path}:8 operations[0].with.scale: sparse has no scale; it has alpha, temperature" in problem
    hint = problem.rpartition("--set '")[2].partition("'")[0]
    assert read_recipe(path, [hint]).recipe.operations[0].settings.model_dump()["operator"] == "sparse"
    assert read_recipe(path, [*change, "operations.0.with.eta=.inf"]).recipe.operations[0].settings.eta == 1e30


@pytest.mark.parametrize(
    ("schedule", "kept"),
    [
        ("{steps: [5, 20]}", {"steps": [5, 20]}),
        ("{steps: [5, null]}", {"steps": [5, None]}),
        (
            "{fraction: [0, 0.5], scale: [0.0, 1, 2.5]}",
            {"fraction": [0, 0.5], "scale": [0.0, 1, 2.5]},
        ),
        ("{sigma: [0.5, .inf]}", {"sigma": [0.5, 1e30]}),
    ],
)
def test_a_schedule_is_kept_as_it_is_written(tmp_path, schedule, kept):
    operation = read(tmp_path, WITH, schedule)
    assert operation.schedule == kept
    assert operation.model_dump(mode="json", by_alias=True)["schedule"] == kept
    json.dumps(operation.schedule, allow_nan=False)


def test_without_a_schedule_a_recipe_has_the_hash_that_it_had_before_there_were_any(tmp_path):
    plain = read_recipe(write(tmp_path, GOOD))
    assert "schedule" not in plain.recipe.model_dump(mode="json", by_alias=True)["operations"][0]
    empty = read_recipe(write(tmp_path, GOOD + "    schedule: null\n"))
    scheduled = read_recipe(write(tmp_path, GOOD + "    schedule: {steps: [0, 5]}\n"))
    assert plain.hash == empty.hash != scheduled.hash


def test_every_problem_of_a_schedule_is_reported_at_the_line_of_its_key_beside_all_others(tmp_path):
    schedule = """\
    schedule:
      steps: [5, 2]
      fractoin: [0, 1]
      fraction: [0.5, 1.5]
      sigma: 3
      eta: [1.0]
      alpha: [1.5, 3]
  - replace: cross-attention
    layers: mid
    with: {operator: gag}
    schedule: {}
  - replace: cross-attention
    layers: mid
    with: {operator: sparse, scale: 2.0}
    schedule: [0, 5]
  - replace: cross-attention
    layers: mid
    with: {operator: gagg}
    schedule: {nonsense: 5}
sampling: {steps: 0}
"""
    path = write(tmp_path, GOOD + schedule)
    found = problems_of(path)
    for line, text in (
        (10, "operations[0].schedule.steps: must rise: 5 to 2 holds no step"),
        (
            11,
            "operations[0].schedule.fractoin: is no window and no hyperparameter of pladis; there are steps, fraction",
        ),
        (11, 'did you mean "fraction"?'),
        (12, "operations[0].schedule.fraction: must rise from 0 or above to at most 1, not [0.5, 1.5]"),
        (13, "operations[0].schedule.sigma: must be a list, not 3"),
        (14, "operations[0].schedule.eta: is no window and no hyperparameter of pladis"),
        (15, "operations[0].schedule.alpha: must lie in [1, 2]"),
        (19, "operations[1].schedule: must name steps, fraction, sigma or a hyperparameter, with a list each"),
        (22, "operations[2].with.scale: sparse has no scale"),
        (23, "operations[2].schedule: should be a mapping of keys"),
        (26, "operations[3].with.operator: "),
        (28, "sampling.steps: "),
    ):
        assert any(f"{path}:{line} " in problem and text in problem for problem in found), (line, text, found)
    assert not any("nonsense" in problem for problem in found)  # whose keys they are, only the operator says
