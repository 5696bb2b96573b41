"""The tutorials run as they are written: every block of a page in order, in one folder, against a Hub on loopback.

A block's first line says what it is: ```sh lines of the shell, ```python a program, ```yaml a file, whose name is the
comment that it begins with. "exit=2" after sh: that is how it ends. "serve" after sh: that is for tests/serve.
"""

import os
import re
import shlex
from pathlib import Path

import pytest

from .loopback_hub import WRITE_TOKEN, environment, hub_server
from .quick import quick

PAGES = Path(__file__).resolve().parent.parent / "docs"
BLOCK = re.compile(r"^```(\w+) ?(.*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


TUTORIALS = sorted(path.stem for path in PAGES.glob("tutorials/*.md"))
PICTURED = ("gallery", "terminal")  # whose pictures are benchmarks/pictures.py's


@pytest.mark.parametrize(
    "name", quick([*(f"tutorials/{name}" for name in TUTORIALS), *PICTURED], "tutorials/own-recipe")
)
def test_a_tutorial_runs_as_it_is_written(name, run, tmp_path):
    recipes = Path(__file__).resolve().parent.parent / "recipes"
    (tmp_path / "recipes").symlink_to(recipes)
    blocks = BLOCK.findall((PAGES / f"{name}.md").read_text(encoding="utf-8"))
    assert blocks
    with hub_server() as hub:
        env = {**os.environ, **environment(hub, tmp_path / "home", WRITE_TOKEN)}
        for language, said, text in blocks:
            options = said.split()
            if language == "yaml":
                file = re.match(r"# (\S+\.yaml)\n", text)
                assert file, f"a file without a name:\n{text}"
                (tmp_path / file[1]).write_text(text, encoding="utf-8")
            elif language == "python":
                run(python=text, cwd=tmp_path, check=0)
            elif "serve" not in options:
                assert language == "sh", language
                code = int(next((one[5:] for one in options if one.startswith("exit=")), 0))
                for line in text.splitlines():
                    verb, *arguments = shlex.split(line)
                    assert verb == "surgery", line
                    run(*arguments, cwd=tmp_path, env=env if "hub" in options else None, check=code)
