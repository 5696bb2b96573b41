"""What somebody meets in the first hour: the overview, the version, a new recipe, tables of 80 columns, plain words."""

import json
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import yaml
from PIL import Image

import surgery
from surgery.cli.main import VERBS
from surgery.recipe.json_schema import schema_text
from surgery.recipe.reading import read_recipe, shipped_recipes

from ..conftest import SHAPES

RECIPES = SHAPES.parent


def test_bare_surgery_shows_every_verb_and_knows_its_version(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    wide = run(check=0).stdout.splitlines()
    monkeypatch.setenv("COLUMNS", "80")
    done = run(check=0)
    assert 80 < max(map(len, wide)) <= 120 and len(wide) < len(done.stdout.splitlines())
    assert all(f"  {verb} " in done.stdout for verb in VERBS) and "usage: surgery VERB" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert run("--version", check=0).stdout == f"surgery {surgery.__version__}\n"
    assert "complete" in run("--print-completion", "bash", check=0).stdout
    assert "-o OUT" in run("schema", "--help", check=0).stdout or "-o FILE" in run("schema", "--help", check=0).stdout


def test_threads_spin_a_little_unless_told_otherwise_and_torch_is_not_there_yet(run, monkeypatch):
    program = """if True:
        import os, sys
        from surgery.cli.main import main
        main(["recipes", "shapes"])
        print(os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules)
    """
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    assert run(python=program, fresh=True, check=0).stdout.endswith("10000 False\n")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert run(python=program, fresh=True, check=0).stdout.endswith("None False\n")


def test_tables_are_as_wide_as_columns_says_and_group_modules(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for arguments in (["inspect", SHAPES], ["plan", "shapes"], ["recipes"], ["doctor"], ["reproduce"]):
        done = run(*arguments, check=0)
        lines = done.stdout.splitlines()
        assert max(len(line) for line in lines if "\u2500" in line) <= 80, arguments
    brief, long = run("inspect", SHAPES).stdout, run("inspect", SHAPES, "-v").stdout
    assert "attn2" not in brief and long.count("can be replaced") == 8 and "7 modules can be replaced" in brief
    assert brief.count("sparsifying it destroys the image") == long.count("sparsifying it destroys the image") == 1
    blocks = [line.split()[0] for line in brief.splitlines() if "can be replaced" in line]
    assert blocks == ["down", "down", "mid", "up", "up", "surgery"]


def test_a_recipe_that_ships_is_printed_or_copied(run, tmp_path):
    text = (RECIPES / "sdxl.yaml").read_text()
    assert run("recipes", "sdxl", check=0).stdout == text
    run("recipes", "sdxl", "-o", tmp_path / "mine.yaml", check=0)
    assert (tmp_path / "mine.yaml").read_text() == text
    assert "is there already" in run("recipes", "sdxl", "-o", tmp_path / "mine.yaml", check=2).stderr
    assert 'did you mean "sdxl"?' in run("recipes", "sdlx", check=2).stderr
    listed = json.loads(run("recipes", "--json", check=0).stdout)
    assert listed["schema_version"] == 1 and listed["recipes"].keys() == shipped_recipes().keys()


@pytest.mark.parametrize("operator", ["pladis", "gag", "anderson_history"])
def test_a_new_recipe_plans_as_it_stands(operator, run, tmp_path):
    done = run("new", SHAPES, "--operator", operator, "--out", tmp_path / "a" / "own.yaml", "--json", check=0)
    assert json.loads(done.stdout)["replaced"] == 7
    text = (tmp_path / "a" / "own.yaml").read_text()
    planned = json.loads(run("plan", tmp_path / "a" / "own.yaml", "--json", check=0).stdout)
    assert planned["operations"][0]["operator"] == operator and "# of the sparse map" in text
    # What stands there as a comment is right too.
    (tmp_path / "all.yaml").write_text(
        text.replace("sampling: {}", "sampling:").replace("\n  # ", "\n  ").replace("\n    # ", "\n    ")
        .replace("\n# guidance", "\nguidance").replace("\n# validate", "\nvalidate")
    )  # fmt: skip
    written = yaml.safe_load((tmp_path / "all.yaml").read_text())
    assert written["sampling"]["steps"] == 25 and written["operations"][0]["schedule"] == {"fraction": [0.0, 0.8]}
    assert written["guidance"]["method"] == "pag" and written["base"]["loras"]
    read_recipe(tmp_path / "all.yaml")
    jsonschema.validate(written, json.loads(schema_text()))


def test_a_new_recipe_is_refused_where_it_cannot_be(run, tmp_path):
    for arguments, says in (
        ([SHAPES, "--operator", "pladsi"], "pladsi"),
        (["shaeps"], "there is no folder shaeps"),
        ([SHAPES, "--out", "x.txt"], "--out must name a .yaml file"),
        ([SHAPES / "unet"], "model_index.json"),
    ):
        done = run("new", *arguments, cwd=tmp_path)
        assert done.returncode == 2 and says in done.stderr, (arguments, done.stderr)
    assert not list(tmp_path.iterdir())


def test_the_schema_that_ships_is_the_codes_and_takes_every_recipe():
    schema = json.loads((RECIPES / "schema.json").read_text())
    assert schema == json.loads(schema_text()), "surgery schema --out recipes/schema.json writes it anew"
    checker = jsonschema.Draft202012Validator(schema)
    for name, path in shipped_recipes().items():
        text = path.read_text()
        assert text.startswith("# yaml-language-server: $schema=schema.json\n"), name
        assert not list(checker.iter_errors(yaml.safe_load(text))), name
    wrong = {"schema": 1, "name": "x", "base": {"pipeline": "a/b"}, "operations": []}
    for operation in ({"replace": "cross-attention"}, {"replace": "x", "with": {"operator": "pladis"}}):
        assert list(checker.iter_errors({**wrong, "operations": [operation]}))
    layers = {"replace": "cross-attention", "layers": "mid", "with": {"operator": "gag", "zeta": 0.5}}
    right = {**wrong, "operations": [layers]}
    for guidance in (
        "pag",
        {"method": "seg", "layers": "all"},
        {"method": "slg", "layers": ["mid"], "sigma": [0, 5.0]},
    ):
        assert not list(checker.iter_errors({**right, "guidance": guidance}))
    assert list(checker.iter_errors({**right, "guidance": "pga"}))


def test_what_is_not_there_is_told_before_anything_heavy_is_imported(tmp_path):
    import subprocess

    (tmp_path / "out" / "shapes").mkdir(parents=True)
    code = (
        "import sys\nfrom surgery.cli import main\nfor line in sys.stdin:\n"
        "    print(main(line.split()), [one for one in ('torch', 'diffusers') if one in sys.modules])"
    )
    told = {
        "inspect nosuch": "there is no folder nosuch;",
        "inspect ./out/shape": "did you mean",
        "generate ./nosuch x": "there is no folder",
        "validate ./nosuch": "there is no folder",
        "verify ./nosuch": "there is no folder",
        "serve ./nosuch": "there is no folder",
        "attention-maps ./nosuch x": "there is no folder",
        "diagnose ./nosuch --prompts x": "there is no folder",
        "push ./nosuch --repo a/b": "nosuch",
        "time ./nosuch": "there is no folder",
        "time nosuch.yaml": "there is no file nosuch.yaml",
        "plan nosuch": "no recipe 'nosuch' ships",
        "apply nosuch": "no recipe 'nosuch' ships",
        "sweep nosuch.yaml": "there is no file nosuch.yaml",
        "reproduce nosuch": "",
    }
    lines = "".join(f"{line}\n" for line in told)
    done = subprocess.run([sys.executable, "-c", code], input=lines, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["2 []"] * len(told), done.stdout + done.stderr
    assert all(says in done.stderr for says in told.values()), done.stderr


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: x\n", "write `schema: 1`"),
        ('schema: 1\nname: "my thing"\n', "may hold letters, digits, - . and _ alone"),
        ("schema: 1\nname: [x\n", "x.yaml:3:1"),
    ],
)
def test_a_recipe_with_a_mistake_is_told_what_to_write(text, says, run, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    assert says in run("plan", "x.yaml", cwd=tmp_path, check=2).stderr


def test_dtypes_go_by_the_same_words_everywhere(run, shapes_artifact):
    for verb in ("validate", "serve", "time", "export"):
        done = run(verb, shapes_artifact, "--dtype", "fp8", check=2)
        assert "'fp8' is none of float32, float16, bfloat16, fp32, fp16, bf16" in done.stderr


def test_verify_says_that_a_folders_weights_were_compared_with_nothing(run, shapes_artifact):
    done = run("verify", Path(shapes_artifact), check=0)
    assert (
        "verified, but for weights that there is no base to compare with: text_encoder/model.safetensors, unet/"
        in done.stdout
    )


def test_doctor_lists_every_extra_with_what_it_is_for(run):
    found = json.loads(run("doctor", "--json", check=0).stdout)["extras"]
    project = tomllib.loads((RECIPES.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["optional-dependencies"].keys() - {"dev", "docs", "mutants"} == found.keys()
    is_there = any(one.name.lower().replace("_", "-") == "torch-tensorrt" for one in metadata.distributions())
    assert found["tensorrt"]["lacks"] == ([] if is_there else ["torch-tensorrt"])
    assert found["validate"]["lacks"] == [] and all(one["for"] for one in found.values())


def test_generate_takes_settings_keeps_each_image_and_replaces_nothing_unasked(run, shapes_artifact, tmp_path):
    small = ["--images", "1", "--steps", "2", "--height", "64", "--width", "64", "--threads", "1", "--json"]

    def drawn(*given, check=0):
        done = run("generate", shapes_artifact, "a red circle", *small, *given, cwd=tmp_path, check=check)
        return json.loads(done.stdout) if check == 0 else done.stderr

    first = drawn()
    folder = Path(first["folder"])
    assert first["file"] == "out/images.png" and first["schema_version"] == 1
    assert sorted(path.name for path in (tmp_path / folder).iterdir()) == ["base-0-0.png", "patched-0-0.png"]
    off = drawn("--scale", "0")  # is the base
    assert off["file"] == "out/images-2.png" and off["set"] == {"scale": 0.0}
    base, patched, same = (
        np.asarray(Image.open(tmp_path / "out" / name), int)
        for name in ("images/base-0-0.png", "images/patched-0-0.png", "images-2/patched-0-0.png")
    )
    assert abs(same - base).max() <= 1 < abs(patched - base).max()
    again = drawn("--set", "scale=1", "--negative-prompt", "blue", "--dtype", "bf16", "--out", "x.png")
    assert again["sampling"]["negative_prompt"] == "blue"
    assert "x.png is there already; name another, or replace it with --force" in drawn("--out", "x.png", check=2)
    drawn("--out", "x.png", "--force")
    for wrong, says in (("scal=2", "scal"), ("scale", "write NAME=NUMBER"), ("scale=x", "write NAME=NUMBER")):
        assert says in drawn("--set", wrong, check=2)
