"""The joined file: mechanical, self-contained, named by its content."""

import ast
import hashlib
import sys
from pathlib import Path

from surgery.nn import shipped


def test_its_name_carries_the_hash_of_its_content():
    source = shipped.shipped_source()
    assert "modeling_pladis_" + hashlib.sha256(source.encode()).hexdigest()[:12] == shipped.MODULE_NAME


def test_it_imports_torch_diffusers_and_the_standard_library_only():
    tree = ast.parse(shipped.shipped_source())
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not [node for node in imports if isinstance(node, ast.ImportFrom) and node.level]
    roots = {
        name.split(".")[0]
        for node in imports
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert roots - set(sys.stdlib_module_names) == {"torch", "diffusers"}


def test_every_part_is_in_it_and_no_name_is_defined_twice():
    tree = ast.parse(shipped.shipped_source())
    names = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    names += [
        t.id for node in tree.body if isinstance(node, ast.Assign) for t in node.targets if isinstance(t, ast.Name)
    ]
    assert len(names) == len(set(names))
    folder = Path(shipped.__file__).parent
    files = {path.name for path in folder.glob("*.py")} - {"__init__.py", "shipped.py"}
    assert files == set(shipped.PARTS)
