"""`surgery reproduce` end to end on the shapes model, and what it refuses before anything is drawn."""

import json
from dataclasses import replace

import pytest

from surgery.papers import reproducing
from surgery.papers.entries import entries_of
from surgery.papers.manifest import read_table, table_names
from surgery.papers.reproducing import reproduce
from surgery.papers.task import Given

from ..conftest import SHAPES
from ..loopback_hub import environment, hub_server

QUICK = ("gag-table-6", "gag-figure-15")  # the second has two of the first's sides


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """One folder for all tables: what two of them have is drawn once."""
    return tmp_path_factory.mktemp("papers")


def check(name, out, run, limit=2):
    """Draw a table on the shapes model by the command, and read what it wrote."""
    done = run("reproduce", name, "--on", "shapes", "--limit", str(limit), "--out", out, "--json", check=0)
    said, folder = json.loads(done.stdout), out / f"{name}-on-shapes"
    assert said == json.loads((folder / "result.json").read_text())
    table = read_table(name)
    assert said["kind"] == table.kind and said["on"] == "shapes" and said["comparable"] is False
    rows = {row["name"]: row["cells"] for row in said["rows"]}
    assert len(rows) == sum(len(values) for row in table.rows for values in row.over.values() or [[0]])
    for row in table.rows:
        papers = {(cell["prompts"], cell["column"]): cell["paper"] for cell in rows.get(row.name, [])}
        for prompts, figures in row.reported.items():
            assert {column: papers[prompts, column] for column in figures} == figures
    ours = [cell["ours"] for cells in rows.values() for cell in cells if cell["ours"]]
    measures = any(part.metrics for part in table.sets.values()) or table.kind == "time"
    assert bool(ours) == measures and not [c for cells in rows.values() for c in cells if c["reproduced"]]
    assert all((folder / path).exists() for path in said["files"].values()) and (said["files"] or ours)
    page, text = (folder / "result.html").read_text(), (folder / "result.md").read_text()
    assert "are not comparable" in page and "are not comparable" in text and table.title in text
    return said


@pytest.mark.parametrize("name", QUICK)
def test_a_table_and_a_figure(name, out, run):
    said = check(name, out, run)
    assert [row["name"] for row in said["rows"]] == [row.name for row in read_table(name).rows]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in table_names() if name not in QUICK])
def test_every_other_one(name, out, run):
    check(name, out, run, 8)


class Cut(Exception):
    pass


def test_a_run_that_was_cut_short_goes_on_and_draws_nothing_twice(tmp_path, monkeypatch):
    """GAG's Figure 14: one model with and without NAG's guidance, so two drawings, of three sides and of one."""

    def of_two_steps(table, on):
        return tuple(replace(one, overrides=(*one.overrides, "sampling.steps=2")) for one in entries_of(table, on))

    monkeypatch.setattr(reproducing, "entries_of", of_two_steps)
    seen = []

    def cut(there, lacking, batch):
        seen.append((there, lacking))
        if len(seen) == 2:
            raise Cut

    def given(announce):
        return Given(on="shapes", limit=2, out=tmp_path, announce=announce)

    with pytest.raises(Cut):
        reproduce("gag-figure-14", given(cut))
    assert not (tmp_path / "gag-figure-14-on-shapes" / "result.json").exists()
    (_, before), *_ = seen
    later = []
    done = reproduce("gag-figure-14", given(lambda *told: later.append(told[1])))
    assert 0 < before < 8 and sum(later) == 8 - before  # four sides of two images
    again = []
    assert reproduce("gag-figure-14", given(lambda *told: again.append(told))).to_json() == done.to_json() and not again


@pytest.fixture
def hub_run(run, tmp_path):
    """`surgery ...` against a Hub that has FLUX.1 [dev], gated, and no other model."""
    with hub_server() as server:
        server.repositories["black-forest-labs/FLUX.1-dev"] = SHAPES
        server.gated.add("black-forest-labs/FLUX.1-dev")
        yield lambda *arguments: run(*arguments, env=environment(server, tmp_path / "home"))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gag-figure-13", ["black-forest-labs/FLUX.1-dev is gated", "accept its terms", "hf auth login"]),
        ("gag-figure-17", ["there is no model repository Qwen/Qwen-Image-2512", "hf auth login"]),
    ],
)
def test_a_model_that_cannot_be_had_is_named_before_anything_is_drawn(name, says, hub_run, tmp_path):
    done = hub_run("reproduce", name, "--limit", "2", "--out", tmp_path / "out")
    assert done.returncode in (1, 2) and "nothing was drawn" in done.stderr
    assert all(part in done.stderr for part in says), done.stderr
    assert not list(tmp_path.glob("out/**/*.png"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["pladis-tabel-2"], 'did you mean "pladis-table-2"?'),
        (["oseg-table-4"], "cannot be drawn"),
        (["oseg-table-4", "--plan"], "cannot be drawn"),
        (["gag-table-6", "--limit", "0"], "--limit must be at least 1"),
        (["oseg-table-3", "--on", "nothing"], "invalid choice"),
    ],
)
def test_bad_input(arguments, says, run):
    done = run("reproduce", *arguments)
    assert done.returncode == 2 and says in done.stderr


def test_the_list_and_a_plan_ask_nobody(run):
    listed = json.loads(run("reproduce", "--json", check=0).stdout)["tables"]
    assert [entry["name"] for entry in listed] == table_names()
    assert {entry["name"]: entry["gpu_hours"] for entry in listed}["gag-table-3"] == "not measured"
    plan = json.loads(run("reproduce", "pladis-table-6", "--plan", "--json", check=0).stdout)
    assert plan["images"] == 8 * 5 * (200 + 400 + 500) and len(plan["rows"]) == 8
    files = {part["what"] for part in plan["fetched"]}
    assert {"Hyper-SDXL-1step-Unet.safetensors", "dmd2_sdxl_1step_unet_fp16.bin", "prompts hpd"} <= files
    shown = run("reproduce", "pladis-table-6", "--plan", check=0).stdout
    assert "w + 1" in run("reproduce", "pladis-table-8", "--plan", check=0).stdout and "44,000 images" in shown
