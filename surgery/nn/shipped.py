"""The code of this folder as the one self-contained file that an artifact ships.

diffusers fetches a single file per custom component from the Hub, so the modules are joined: their relative imports
fall away, everything else stays as it is. The file is named with the hash of its content, because diffusers loads
such files into one flat namespace, where two versions of one name would shadow each other.
"""

import ast
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

from .backbones import PATCHED

_HEADER = '''"""PLADIS attention for a diffusers model (arXiv 2503.07677), in one file. Apache-2.0.

Joined mechanically from the surgery/nn folder of the pladis-surgery package; the name carries the hash of the content.
Needs torch and diffusers alone:

    DiffusionPipeline.from_pretrained(this_model, trust_remote_code=True)
"""

# diffusers runs this file again, in the same namespace, for another component or model that has it. What was made of
# the classes here keeps them: the last line puts them back.
_BEFORE = {name: value for name, value in globals().items() if not name.startswith("__")}


def module_name(model_class):
    """This file's own name, for models saved again."""
    return __name__.rpartition(".")[2]


def shipped_source(model_class):
    """This file's own text, for models saved again."""
    with open(__file__, encoding="utf-8") as file:
        return file.read()
'''


_FOOTER = "globals().update(_BEFORE)\n"


_CPP = '''def cpp_source():
    """The C++ kernel's source."""
    return r"""
{}"""
'''


def parts_of(model_class: str) -> tuple[str, ...]:
    """The files of this folder that a patched model class needs, by its name, each behind those that it imports."""
    return parts_behind(f"backbones/{PATCHED[model_class]}.py")


def parts_behind(name: str) -> tuple[str, ...]:
    """A file of this folder behind all that it imports of it, each behind those that it imports itself."""
    folder, found = Path(__file__).parent, {}

    def add(path):
        for imported in _imports_of(path) if path not in found else ():
            add(imported)
        found[path] = None

    add(folder / name)
    return tuple(path.relative_to(folder).as_posix() for path in found)


@functools.cache
def _imports_of(path):
    """The files of this folder that one of them imports."""
    return [
        path.parents[node.level - 1].joinpath(*(node.module or "").split(".")).with_suffix(".py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ImportFrom) and node.level and node.module != "shipped"  # the header's names
    ]


@functools.cache
def shipped_source(model_class: str) -> str:
    """The text of the joined file for a patched model class, by its name."""
    return joined(parts_of(model_class), _HEADER, _FOOTER)


def joined(names: Sequence[str], header: str, footer: str = "") -> str:
    """The text of files of this folder, in an order in which each is behind what it imports, as one file.

    header: what stands before them, the docstring first. footer: what stands behind them.
    """
    folder = Path(__file__).parent
    parts = [_without_relative_imports(folder / name) for name in names]
    titles = [f"# -------------------- {name} --------------------" for name in (*names, "kernels/cpu.cpp")]
    parts.append(_CPP.format(cpp_source()))
    parts = [f"{title}\n\n{part}" for title, part in zip(titles, parts, strict=True)]
    return "\n\n".join([header, *parts, *([footer] if footer else [])])


def cpp_source() -> str:
    """The C++ kernel's source: kernels/cpu.cpp, with what it includes of that folder in its place."""
    folder = Path(__file__).parent / "kernels"
    source = (folder / "cpu.cpp").read_text(encoding="utf-8")
    for name in ("cpu_solver.h", "cpu_product.h"):
        source = source.replace(f'#include "{name}"\n', (folder / name).read_text(encoding="utf-8"))
    return source


@functools.cache
def module_name(model_class: str) -> str:
    """The name of the joined file for a patched model class, without its suffix."""
    return "modeling_pladis_" + hashlib.sha256(shipped_source(model_class).encode("utf-8")).hexdigest()[:12]


@functools.cache
def _without_relative_imports(path):
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    tree = ast.parse(source)
    drop = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level:
            drop.update(range(node.lineno - 1, node.end_lineno or node.lineno))
    first = tree.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):  # the docstring becomes a comment
        body = range(first.lineno - 1, first.end_lineno or first.lineno)
        text = "".join(lines[i] for i in body).strip().strip('"').splitlines()
        lines[first.lineno - 1] = "".join(f"# {line}".rstrip() + "\n" for line in text)
        drop.update(set(body) - {first.lineno - 1})
    return "".join(line for i, line in enumerate(lines) if i not in drop).strip() + "\n"
