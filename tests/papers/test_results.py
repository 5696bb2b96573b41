"""What a table says: verdicts, the row compared with, Markdown and HTML that hold hostile names."""

import json
from pathlib import Path

import pytest

from surgery.papers.costs import Cost
from surgery.papers.manifest import Manifest
from surgery.papers.page import html, markdown
from surgery.papers.results import Measured, Reproduction, result_rows, verdict

HOSTILE = "<script>alert(1)</script>|x"


@pytest.mark.parametrize(
    ("paper", "interval", "said"),
    [
        (-4.38, (-5.0, -0.1), "yes"),
        (-4.38, (0.1, 5.0), "no"),
        (-4.38, (-5.0, 0.1), "cannot tell"),
        (0.70, (0.0, 0.2), "cannot tell"),
        (0.70, (0.2, 0.1), "yes"),
        (0.0, (0.1, 0.2), ""),
        (None, (0.1, 0.2), ""),
        (0.70, None, ""),
    ],
)
def test_a_verdict_is_given_where_the_whole_interval_lies_on_one_side(paper, interval, said):
    difference = None if interval is None else sum(interval) / 2
    assert verdict(paper, Measured(1.0, difference, interval, 8)) == said
    assert verdict(paper, None) == ""


def made(tmp_path, on=None):
    table = Manifest.model_validate(
        {
            "schema": 1,
            "paper": "pladis",
            "place": "Table 0",
            "title": HOSTILE,
            "kind": "scores",
            "sets": {"coco": {"metrics": ["fid", "clip_score"]}},
            "rows": [
                {"name": "base", "model": "sdxl-25", "reported": {"coco": {"fid": 23.39, "clip_score": 25.91}}},
                {
                    "name": HOSTILE,
                    "model": "sdxl-25",
                    "operator": {"operator": "pladis"},
                    "reported": {"coco": {"fid": 19.01, "clip_score": 26.61}},
                },
            ],
        }
    )
    reported = {row.name: row.reported for row in table.rows}
    measured = {
        "base": {("coco", "clip_score"): Measured(25.0, n=8)},
        HOSTILE: {("coco", "clip_score"): Measured(26.0, 1.0, (0.5, 1.5), 8)},
    }
    rows = result_rows([("base", None), (HOSTILE, "base")], reported, measured, on is None)
    (tmp_path / "x.png").write_bytes(b"png")
    return Reproduction(
        "t", table, on, Cost(16, 0.0, 16), rows, (HOSTILE,), {HOSTILE: Path("x.png")}, {"hardware": "cpu"}, tmp_path
    )


def test_the_papers_figure_stands_beside_ours_with_interval_and_verdict(tmp_path):
    done = made(tmp_path)
    text = markdown(done)
    head = "| row | fid, coco: paper | clip_score, coco: paper | clip_score, coco: ours | reproduced |"
    assert head in text and "| base | 23.39 | 25.91 | 25 |  |" in text
    assert "| 19.01 | 26.61 | 26, +1 (+0.5 to +1.5) | yes |" in text and "Compared with: base." in text
    found = json.loads(json.dumps(done.to_json()))
    cell = next(cell for cell in found["rows"][1]["cells"] if cell["column"] == "clip_score")
    assert cell["paper_difference"] == pytest.approx(0.70) and cell["reproduced"] == "yes" and found["comparable"]


def test_on_the_shapes_model_it_says_so_and_gives_no_verdict(tmp_path):
    text = markdown(made(tmp_path, "shapes"))
    assert "are not comparable" in text and "reproduced" not in text.casefold().split("\n| ")[1]
    assert not [cell for row in made(tmp_path, "shapes").rows for cell in row.cells if cell.reproduced]


def test_hostile_names_stay_text(tmp_path):
    page = html(made(tmp_path))
    assert "<script" not in page and "&lt;script&gt;" in page and "Content-Security-Policy" in page
    row = next(line for line in markdown(made(tmp_path)).splitlines() if line.startswith("| <script"))
    assert row.count(" | ") == 4  # the bar in the name is escaped
