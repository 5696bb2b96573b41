"""`plan`, `inspect` and `new` answer the same where what they have no use for looks absent (surgery/cli/light.py)."""

import ast
import json
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

import pytest

from surgery.cli import light
from surgery.recipe.reading import shipped_recipes

from ..conftest import SHAPES
from ..nn.backbones import FAMILIES
from ..quick import quick

# What diffusers imports with the class of a model and a light process has all the same.
KEPT = {
    *("PIL", "huggingface_hub", "importlib_metadata", "numpy", "packaging", "requests", "safetensors", "torch", "tqdm"),
    *("typing_extensions", "yaml"),
    *("torch_npu", "torch_xla"),  # devices
    "flash_attn_interface",  # asked for as flash_attn_3
}
# Commands are carried out one after the other in one process; python starts light, or forks with everything there.
BOTH = """
import contextlib, io, json, os, sys
from surgery.cli import light, main
from surgery.cli.main import build_parser

hidden, commands = json.load(open(sys.argv[1]))
if hidden:
    light.hide()

def exchanged(program, arguments):
    raise KeyError("again in full")

os.execv = exchanged

def refused(name):
    raise AssertionError(f"{name} stands for a class of diffusers that needs what is hidden")

def answer(command):
    out, errors = (io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            status = main(command)
        except KeyError as again:
            status = str(again)
    diffusers = sys.modules.get("diffusers")
    if hidden and diffusers and "_get_module" not in vars(diffusers):
        real = diffusers._get_module
        diffusers._get_module = lambda name: (refused if name.startswith("utils.dummy") else real)(name)
    return [status, *(stream.buffer.getvalue().decode() for stream in (out, errors))]

fits = [light.is_enough_for(build_parser().parse_args(command)) for command in commands]
found = [answer(command) for command, one in zip(commands, fits) if one]
print(json.dumps({"fits": fits, "found": found, "modules": sorted(name for name, one in sys.modules.items() if one)}))
"""


@pytest.fixture
def answers(run, tmp_path):
    """answers(commands, hidden): {"fits": of each, "found": [status, output, errors] of what fits, "modules"}."""

    def answers(commands, hidden):
        (tmp_path / "commands.json").write_text(json.dumps([hidden, [[*map(str, one)] for one in commands]]))
        return json.loads(run(tmp_path / "commands.json", python=BOTH, fresh=hidden, check=0).stdout)

    return answers


@pytest.fixture(scope="module", params=quick(["some", "shapes", "others"], "some"))
def commands(request, shapes_artifact, tmp_path_factory):
    """Commands: with some or all of the shipped recipes on the shapes pipeline, or on every backbone's tiny model."""
    if request.param != "others":
        step = 6 if request.param == "some" else 1
        plan = ["plan", "shapes", "--json", "--set"]
        return [
            ["inspect", SHAPES, "--json"],
            ["plan", "shapes"],
            *(
                ["plan", name, "--json", "--set", f"base={{pipeline: {SHAPES}}}"]
                for name in list(shipped_recipes())[::step]
            ),
            [*plan, "guidance={method: pag, layers: [mid]}"],
            ["inspect", shapes_artifact],
            ["new", SHAPES, "--out", "-"],
            # refusals
            [*plan, "operations.0.layers=nosuch"],
            [*plan, "operations.0.with.operator=pladdis", "--set", "operations.0.layers=nosuch"],
            [*plan, "base.components={transformer: {file: x.safetensors}}"],
            [*plan, f"base.pipeline={shapes_artifact}"],  # is patched already
        ]
    folder, commands = tmp_path_factory.mktemp("tiny"), []
    for family in FAMILIES:
        pipeline, _ = family.build()
        pipeline.save_pretrained(folder / family.name)
        recipe = {"schema": 1, "name": family.name, "base": {"pipeline": f"./{family.name}"}}
        kind = "joint" if family.is_joint else "cross"
        recipe["operations"] = [{"replace": f"{kind}-attention", "with": {"operator": "pladis"}}]
        (folder / f"{family.name}.yaml").write_text(json.dumps(recipe))
        commands += [["inspect", folder / family.name, "--json"], ["plan", folder / f"{family.name}.yaml", "--json"]]
    return commands


def test_every_answer_is_the_one_of_a_process_that_has_everything(commands, answers):
    bare, whole = answers(commands, hidden=True), answers(commands, hidden=False)
    assert bare["fits"] == whole["fits"] and sum(bare["fits"]) > len(commands) * 0.7
    again, light_ones = [], [command for command, fits in zip(commands, bare["fits"], strict=True) if fits]
    for command, one, other in zip(light_ones, bare["found"], whole["found"], strict=True):
        if "again in full" in str(one[0]):
            again.append(command)
            assert other[0] != 0, f"{command} works, but not in a light process: {other}"
        else:
            assert one == other, command
    # What no recipe is at fault for is told by a process that has everything.
    assert all(command[-1].startswith("base.pipeline") for command in again), again
    absent = {name for name in light.ABSENT if name in bare["modules"]}
    assert not absent and not any(name.startswith("torch._dynamo.") for name in bare["modules"])
    assert whole["modules"] and {"peft", "transformers"} < set(whole["modules"])


def test_what_diffusers_imports_with_a_model_is_hidden_or_known(answers):
    """Where an upgrade imports something more it says what: hide it, or keep it where a verb needs it."""
    asked = (Path(util.find_spec("diffusers").origin).parent / "utils" / "import_utils.py").read_text()
    assert [name for name in light.ABSENT if f'"{name}"' not in asked] == [], "diffusers asks for these no more"
    own = [name for name in answers([["inspect", SHAPES]], hidden=True)["modules"] if name.startswith("diffusers.")]
    assert len(own) > 100
    for name in own:
        path = Path(sys.modules[name].__file__ if name in sys.modules else util.find_spec(name).origin)
        imported = set(packages_of(ast.parse(path.read_text())))
        unknown = imported - KEPT - set(light.ABSENT) - set(sys.stdlib_module_names) - {"diffusers"}
        assert not unknown, f"diffusers {metadata.version('diffusers')}'s {name} imports {unknown}"


def packages_of(tree):
    """The packages that a module imports as it is imported itself."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield from packages_of(node)


@pytest.mark.parametrize(
    ("recipe", "fits"),
    [
        ("shapes", True),
        ("sdxl_gag", True),
        ("hyper_sdxl", False),  # a LoRA
        ("sdxl_dmd2", False),  # a scheduler
        ("sdxl_lightning", False),
        ("wan", False),  # as many frames as its pipeline draws
    ],
)
def test_what_looks_at_a_pipeline_a_scheduler_or_a_lora_starts_in_full(recipe, fits):
    from surgery.cli.main import build_parser

    arguments = build_parser().parse_args(["plan", recipe])
    assert light.is_enough_for(arguments) == fits
    if fits:
        for override in (
            "base.loras=[{file: x}]",
            "sampling.timesteps=[1]",
            "guidance={weak: {pipeline: a/b}}",
            "base=3",
        ):
            assert not light.is_enough_for(build_parser().parse_args(["plan", recipe, "--set", override]))
    assert not light.is_enough_for(build_parser().parse_args(["apply", recipe]))


def test_an_error_that_may_come_of_it_is_told_by_a_process_that_has_everything():
    """As often as once, with the same arguments, and only once torch was imported."""
    code = (
        "import os, sys, types\n"
        "from surgery.cli import light\n"
        "from surgery.cli.main import build_parser\n"
        "from surgery.errors import RecipeError\n"
        "light.begin(build_parser().parse_args(sys.argv[1:]))\n"
        "print('peft' in sys.modules, sys.argv, flush=True)\n"
        "light.again(KeyError())\n"
        "sys.modules['torch'] = types.ModuleType('torch')\n"
        "light.again(RecipeError([]))\n"
        "light.again(KeyError())\n"
        "print('told')\n"
    )
    command = [sys.executable, "-c", code, "inspect", "./x y"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    assert told == [f"{hidden} ['-c', 'inspect', './x y']" for hidden in (True, False)] + ["told"]


@pytest.mark.slow
def test_the_command_itself_starts_light_and_again_where_it_fails(tmp_path):
    def surgery(*arguments):
        command = [sys.executable, "-X", "importtime", "-m", "surgery", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        lines = done.stderr.splitlines()
        starts = [sum(line.endswith(f" {name}") for line in lines) for name in ("torch", "peft")]
        return done, starts, [line for line in lines if not line.startswith("import time:")]

    done, starts, told = surgery("plan", "shapes", "--json")
    assert (done.returncode, starts, told) == (0, [1, 0], []) and json.loads(done.stdout)["totals"]["replaced"] == 7
    for component in ("unet", "scheduler", "vae"):
        (tmp_path / component).mkdir()
    (tmp_path / "unet" / "config.json").write_text(
        json.dumps({**json.loads((SHAPES / "unet" / "config.json").read_text()), "norm_num_groups": 7})
    )
    (tmp_path / "model_index.json").write_text((SHAPES / "model_index.json").read_text())
    done, starts, told = surgery("inspect", tmp_path)
    assert (done.returncode, starts, done.stdout) == (1, [2, 1], "") and len(told) == 1 and "cannot build" in told[0]
