"""Recipes: every problem at once, at its line, with the nearest valid spelling; safe YAML only."""

import pytest
import yaml

from surgery.errors import InputError, RecipeError
from surgery.recipe.plan import make_plan
from surgery.recipe.reading import read_recipe, shipped_recipes

from ..conftest import SHAPES

GOOD = f"""\
schema: 1
name: mine
base:
  pipeline: {SHAPES}
operations:
  - replace: cross-attention
    layers: all
    with: {{operator: pladis, alpha: 1.5, scale: 2.0}}
"""


def write(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    return path


def problems_of(path, overrides=()):
    with pytest.raises(RecipeError) as caught:
        make_plan(path, overrides)
    return [str(problem) for problem in caught.value.problems]


def test_defaults_are_the_papers(tmp_path):
    recipe = read_recipe(write(tmp_path, GOOD.replace(", alpha: 1.5, scale: 2.0", ""))).recipe
    settings = recipe.operations[0].settings
    assert (settings.alpha, settings.scale, settings.temperature) == (1.5, 2.0, 1.0)


def test_every_problem_is_reported_at_once_with_line_key_and_nearest_spelling(tmp_path):
    path = write(
        tmp_path,
        f"""\
schema: 1
name: two words
base:
  pipeline: {SHAPES}
  varient: fp16
operations:
  - replace: cross-atention
    layers: [up, dwon]
    with:
      operator: pladiss
      alhpa: 1.5
      alpha: 3
      scale: "2"
      temperature: 0
  - replace: cross-attention
    layers: [up_blocks.1.*, "*.attn1"]
    with: {{operator: pladis}}
sampling: {{steps: 0, guidance: 4}}
""",
    )
    found = problems_of(path)
    for line, parts in (
        (2, ["name", "two words"]),
        (5, ["base.varient: unknown key", 'did you mean "variant"?']),
        (7, ["operations[0].replace", '"cross-atention"', 'must be "cross-attention"']),
        (8, ["operations[0].layers[1]", "'dwon' matches no module", 'did you mean "down"?']),
        (10, ["operations[0].with.operator", '"pladiss"', 'must be "pladis"']),
        (11, ["operations[0].with.alhpa: unknown key", 'did you mean "alpha"?']),
        (12, ["operations[0].with.alpha: is 3 but should be less than or equal to 2"]),
        (13, ["operations[0].with.scale", "number"]),
        (14, ["operations[0].with.temperature: is 0 but should be greater than 0"]),
        (16, ["operations[1].layers[1]", "7 self-attention modules and no cross-attention"]),
        (16, ["operations[1].layers", "already replaced by operations[0]"]),
        (18, ["sampling.steps", "greater than or equal to 1"]),
        (18, ["sampling.guidance: unknown key", 'did you mean "guidance_scale"?']),
    ):
        assert any(f"{path}:{line} " in text and all(part in text for part in parts) for text in found), (line, found)
    assert len(found) == 13


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ":1: a recipe is a mapping"),
        ("- a\n- b\n", ":1: a recipe is a mapping"),
        ("schema: 1\nname: [1\n", "is not YAML"),
        ("schema: 1\nname: a\nname: b\n", ":3: name stands twice"),
        ("a: &x 1\nb: *x\n", ":2:4: aliases"),
        ("a: !!python/object/apply:os.system [echo]\n", ":1"),
        ("schema: 1\n1: 2\n", ":2: a key must be a word"),
        ("schema: 1\nname: 2020-13-45\n", "a value that YAML cannot make"),
        ("schema: " + "[" * 3000, ""),
        ("schema: 2\n", "schema: is 2 but must be 1"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("section", "key", "message"),
    [
        ("operations: 3", "operations", "is 3 but should be a valid list"),
        ("operations: []", "operations", "at least 1 item"),
        ("operations: [3]", "operations[0]", "is 3 but should be a mapping of keys"),
        ("base: null", "base", "is null but should be a mapping of keys"),
        ("base: {pipeline: ./x, components: 5}", "base.components", "should be a mapping of keys"),
        ("base: {pipeline: ./x, components: {vae: {file: y}}}", "base.components.vae", "unknown key; keys here: unet"),
        ("base: {pipeline: ./x, loras: [{fiel: y}]}", "base.loras[0].fiel", 'did you mean "file"'),
        ("base: {pipeline: ./x, scheduler: {timestep_spacing: x}}", "base.scheduler.class", "this key is required"),
        ("publish: {tags: x}", "publish.tags", "list"),
        ("export: [{target: inducter}]", "export[0].target", 'did you mean "inductor"'),
        ("name: a/../b", "name", "may hold letters, digits, - . and _ alone"),
        ("name: r\nsettings: {}", "settings", "unknown key"),
        ("schema: true", "schema", "valid integer"),
        ("base: {pipeline: a/b, revision: 1234567}", "base.revision", "should be a valid string"),
    ],
)
def test_whole_sections_of_another_kind(tmp_path, section, key, message):
    lines = [
        "schema: 1",
        "name: r",
        "base: {pipeline: ./x}",
        "operations: [{replace: cross-attention, with: {operator: pladis}}]",
    ]
    lines = [line for line in lines if line.split(":")[0] != section.split(":")[0]]
    path = write(tmp_path, "\n".join([*lines, section]) + "\n")
    found = problems_of(path)
    number = len(lines) + len(section.splitlines())
    assert any(f"{path}:{number} {key}: " in problem and message in problem for problem in found), found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("alpha: 0.99", "greater than or equal to 1"),
        ("alpha: .nan", "finite"),
        ("scale: .inf", "finite"),
        ("temperature: -1", "greater than 0"),
        ("alpha: true", "number"),
        ("scale: 1e-1", "that is text in YAML; write 0.1 without quotes"),
        ("scale: 1e20", "write 1.0e+20 without quotes"),
        ("scale: 1.0e+50", "less than or equal to"),
        ("temperature: 1.0e-50", "must be at least 1e-30"),
        ("alpha: null", "number"),
        ("alpha: [1.5]", "number"),
    ],
)
def test_numbers_out_of_range_or_of_another_type(tmp_path, change, message):
    key = change.split(":")[0]
    path = write(
        tmp_path, GOOD.replace("{operator: pladis, alpha: 1.5, scale: 2.0}", f"{{operator: pladis, {change}}}")
    )
    (problem,) = problems_of(path)
    assert f"{path}:8 operations[0].with.{key}" in problem and message in problem


def test_overrides(tmp_path):
    path = write(tmp_path, GOOD)
    overrides = ["operations.0.with.scale=1.5", "operations.0.layers=[up, mid]", "sampling.steps=7"]
    recipe = read_recipe(path, overrides).recipe
    assert recipe.operations[0].settings.scale == 1.5
    assert recipe.operations[0].layers == ["up", "mid"]
    assert recipe.sampling.steps == 7
    assert read_recipe(path, ["operations[0].with.scale=1.25"]).recipe.operations[0].settings.scale == 1.25
    assert read_recipe(path, ["operations.0.layers=*attn2"]).recipe.operations[0].layers == ["*attn2"]
    for override, message in (
        ("operations.0.with.alhpa=1", "--set operations.0.with.alhpa=1 operations[0].with.alhpa: unknown key; did you"),
        ("operations.3.with.scale=1", "there is no entry 3; operations has 1"),
        ("name.x=1", "name is a value and holds no keys"),
        ("scale", "is not KEY=VALUE"),
        ("operations.0.with.alpha=9", "--set operations.0.with.alpha=9 operations[0].with.alpha: is 9 but should be"),
    ):
        (problem,) = problems_of(path, [override])
        assert message in problem


def test_the_hash_is_of_what_it_says_not_of_its_spelling(tmp_path):
    first = read_recipe(write(tmp_path, GOOD))
    again = read_recipe(write(tmp_path, "# a comment\n" + GOOD.replace("alpha: 1.5, ", "")))
    other = read_recipe(write(tmp_path, GOOD), ["operations.0.with.scale=1.0"])
    assert first.hash == again.hash != other.hash


def test_an_unknown_name_and_a_missing_file():
    with pytest.raises(InputError, match="no recipe 'shpes' ships; did you mean \"shapes\""):
        read_recipe("shpes")
    with pytest.raises(InputError, match=r"there is no file .*nowhere\.yaml"):
        read_recipe("nowhere.yaml")


def test_every_shipped_recipe_is_valid_and_pins_by_whole_commits_if_at_all():
    assert set(shipped_recipes()) == {
        "shapes",
        "sd15",
        "sdxl",
        "sdxl_turbo",
        "sdxl_lightning",
        "sdxl_dmd2",
        "hyper_sdxl",
        "sdxl_gag",
        "sdxl_dmd2_gag",
        "pixart_sigma",
        "sana",
        "flux1_dev",
        "flux1_schnell",
        "flux2_dev",
        "flux2_klein_4b",
        "flux2_klein_9b",
        "sd35_medium",
        "sd35_large",
        "qwen_image",
        "qwen_image_2512",
        "ltx",
        "wan",
        "wan22_i2v",
        "wan22_t2v",
        "mochi",
        "hunyuan_video",
        "anima",
        "aura_flow",
        "bria32",
        "chroma",
        "cogview4",
        "cosmos2",
        "ernie_image",
        "fibo",
        "fibo2",
        "flux3_klein",
        "flux3_klein_base",
        "glm_image",
        "hunyuan_image",
        "hunyuan_video15",
        "kandinsky5",
        "kolors",
        "krea2_turbo",
        "longcat_image",
        "ltx2",
        "lumina2",
        "nucleus_moe",
        "ovis_image",
        "prx",
        "sana_sprint",
        "sana_video",
        "z_image",
        "z_image_turbo",
    }
    for name, path in shipped_recipes().items():
        recipe = read_recipe(name).recipe
        if name != "shapes":
            for part in (recipe.base, *recipe.base.loras, *filter(None, [recipe.base.components.unet])):
                assert part.revision is None or len(part.revision) == 40  # None: as apply finds it
        operator = recipe.operations[0].settings.operator
        assert yaml.safe_load(path.read_text())["name"] == f"{name.removesuffix('_gag').replace('_', '-')}-{operator}"


def test_timesteps_and_steps_must_agree(tmp_path):
    path = write(tmp_path, GOOD + "sampling: {steps: 5, timesteps: [999, 749, 499, 249]}\n")
    (problem,) = problems_of(path)
    assert f"{path}:9 sampling" in problem and "there are 4 timesteps" in problem
