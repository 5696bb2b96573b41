"""The site builds, README stays two screens, and what both name is there."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

import surgery
from surgery.cli.main import build_parser
from surgery.nn.operators import operators_table

HERE = Path(__file__).resolve().parent.parent
PAGES = [HERE / "README.md", *sorted((HERE / "docs").rglob("*.md"))]


def test_the_site_builds_without_a_warning(tmp_path):
    """Strictly: a broken link, a page outside the navigation or a name that is gone ends the build."""
    build(load_config(str(HERE / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    command_line = (tmp_path / "reference/command-line/index.html").read_text(encoding="utf-8")
    assert "surgery apply" in command_line and "--allow-regression" in command_line
    assert "GAG, eq. 11-13" in (tmp_path / "reference/operators/index.html").read_text(encoding="utf-8")
    assert 'id="surgery.models.patching.patch"' in (tmp_path / "reference/python/index.html").read_text(
        encoding="utf-8"
    )


def test_readme_is_two_screens():
    assert len(PAGES[0].read_text(encoding="utf-8")) <= 12_000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page):
    """Scripts, tests and recipes named in a page."""
    text = page.read_text(encoding="utf-8")
    named = set(
        re.findall(r"\b(?:benchmarks|tests|recipes|docs|export|surgery)/[\w/.-]*\w\.(?:py|md|yaml|png)\b", text)
    )
    assert not [name for name in named if not (HERE / name).exists()]


def test_the_table_of_operators_is_the_code_s():
    assert "\n".join(operators_table()) in (HERE / "docs/operators.md").read_text(encoding="utf-8")


def commands(text):
    """The command lines of a page, but those with options in brackets; without comments and what follows in a pipe."""
    for line in re.findall(r"^(?: {4})?(?:\w+=\S+ )*(surgery [a-z].*)$", text.replace("\\\n", " "), re.MULTILINE):
        line = re.split(r"\s{2,}\S| +#| && | > | \| ", line)[0]
        if "[" not in line and "..." not in line:
            yield line


def test_commands_of_the_pages_are_ones_that_there_are():
    found = {line: page.name for page in PAGES for line in commands(page.read_text(encoding="utf-8"))}
    assert len(found) > 60
    for line, page in found.items():
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                build_parser().parse_args(shlex.split(line)[1:])
        except SystemExit:
            pytest.fail(f"{page}: {line}\n{said.getvalue()}")


def test_functions_of_the_pages_are_in_the_package():
    called = {name for page in PAGES for name in re.findall(r"\bsurgery\.(\w+)\(", page.read_text(encoding="utf-8"))}
    assert len(called) > 10 and not [name for name in called if not hasattr(surgery, name)]
