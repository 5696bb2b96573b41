"""The joined file of every backbone: mechanical, self-contained, named by its content."""

import ast
import functools
import hashlib
import re
import sys
from pathlib import Path

import pytest

from surgery.nn import PATCHED, shipped


def bindings(node):
    """(name, "defined" or what it imports) of every name that a statement binds at the top level."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield node.name, "defined"
    elif isinstance(node, ast.Import):
        yield from ((a.asname, a.name) if a.asname else (a.name.split(".")[0],) * 2 for a in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from ((a.asname or a.name, f"{node.module} {a.name}") for a in node.names)
    else:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
                yield child.id, "defined"
            elif not isinstance(child, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
                yield from bindings(child)


@functools.cache
def said(part):
    """(the modules that a part of a joined file imports, all that it binds); most parts are in every file."""
    tree = ast.parse(part)
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not [node for node in imports if isinstance(node, ast.ImportFrom) and node.level]
    modules = {
        name
        for node in imports
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    return modules, [pair for node in tree.body for pair in bindings(node)]


@pytest.mark.parametrize("name", PATCHED)
def test_it_is_named_by_its_content_and_needs_torch_diffusers_and_the_standard_library_only(name):
    source = shipped.shipped_source(name)
    assert "modeling_pladis_" + hashlib.sha256(source.encode()).hexdigest()[:12] == shipped.module_name(name)
    parts = [said(part) for part in re.split(r"^# -{20} \S+ -+$", source, flags=re.MULTILINE)]
    assert len(parts) == len(shipped.parts_of(name)) + 2  # the header and the C++ kernel
    roots = {module.split(".")[0] for modules, _ in parts for module in modules}
    assert roots - set(sys.stdlib_module_names) == {"torch", "diffusers"}
    bound = {}
    for named, meaning in (pair for _, pairs in parts for pair in pairs):
        bound.setdefault(named, []).append(meaning)
    # The same import in two parts is one name; anything else would take the place of another part's.
    twice = [named for named, means in bound.items() if len(set(means)) > 1 or means.count("defined") > 1]
    assert not twice and name in bound
    assert "void pladis_attention(" in source and '#include "' not in source  # the C++ kernel, whole


@functools.cache
def relative_imports(path):
    """The files of the folder that one of them imports, but for the one that is not shipped."""
    return {
        path.parents[node.level - 1] / f"{node.module.replace('.', '/')}.py"
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ImportFrom) and node.level and node.module != "shipped"
    }


@pytest.mark.parametrize("name", PATCHED)
def test_the_parts_define_names_before_they_are_used(name):
    """Each part imports only what parts before it, of this folder, define."""
    folder, before = Path(shipped.__file__).parent, set()
    for part in shipped.parts_of(name):
        assert relative_imports(folder / part) <= before, part
        before.add(folder / part)


def test_every_file_of_the_folder_is_shipped_with_some_backbone():
    folder = Path(shipped.__file__).parent
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*.py") if path.name != "__init__.py"}
    assert files == {part for name in PATCHED for part in shipped.parts_of(name)} | {"shipped.py"}


def test_no_name_that_another_library_keeps_to_itself_is_used_outside_compat():
    folder = Path(shipped.__file__).parent
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())) if path.name != "compat.py" else ():
            imported = [getattr(node, "module", None) or "", *(a.name for a in getattr(node, "names", []) if a)]
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert not any(part.startswith("_") for name in imported for part in name.split(".")), (path, imported)
            if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch."):
                assert not node.attr.startswith("_"), (path, ast.unparse(node))
