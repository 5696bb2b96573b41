"""The joined file of every backbone: mechanical, self-contained, named by its content."""

import ast
import hashlib
import sys
from pathlib import Path

import pytest

from surgery.nn import PATCHED, shipped


@pytest.mark.parametrize("name", PATCHED)
def test_it_is_named_by_its_content_and_needs_torch_diffusers_and_the_standard_library_only(name):
    source = shipped.shipped_source(name)
    assert "modeling_pladis_" + hashlib.sha256(source.encode()).hexdigest()[:12] == shipped.module_name(name)
    tree = ast.parse(source)
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not [node for node in imports if isinstance(node, ast.ImportFrom) and node.level]
    roots = {
        name.split(".")[0]
        for node in imports
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert roots - set(sys.stdlib_module_names) == {"torch", "diffusers"}
    names = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    names += [
        t.id for node in tree.body if isinstance(node, ast.Assign) for t in node.targets if isinstance(t, ast.Name)
    ]
    assert len(names) == len(set(names)) and name in names


@pytest.mark.parametrize("name", PATCHED)
def test_the_parts_define_names_before_they_are_used(name):
    """Each part imports only what parts before it, of this folder, define."""
    folder, before = Path(shipped.__file__).parent, set()
    for part in PATCHED[name].parts:
        for node in ast.parse((folder / part).read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.level and node.module != "shipped":
                assert f"{node.module}.py" in before, (part, node.module)
        before.add(part)


def test_every_file_of_the_folder_is_shipped_with_some_backbone():
    folder = Path(shipped.__file__).parent
    files = {path.name for path in folder.glob("*.py")} - {"__init__.py", "shipped.py", "backbones.py", "decomposed.py"}
    assert files == {part for backbone in PATCHED.values() for part in backbone.parts} | {"joint.py"}
