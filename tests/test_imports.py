"""Imports run downward only, and nothing happens at import."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent

# A module may import what stands in a line above its own.
LEVELS = [
    {"surgery.errors", "surgery.nn"},
    {"surgery.compat", "surgery.console", "surgery.machine", "surgery.recipes"},
    {"surgery.hub"},
    {"surgery.models"},
    {"surgery.guidance"},
    {"surgery.recipe"},
    {"surgery.artifact"},
    {"surgery.engines"},
    {"surgery.runtime"},
    {"surgery.export.engines"},
    {"surgery.export.publish"},
    {"surgery.applying"},
    {"surgery.export.serve", "surgery.validate"},
    {"surgery.analysis"},
    {"surgery.papers", "surgery.studio"},
    # the latter: the training of the pipeline there, a script of its own
    {"surgery.cli", "surgery.recipes.shapes.train", "surgery.recipes.shapes.training"},
]


def level_of(name):
    for level, rooms in reversed(list(enumerate(LEVELS))):
        if any(name == room or name.startswith(f"{room}.") for room in rooms):
            return level
    return None


def room_of(name):
    parts = name.split(".")
    if parts[:3] == ["surgery", "recipes", "shapes"] and parts[3:4] in (["train"], ["training"]):
        return "training"
    return ".".join(parts[:3] if parts[:2] == ["surgery", "export"] else parts[:2])


def sources():
    for folder, package in (("surgery", "surgery"), ("export", "surgery.export"), ("recipes", "surgery.recipes")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([package, *(part for part in parts if part != "__init__")])
            yield name, path


def imports_of(name, path):
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_every_module_has_a_level_and_imports_only_what_is_below():
    for name, path in sources():
        if name in ("surgery", "surgery.__main__", "surgery.export"):
            continue
        assert level_of(name) is not None, f"{name} is not in the table of levels"
        for imported in imports_of(name, path):
            if imported.startswith("surgery.") and room_of(imported) != room_of(name):
                assert level_of(imported) is not None and level_of(imported) < level_of(name), f"{name} -> {imported}"


def test_nn_imports_torch_diffusers_and_itself_only():
    import sys

    for name, path in sources():
        if name.startswith("surgery.nn"):
            for imported in imports_of(name, path):
                root = imported.split(".")[0]
                assert imported.startswith("surgery.nn") or root in {"torch", "diffusers", *sys.stdlib_module_names}


def test_files_are_short_and_say_what_they_are():
    for name, path in sources():
        text = path.read_text()
        assert len(text.splitlines()) < 400, f"{name} has {len(text.splitlines())} lines"
        assert ast.get_docstring(ast.parse(text)), f"{name} has no docstring"


def test_importing_the_package_imports_nothing_heavy(run):
    code = "import sys, surgery; assert not {'torch', 'diffusers', 'yaml'} & set(sys.modules)"
    run(python=code, fresh=True, check=0)


def test_the_package_finds_everything(run):
    code = (
        "import surgery\n"
        "for name in surgery.__all__:\n"
        "    assert getattr(surgery, name) is not None and name in dir(surgery)\n"
        "import surgery.models.patching, surgery.runtime.load, surgery.applying\n"
        "from surgery.validate import Drawing, sweep, validate\n"
        "assert callable(sweep) and callable(validate) and Drawing().workers == 1\n"
        "assert all(callable(getattr(surgery, name)) for name in ('patch', 'tune', 'unpatch', 'load', 'apply'))\n"
        "try:\n"
        "    surgery.nothing\n"
        "except AttributeError as error:\n"
        "    print(error)\n"
    )
    assert "has no attribute 'nothing'" in run(python=code, check=0).stdout
