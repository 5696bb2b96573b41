"""benchmarks/reliability.py: what it counts of a JUnit file, what it calls a failure, and that its tests exist."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KINDS = {
    "Files": [
        ("recipes", "refused", ["tests/test_a.py"]),
        ("weights", "read", ["tests/nn/test_b.py::test_x"]),
    ]
}
RESULTS = """<testsuites><testsuite timestamp="2026-01-02T03:04:05">
<testcase classname="tests.test_a" name="test_many[40-json]"><properties>
<property name="cases" value="40"/><property name="refused" value="31"/></properties></testcase>
<testcase classname="tests.test_a" name="test_one"/>
<testcase classname="tests.test_a" name="test_none"><skipped message="no GPU"/></testcase>
<testcase classname="tests.nn.test_b" name="test_x[1]">{failure}</testcase>
<testcase classname="tests.nn.test_b" name="test_xy"/>
</testsuite></testsuites>"""


@pytest.fixture
def reliability(monkeypatch):
    """The module, importable with that beside it."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import reliability

    return reliability


@pytest.fixture
def count(reliability, monkeypatch, tmp_path):
    """Have it count RESULTS with something in the last kind's test; returns (exit status, the page)."""

    def count(results):
        (tmp_path / "results.xml").write_text(results)
        arguments = ["--junit", str(tmp_path / "results.xml"), "--out", str(tmp_path / "page.md")]
        monkeypatch.setattr(reliability, "SECTIONS", KINDS)
        monkeypatch.setattr(sys, "argv", ["reliability.py", *arguments])
        return reliability.main(), (tmp_path / "page.md").read_text()

    return count


def test_cases_are_counted_by_kind(count):
    status, page = count(RESULTS.format(failure=""))
    assert status == 0 and "2026-01-02" in page and "CPU cores" in page
    assert "| recipes | 41 | 31 | 0 | 1 | refused |" in page and "| weights | 1 |  | 0 | 0 | read |" in page
    assert "42 cases passed, 0 failed, 1 skipped." in page


@pytest.mark.parametrize("tag", ["failure", "error"])
def test_a_failure_is_named_and_so_is_a_kind_without_tests(count, capsys, tag):
    status, page = count(RESULTS.format(failure=f"<{tag}/>"))
    assert status == 1 and "| weights | 1 |  | 1 | 0 | read |" in page
    assert "weights: tests/nn/test_b.py::test_x[1] failed" in page and "test_x[1] failed" in capsys.readouterr().err
    status, page = count(RESULTS.format(failure="").replace('"test_x[1]"', '"test_renamed"'))
    assert status == 1 and "weights: no case of tests/nn/test_b.py::test_x" in page


def test_every_test_that_it_counts_exists_and_is_counted_once(reliability):
    places = [place for kinds in reliability.SECTIONS.values() for kind in kinds for place in kind[2]]
    assert len(set(places)) == len(places)
    for place in places:
        file, _, name = place.partition("::")
        assert (ROOT / file).is_file() and (not name or f"def {name}(" in (ROOT / file).read_text()), place
        assert not name or file not in places
