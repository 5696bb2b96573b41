"""What is on the screen is a recipe: it plans, it has the same effect, and what is wrong is said as of recipes."""

import math
import shutil

import numpy as np
import pytest
import yaml

import surgery
from surgery.errors import InputError, RecipeError
from surgery.nn.operators import HYPERPARAMETERS, OPERATIONS
from surgery.recipe.reading import read_recipe
from surgery.runtime.draw import base_and_patched, draw
from surgery.runtime.load import load, open_model
from surgery.studio.opening import open_for_page, recipe_named
from surgery.studio.screen import first_values, guidance_text, recipe_text, screen_of, sliders_of

from ..conftest import SHAPES
from .conftest import PROMPT, QUICK


def of_gag(**more):
    """The values of a screen with GAG in some layers, NAG besides, and a guidance."""
    gag = {
        "operator.0": "gag",
        "layers.0": ["mid", "up"],
        "unit.0": "token",
        "more.0": "schedule: {fraction: [0, 0.7]}",
    }
    for place, slider in enumerate(sliders_of("gag", {"scale": 4.0, "zeta": 0.5})):
        gag[f"value.0.{place}"] = slider.value
    nag = {"operator.1": "nag", **{f"value.1.{place}": one.value for place, one in enumerate(sliders_of("nag"))}}
    guidance = {"method": "seg", "guidance": "scale: 2.0\nlayers: mid", "negative_prompt": "green"}
    return {**QUICK, **gag, **nag, **guidance, **more}


def test_a_fresh_screen_says_what_the_recipe_says(opened):
    shipped = read_recipe("shapes").recipe
    screen = screen_of({"prompt": PROMPT}, opened)
    assert screen.recipe.operations == shipped.operations and screen.recipe.sampling == shipped.sampling
    assert screen.recipe.publish == shipped.publish and screen.seeds == (0, 1)


def test_the_recipe_of_a_screen_plans_and_draws_what_the_screen_drew(opened, session, tmp_path):
    screen = screen_of(of_gag(), opened)
    *_, last = session.draw(screen)
    path = tmp_path / "elsewhere.yaml"
    path.write_text(recipe_text(screen, opened))
    assert surgery.plan(path).plan.totals["replaced"] == 7
    artifact = surgery.apply(path, tmp_path / "made")
    pipeline, sampling, _ = open_model(artifact.folder)
    base, patched = base_and_patched(pipeline, [PROMPT], [0], sampling)
    for side, images in (("base", base), ("patched", patched)):
        assert np.array_equal(np.asarray(last.drawn[side][0]), np.asarray(images[PROMPT, 0])), side


def test_an_artifact_and_a_plain_folder_begin_with_what_they_are(opened, shapes_artifact):
    of_artifact, plain = open_for_page(str(shapes_artifact)), open_for_page(str(SHAPES))
    assert of_artifact.hash == opened.hash and of_artifact.operations == opened.operations
    assert of_artifact.base == opened.base == {"pipeline": str(SHAPES.parent.parent / "surgery" / "recipes" / "shapes")}
    screen = screen_of(QUICK, plain)
    assert screen.data["base"] == {"pipeline": str(SHAPES)}
    assert screen.recipe.operations[0].settings.model_dump()["scale"] == OPERATIONS["pladis"].defaults["scale"]


def test_an_artifact_whose_base_is_gone_says_so(tmp_path):
    base, recipe = shutil.copytree(SHAPES, tmp_path / "base"), tmp_path / "recipe.yaml"
    recipe.write_text((SHAPES.parent / "shapes.yaml").read_text().replace("./shapes", "./base"))
    folder = surgery.apply(recipe, tmp_path / "made").folder
    shutil.rmtree(base)
    opened = open_for_page(str(folder))
    assert "# its base ./base is no folder of this machine" in recipe_text(screen_of(QUICK, opened), opened)


def test_an_artifact_whose_recipe_was_edited_begins_with_its_manifest(opened, shapes_artifact, tmp_path):
    folder = shutil.copytree(shapes_artifact, tmp_path / "copied")
    (folder / "recipe.yaml").write_text((folder / "recipe.yaml").read_text().replace("scale: 1.0", "scale: 9.0"))
    edited = open_for_page(str(folder))
    [operation] = edited.operations
    assert operation["with"]["scale"] == 1.0 and len(operation["layers"]) == 7 and edited.base == opened.base


def test_sliders_have_the_ranges_of_the_operators_table():
    for name, own in OPERATIONS.items():
        sliders = sliders_of(name)
        assert [one.name for one in sliders] == list(own.defaults)
        for one in sliders:
            limits = HYPERPARAMETERS[one.name]
            assert limits.low <= one.low < one.high <= limits.high and one.low <= one.value <= one.high, one
            assert one.value == own.defaults[one.name] and limits.must in one.meaning
            if math.isfinite(limits.high) and limits.high <= 2:
                assert (one.low, one.high) == (limits.low, limits.high)
    assert sliders_of("none") == []


def test_a_value_beyond_every_slider_stays_what_it_was(opened):
    from dataclasses import replace

    setting = {"operator": "gag", "eta": 1e30, "scale": 5000.0}
    operations = [{"replace": "cross-attention", "layers": "all", "with": setting}]
    beyond = replace(opened, operations=operations)
    values = first_values(beyond)
    assert values["value.0.1"] == 5000.0 and yaml.safe_load(values["more.0"]) == {"with": {"eta": 1e30}}
    found = screen_of(QUICK, beyond).recipe.operations[0].settings
    assert found.eta == 1e30 and found.scale == 5000.0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"prompt": "  "}, "prompt must be text"),
        ({"prompt": "x" * 10_001}, "10,001 characters are too long for a prompt"),
        ({"steps": 0}, "sampling.steps: is 0 but should be greater than or equal to 1"),
        ({"height": 63}, "sampling.height"),
        ({"seed": 0.5}, "seed must be a whole number"),
        ({"images": 99}, "images must be 1 to"),
        ({"value.0.0": 3.0}, "operations[0].with.alpha: is 3.0 but should be less than or equal to 2"),
        ({"operator.0": "pladi"}, 'did you mean "pladis"?'),
        ({"operator.0": "none"}, "choose an operator"),
        ({"more.0": "a: ["}, "operation 1: "),
        ({"more.0": "layer: all"}, "operation 1: there is no layer"),
        ({"more.0": "schedule: {fraction: [2, 1]}"}, "operations[0].schedule.fraction"),
        ({"layers.0": []}, "operations[0].layers"),
        ({"method": "seg", "guidance": "scal: 1"}, 'guidance.scal: unknown key; did you mean "scale"?'),
        ({"method": "skip"}, "guidance.method"),
        ({"method": "autoguidance", "guidance": "weak: {pipeline: /etc}"}, "the page loads no other checkpoint"),
        ({"regions": "/etc/passwd=x"}, "regions: the page takes boxes"),
        ({"regions": "0,0,1=x"}, "regions: the page takes boxes"),
    ],
)
def test_what_is_wrong_is_said(opened, values, words):
    with pytest.raises(InputError) as caught:
        screen_of({**QUICK, **values}, opened)
    assert words in str(caught.value)


@pytest.mark.parametrize("values", [{"value.0.0": 3.0}, {"layers.0": ["dwn"]}, {"more.0": "schedule: {steps: [3]}"}])
def test_the_words_are_those_of_plan(opened, session, tmp_path, values):
    """A recipe with the same mistake is refused by `surgery plan` with the line that the page shows."""
    path = tmp_path / "wrong.yaml"
    data = yaml.safe_load(recipe_text(screen_of(QUICK, opened), opened))
    operation = data["operations"][0]
    operation["with"]["alpha"] = values.get("value.0.0", 1.5)
    operation["layers"] = values.get("layers.0", ["all"])
    operation |= yaml.safe_load(values.get("more.0", "{}"))
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(RecipeError) as by_plan:
        surgery.plan(path)
    with pytest.raises(InputError) as on_page:
        session.check(screen_of({**QUICK, **values}, opened))
    assert str(on_page.value) in str(by_plan.value)


def test_the_settings_of_a_method_are_its_own():
    import surgery.guidance.methods as methods

    for name in methods.METHODS:
        given = {"method": name, **(yaml.safe_load(guidance_text(name)) or {})}
        assert methods.guidance_of(given) == methods.guidance_of(name)
    assert guidance_text("none") == ""


def test_recipes_folders_and_repositories_are_told_apart(tmp_path, monkeypatch):
    assert recipe_named("shapes").name == "shapes.yaml" and recipe_named(str(SHAPES)) is None
    assert recipe_named("owner/name") is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes").mkdir()
    assert recipe_named("shapes") is None  # a folder of that name
    for wrong in ("shaps", "./nothing", "nothing.yaml"):
        with pytest.raises(InputError):
            recipe_named(wrong)


def test_a_screen_draws_as_the_artifact_does(opened, session):
    *_, last = session.draw(screen_of(QUICK, opened))
    [image] = draw(
        load(opened.pipeline.config._name_or_path, quiet=True), [(PROMPT, 0)], {**opened.sampling, "steps": 3}
    )
    assert np.array_equal(np.asarray(last.drawn["patched"][0]), np.asarray(image))
