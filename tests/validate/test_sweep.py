"""`surgery sweep`: a grid against one base, its front, its report, and what it cannot vary."""

import json

import pytest

from surgery.errors import InputError
from surgery.validate.store import locked
from surgery.validate.sweeping import pareto_front, sweep

from .test_validate import prompts  # noqa: F401 a fixture


def test_a_grid_is_scored_against_one_base(prompts, run, tmp_path):  # noqa: F811
    options = ["--set", "sampling.steps=2", "--prompts", prompts, "--metrics", "shape_alignment", "--out", tmp_path]
    grid = ["--alpha", "1.5", "2", "--scale", "0", "2"]
    done = json.loads(run("sweep", "shapes", *grid, *options, "--json", check=0).stdout)
    cells = {(cell["settings"]["alpha"], cell["settings"]["scale"]): cell for cell in done["cells"]}
    assert len(cells) == 4 and done["judged_by"] == "shape_alignment" and done["fidelity"] == "ssim"
    for alpha in (1.5, 2.0):
        aligned, ssim = cells[alpha, 0.0]["metrics"]
        assert ssim["patched"] > 0.999 and aligned["tie_rate"] == 1 and cells[alpha, 0.0]["pareto"]
        assert cells[alpha, 2.0]["metrics"][1]["patched"] < 0.99
    assert cells[1.5, 2.0]["metrics"] != cells[2.0, 2.0]["metrics"]
    written = json.loads((tmp_path / "sweep.json").read_text())
    assert written["cells"] == done["cells"] and written["artifact_hash"]
    report = (tmp_path / "report.html").read_text()
    assert "alpha 1.5, scale 2" in report and report.count("data:image/png;base64,") == 3
    # Another grid over the same base draws the new cells alone.
    before = len(list(tmp_path.glob("images/*/batch-*/*.png")))
    again = run("sweep", "shapes", "--alpha", "2", "--scale", "1", "2", *options, check=0)
    assert "drawing 6 images" in again.stdout and "chosen on these prompts" in again.stdout
    assert "surgery apply shapes --set sampling.steps=2 --set operations.0.with.alpha=2.0 --set oper" in again.stdout
    assert len(list(tmp_path.glob("images/*/batch-*/*.png"))) == before + 6


@pytest.mark.parametrize(
    ("axes", "overrides", "match"),
    [
        ({}, [], "give at least one of --alpha, --scale, --temperature, --layers"),
        ({"alpha": [3.0]}, [], "alpha must"),
        ({"scale": [1.0]}, ["operations.0.with={operator: sparse}"], "operator sparse has no scale"),
        ({"layers": ["middle"]}, [], "--layers middle"),
        ({"scale": [1.0]}, ["operations.0.schedule={scale: [1.0, 2.0]}"], "the recipe's schedule sets scale"),
    ],
)
def test_what_cannot_be_varied_is_told(axes, overrides, match, tmp_path):
    with pytest.raises(InputError, match=match):
        sweep("shapes", axes, overrides=overrides, given={"prompts": "shapes"}, out=tmp_path)
    assert not (tmp_path / "images").exists()


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
