"""Tables at the width of a terminal: nothing of them is cut away."""

import pytest

from surgery.cli.show import table

COLUMNS = ["word", "dense", "sparse", "pladis", "sparse <= 0", "pladis <= 0", "dense entropy", "sparse entropy"]
ROWS = [[f"circle ({row})", *(f"0.{row}{place}82" for place in range(5)), "98.7%", f"{row}.25"] for row in range(3)]


@pytest.mark.parametrize("width", [24, 40, 60, 80, 120])
def test_every_heading_and_number_is_shown_whole_within_the_width(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    table("maps", COLUMNS, ROWS)
    shown = capsys.readouterr().out
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= width
    words = shown.split()
    for word in [*" ".join(COLUMNS).split(), *(cell for row in ROWS for cell in row[1:])]:
        assert word in words
    assert words.count("dense") == 2


def test_numbers_stand_to_the_right_and_empty_columns_do_not_appear(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    table("", ["name", "nothing", "percent", "size"], [["a", "", "5%", "17 B"], ["b", None, "50.5%", "1.5 GB"]])
    head, _, first, second = (line for line in capsys.readouterr().out.splitlines() if line.strip())
    assert "nothing" not in head
    assert [len(line.rstrip()) for line in (head, first, second)] == [len(head.rstrip())] * 3
    assert first.index("5%") + 2 == second.index("50.5%") + 5 == head.index("percent") + 7
