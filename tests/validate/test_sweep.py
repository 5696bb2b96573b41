"""`surgery sweep`: a grid against one base, its front, its report, and what it cannot vary."""

import json
import re

import pytest

from surgery.errors import InputError
from surgery.recipe.plan import make_plan
from surgery.validate.axes import cells_of, parse_axis
from surgery.validate.store import locked
from surgery.validate.sweeping import pareto_front, sweep

from .test_validate import prompts  # noqa: F401 a fixture


def test_a_grid_is_scored_against_one_base(prompts, run, tmp_path):  # noqa: F811
    options = ["--set", "sampling.steps=2", "--prompts", prompts, "--metrics", "shape_alignment", "--out", tmp_path]
    grid = ["--alpha", "1.5", "2", "--scale", "0", "2"]
    done = json.loads(run("sweep", "shapes", *grid, *options, "--json", check=0).stdout)
    cells = {(cell["settings"]["alpha"], cell["settings"]["scale"]): cell for cell in done["cells"]}
    assert len(cells) == 4 and done["judged_by"] == "shape_alignment" and done["fidelity"] == "ssim"
    (base,) = done["bases"]
    assert base["name"] == "base" and base["metrics"][0]["paired"] is None
    for alpha in (1.5, 2.0):
        aligned, ssim = cells[alpha, 0.0]["metrics"]
        assert ssim["patched"] > 0.999 and aligned["tie_rate"] == 1 and cells[alpha, 0.0]["pareto"]
        assert aligned["base"] == base["metrics"][0]["value"] and aligned["verdict"] == "no difference"
        assert cells[alpha, 2.0]["metrics"][1]["patched"] < 0.99
    assert cells[1.5, 2.0]["metrics"] != cells[2.0, 2.0]["metrics"]
    written = json.loads((tmp_path / "sweep.json").read_text())
    assert written["cells"] == done["cells"] and written["schema_version"] == 2
    report = (tmp_path / "report.html").read_text()
    assert "alpha 1.5, scale 2" in report and report.count("data:image/png;base64,") == 5
    # Another grid over the same base draws the new cells alone.
    before = len(list(tmp_path.glob("images/*/batch-*/*.png")))
    again = run("sweep", "shapes", "--alpha", "2", "--scale", "1", "2", *options, check=0)
    assert "drawing 6 images" in again.stdout
    assert "Nothing here is better than the base on Shape alignment" in again.stdout
    assert "to have it" not in again.stdout
    assert len(list(tmp_path.glob("images/*/batch-*/*.png"))) == before + 6


@pytest.mark.parametrize(
    ("axes", "overrides", "match"),
    [
        ({}, [], "give at least one axis"),
        ({"alpha": [3.0]}, [], r"--set operations.0.with.alpha=3.0 operations\[0\].with.alpha: is 3.0 but"),
        ({"scale": [1.0]}, ["operations.0.with={operator: sparse}"], "operator sparse has no scale"),
        ({"layers": ["middle"]}, [], r"--set operations.0.layers=\[middle\]"),
        ({"scale": [1.0]}, ["operations.0.schedule={scale: [1.0, 2.0]}"], "the recipe's schedule sets scale"),
        ({"zetta": [1.0]}, [], "there is no such axis; did you mean zeta"),
        ({"operator": ["gagg"]}, [], "unknown operator 'gagg'"),
        ({"operator": ["pladis", "sparse"], "zeta": [0.0]}, [], "none of the operators has zeta"),
        ({"guidance": ["pog"]}, [], "pog"),
        ({"sampling.stepps": [2]}, [], "unknown key"),
        ({"scale": list(range(1001))}, [], "more than 1000 cells"),
    ],
)
def test_what_cannot_be_varied_is_told(axes, overrides, match, tmp_path):
    with pytest.raises(InputError, match=match):
        sweep("shapes", axes, overrides=overrides, given={"prompts": "shapes"}, out=tmp_path)
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("zeta=0,0.5", ("zeta", [0, 0.5])),
        ("eta=15,.inf", ("eta", [15, float("inf")])),
        ("layers=up,[down, mid]", ("layers", ["up", ["down", "mid"]])),
        ("guidance=null,{method: seg, scale: 2}", ("guidance", [None, {"method": "seg", "scale": 2}])),
    ],
)
def test_an_axis_is_written_as_yaml(text, expected):
    assert parse_axis(text) == expected


@pytest.mark.parametrize("text", ["zeta", "zeta=", "=1", "zeta=[1"])
def test_what_is_no_axis_is_told(text):
    with pytest.raises(InputError, match=f"--axis {re.escape(text)}: "):
        parse_axis(text)


def test_operators_take_the_axes_that_they_have():
    plan = make_plan("shapes", ["operations.0.with.scale=0.5"]).plan
    cells = cells_of(plan, {"zeta": [0, 1], "operator": ["pladis", "gag"], "guidance_scale": [1.0, 4.0]})
    assert [cell.name for cell in cells if cell.settings["guidance_scale"] == 1] == [
        "operator pladis, guidance_scale 1",
        "operator gag, zeta 0, guidance_scale 1",
        "operator gag, zeta 1, guidance_scale 1",
    ]
    assert len(cells) == 6
    # The recipe's own operator keeps the recipe's settings.
    assert cells[0].overrides == ("sampling.guidance_scale=1.0",) == cells[0].base_overrides
    gag = next(cell for cell in cells if cell.settings.get("zeta") == 1)
    made = make_plan("shapes", ["operations.0.with.scale=0.5", *gag.overrides]).plan.operations[0]
    assert (made["operator"], made["zeta"], made["scale"]) == ("gag", 1.0, 10.0)


def test_operators_and_samplings_share_the_images_of_their_bases(prompts, tmp_path):  # noqa: F811
    told = []
    done = sweep(
        "shapes",
        {"operator": ["pladis", "gag"], "guidance": [None, "apg"], "eta": [0.5, float("inf")]},
        overrides=["sampling.steps=1"],
        given={"prompts": str(prompts), "metrics": ["shape_alignment"], "limit": 2},
        out=tmp_path,
        announce=lambda *figures: told.append(figures),
    )
    assert [row.name for row in done.bases] == ["base, guidance none", "base, guidance apg"]
    assert done.bases[1].against == "base, guidance none" and done.bases[1].metric("ssim").value < 1
    for cell in done.cells:
        assert cell.row.against == f"base, guidance {cell.settings['guidance'] or 'none'}"
    assert len(done.cells) == 6 and told == [(0, 8, 16), (0, 8, 16)]  # for each guidance a base, PLADIS and two of GAG
    assert done.best is None and len({cell.metric("ssim").patched for cell in done.cells}) == 6


def test_layers_are_an_axis(prompts, tmp_path):  # noqa: F811
    given = {"prompts": str(prompts), "limit": 2, "metrics": ["shape_alignment"]}
    done = sweep("shapes", {"layers": ["up", "down,mid"]}, overrides=["sampling.steps=2"], given=given, out=tmp_path)
    assert [cell.name for cell in done.cells] == ["layers up", "layers down,mid"]
    up, rest = (cell.metric("ssim").patched for cell in done.cells)
    assert up != rest and max(up, rest) < 0.9999


def test_a_folder_of_somebody_elses_is_left_alone(prompts, tmp_path):  # noqa: F811
    mine = tmp_path / "artifact" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with locked(tmp_path), pytest.raises(InputError, match="another process is at work"):
        sweep("shapes", {"scale": [1.0]}, given={"prompts": str(prompts)}, out=tmp_path)
    assert mine.read_text() == "mine" and not list(tmp_path.glob("artifact-*"))


def test_long_patterns_that_begin_alike_are_two_cells(prompts, tmp_path):  # noqa: F811
    first = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"
    second = "up_blocks.0.attentions.{}.transformer_blocks.0.attn2"
    given = {"prompts": str(prompts), "limit": 2, "metrics": ["shape_alignment", "psnr"]}
    layers = [f"{first},{second.format(number)}" for number in (0, 1)]
    done = sweep("shapes", {"layers": layers}, overrides=["sampling.steps=2"], given=given, out=tmp_path)
    assert len({cell.metric("psnr").patched for cell in done.cells}) == 2


def test_the_front_holds_what_nothing_else_beats():
    points = [(0.9, 0.5), (0.8, 0.6), (0.8, 0.5), (0.5, 0.6), (0.9, 0.5)]
    assert pareto_front(points) == [True, True, False, False, True]
