"""The command line as its user meets it: exit status, messages, JSON, nothing heavy for --help."""

import json

import pytest

from ..conftest import SHAPES


def test_help_and_recipes_import_neither_torch_nor_diffusers(run):
    code = (
        "import sys\n"
        "from surgery.cli import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'pydantic', 'rich'} & set(sys.modules)\n"
        "print('HEAVY', sorted(heavy))\n"
    )
    for arguments in (["--help"], ["apply", "--help"]):
        assert "HEAVY []" in run(*arguments, python=code, fresh=True, check=0).stdout
    heavy = run("recipes", python=code, fresh=True, check=0).stdout
    assert "torch" not in heavy.split("HEAVY")[1] and "sdxl_dmd2" in heavy


def test_apply_plan_inspect_and_generate(run, tmp_path):
    done = run("apply", "shapes", cwd=tmp_path, check=0)
    assert "7 of 14 attention modules" in done.stdout and "artifact: out/shapes-pladis" in done.stdout
    plan = json.loads(run("plan", "shapes", "--json", check=0).stdout)
    assert plan["totals"]["replaced"] == 7 and plan["totals"]["rewritten_bytes"] == 0 < plan["totals"]["weight_bytes"]
    table = run("plan", "shapes", "--set", "operations.0.layers=mid", check=0).stdout
    assert "replaced: 1 of 14" in table and "no operation selects it" in table and plan["plan_hash"] not in table
    inspected = json.loads(run("inspect", "out/shapes-pladis", "--json", cwd=tmp_path, check=0).stdout)
    assert not inspected["fits"] and inspected["sites"][1]["operation"]["alpha"] == 1.5
    assert "7 modules can be replaced" in run("inspect", SHAPES, check=0).stdout
    prompts = ["a red circle", "two green stars"]
    options = ["--steps", "2", "--images", "2", "--seed", "7", "--json"]
    made = json.loads(run("generate", "out/shapes-pladis", *prompts, *options, cwd=tmp_path, check=0).stdout)
    assert made["columns"] == ["base", "patched"] and made["seeds"] == [7, 8] and made["sampling"]["steps"] == 2

    from PIL import Image

    picture = Image.open(tmp_path / "out/images.png")
    assert picture.width > 4 * 160 and picture.height > 2 * 160
    plain = json.loads(run("generate", SHAPES, "a red circle", "--steps", "2", "--height", "64", "--width", "64",
                           "--out", tmp_path / "plain.png", "--json", check=0).stdout)  # fmt: skip
    assert plain["columns"] == ["image"]


def test_base_and_patched_pictures_are_of_base_and_patched():
    import surgery
    from surgery.runtime.draw import base_and_patched, generate
    from surgery.runtime.sheet import picture

    from ..conftest import load_shapes

    sampling = {"steps": 3, "guidance_scale": 4.0, "height": 64, "width": 64}
    prompts, seeds = ["a red\ncircle", "two green stars"], [3, 4]
    base, patched = base_and_patched(surgery.patch(load_shapes()), prompts, seeds, sampling)
    plain = generate(load_shapes(), prompts, seeds, sampling)
    for job, image in plain.items():
        assert image.tobytes() == base[job].tobytes() != patched[job].tobytes()
    sheet = picture({"base": base, "patched": patched}, prompts, seeds)
    assert sheet.width > 4 * 160


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["apply", "shpes"], 2, 'did you mean "shapes"'),
        (["apply", "nowhere.yaml"], 2, "there is no file nowhere.yaml"),
        (["apply", "shapes", "--set", "operations.0.with.alpha=7"], 2, "is 7 but should be less than or equal to 2"),
        (["plan", "shapes", "--set", "operations.0.layers=upp"], 2, 'did you mean "up"'),
        (["inspect", "./nowhere"], 2, "there is no folder nowhere"),
        (["generate", "./nowhere", "x"], 2, "there is no folder nowhere"),
        (["generate", SHAPES, "x", "--out", "x.jpg"], 2, "must name a .png file"),
        (
            ["generate", SHAPES, "x", "--steps", "0", "--height", "65"],
            2,
            "height: input should be a multiple of 8, not 65",
        ),
        (["generate", SHAPES, "x", "--device", "meta"], 2, "--device meta cannot be used here"),
        (
            ["generate", SHAPES, "x", "--seed", "9" * 20, "--height", "64", "--width", "64"],
            2,
            "a seed must fit 64 bits",
        ),
        (["generate", SHAPES, "x", "--steps", "2000"], 2, "steps must be at most 1000, not 2000"),
        (["plan", "--json"], 2, "the following arguments are required: RECIPE"),
        (["generate", SHAPES, "x", "--images", "0"], 2, "--images must be at least 1"),
        (["generate", SHAPES, "x", "--device", "cuda:99"], 2, "--device cuda:99 cannot be used here"),
        (["aply", "shapes"], 2, "invalid choice: 'aply'"),
        (["--nothing"], 2, "unrecognized arguments: --nothing"),
    ],
)
def test_bad_input_is_one_message_and_no_traceback(run, tmp_path, arguments, status, message):
    done = run(*arguments, cwd=tmp_path, check=status)
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_errors_as_json_and_with_debug(run):
    done = run("apply", "shapes", "--set", "operations.0.with.alhpa=7", "--json", check=2)
    assert json.loads(done.stdout)["problems"][0].endswith('unknown key; did you mean "alpha"?')
    assert "Traceback" in run("apply", "shpes", "--debug", check=2).stderr


def test_an_existing_artifact_needs_force(run, tmp_path):
    run("apply", "shapes", "--out", tmp_path / "x", check=0)
    assert "--force replaces it" in run("apply", "shapes", "--out", tmp_path / "x", check=2).stderr
    run("apply", "shapes", "--out", tmp_path / "x", "--force", check=0)


def test_an_engine_that_cannot_be_built_here_is_left_out_and_said_to_be(run, tmp_path):
    sections = ["--set", "export=[{target: tensorrt}]"]
    done = run("apply", "shapes", "--out", tmp_path / "x", *sections, check=0)
    assert "not built here: an engine for tensorrt: there is no NVIDIA GPU" in done.stdout
    assert "target: tensorrt" in (tmp_path / "x/recipe.yaml").read_text()


def test_doctor_tells_no_secret(run):
    done = run("doctor", env={"HF_TOKEN": "hf_" + "secret" * 5}, check=0)
    assert "torch" in done.stdout and "cpu" in done.stdout
    found = run("doctor", "--json", env={"HF_TOKEN": "hf_" + "secret" * 5}, check=0).stdout
    assert json.loads(found)["hub"]["logged_in"] is True
    assert "secret" not in done.stdout + done.stderr + found


def test_a_reader_that_leaves_is_no_error(run):
    code = (
        "import os, sys\n"
        "from surgery.cli import main\n"
        "reader, writer = os.pipe()\n"
        "os.dup2(writer, 1)\n"
        "os.close(reader)\n"
        "raise SystemExit(main(['plan', 'shapes', '--json']))\n"
    )
    done = run(python=code, check=0)
    assert "Traceback" not in done.stderr
