"""The Python of the pages runs as it is written, on the shapes pipeline; what cannot says where it is tested.

The tutorials, whose blocks build on each other, are test_tutorials.py's.
"""

import ast
import re
import shutil
import textwrap
from pathlib import Path

import pytest
from PIL import Image

import surgery

from .conftest import SHAPES, load_shapes
from .quick import quick

HERE = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(?:^ {4}.*\n(?:\n(?= {4}))?)+", re.MULTILINE)
# {page: {words of a statement: why it is not run here}}; "" is every statement of the page
NOT_RUN = {
    "README": {
        "surgery.push": "publish/test_push.py, on a Hub on loopback",
        "surgery.verify": "publish/test_verify.py, on the same",
        "drawbench": "the prompts and CLIP's weights are on the Hub: validate/test_validate.py",
    },
    "modular": {"": "Anima is on the Hub: models/test_modular.py"},
    "publishing": {"": "a repository of the Hub: publish/test_load.py"},
    "serving": {"": "a running server: serve/test_openai.py"},
}


def blocks(page):
    """The statements of each indented block of a page that is Python, and calls or imports something."""
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        try:
            tree = ast.parse(textwrap.dedent(block))
        except SyntaxError:  # a shell's lines, YAML, a listing
            continue
        if any(isinstance(node, (ast.Call, ast.Import, ast.ImportFrom)) for node in ast.walk(tree)):
            yield tree.body


FOUND = {page.stem: [*blocks(page)] for page in (HERE / "README.md", *sorted((HERE / "docs").glob("*.md")))}
PAGES = [name for name, found in FOUND.items() if found and "" not in NOT_RUN.get(name, {})]


@pytest.mark.parametrize("name", quick(PAGES, "guidance", "negative", "operators"))
def test_the_python_of_a_page_runs(name, tmp_path, monkeypatch):
    import torch

    monkeypatch.chdir(tmp_path)
    text = (SHAPES.parent / "shapes.yaml").read_text(encoding="utf-8").replace("./shapes", str(SHAPES))
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "sdxl.yaml").write_text(text, encoding="utf-8")
    Image.new("RGB", (64, 64), "red").save("photo.png")
    if name in ("bases", "engines"):
        surgery.apply("shapes", tmp_path / "out" / "shapes")
        shutil.copytree(tmp_path / "out" / "shapes", tmp_path / "out" / "x")
    skipped = NOT_RUN.get(name, {})
    for statements in FOUND[name]:
        query, key, value = (torch.randn(1, 2, 4, 8) for _ in range(3))
        known = {
            "surgery": surgery,
            "pipe": load_shapes(),
            "prompt": "a red circle",
            "scores": torch.randn(3, 5),
        }
        if name == "operators":  # that page's is patched already
            surgery.patch(known["pipe"], schedule={"fraction": [0.0, 0.8]})
        known |= {"query": query, "key": key, "value": value}
        for statement in statements:
            if not any(words in ast.unparse(statement) for words in skipped):
                exec(compile(ast.Module([statement], []), f"{name}.md", "exec"), known)


def test_what_is_not_run_is_still_in_its_page():
    for name, skipped in NOT_RUN.items():
        for words in skipped:
            assert any(words in ast.unparse(one) for block in FOUND[name] for one in block), (name, words)
    assert {"README", "guidance", "negative", "operators"} <= {*PAGES}
