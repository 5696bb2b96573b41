"""The house in figures, and whether a fact stands twice in it.

    python benchmarks/house.py            # a line for each room; exits with 1 and says where, if something stands twice

Files and lines are those of surgery/ and export/, beside them what tests/ has. A backbone's name (a model class of
diffusers) may stand in its own file under surgery/nn/backbones alone, an operator's default in surgery/nn/operators.py
alone: a number given to a name of the table, as a default or a keyword, anywhere else is a second table.
"""

import ast
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRODUCTION = ("surgery", "export")
LOOSE = 5  # modules beside the rooms of surgery/, its __init__ and __main__ apart
_BACKBONES = "surgery/nn/backbones/"
_GUIDANCE = "surgery/guidance/"
_OPERATORS = "surgery/nn/operators.py"


def sources(*folders):
    """{path from the root: text} of the Python files in folders, links and frozen artifacts left out."""
    found = {}
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if path.is_symlink() or any(parent.is_symlink() for parent in path.parents) or "/frozen/0." in name:
                continue
            found[name] = path.read_text(encoding="utf-8")
    return found


def room_of(name):
    """ "surgery/nn", "export/serve"; the folder itself for a loose module."""
    parts = name.split("/")
    return "/".join(parts[:2]) if len(parts) > 2 else parts[0]


def loose_modules(names):
    """The modules of surgery/ that stand in no room."""
    loose = [name for name in names if room_of(name) == "surgery"]
    return [name for name in loose if Path(name).stem not in ("__init__", "__main__")]


def repeated_backbones(texts, backbones):
    """A line for each place outside a backbone's own files where its model class is named."""
    problems = []
    for name, text in texts.items():
        if name.startswith(_BACKBONES):
            continue
        for node in ast.walk(ast.parse(text)):
            said = {node.value} if isinstance(node, ast.Constant) and isinstance(node.value, str) else set()
            said |= {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
            problems += [f"{name}:{node.lineno} names {one}" for one in sorted(said & set(backbones))]
    return problems


def repeated_defaults(texts, defaults):
    """A line for each number outside the table that is given to one of its hyperparameters. defaults: {name: float}"""
    problems = []
    for name, text in texts.items():
        if name == _OPERATORS or name.startswith(_GUIDANCE):  # a method's scale is its own
            continue
        for node in ast.walk(ast.parse(text)):
            for word, value in _given(node):
                if word in defaults and isinstance(value, ast.Constant) and value.value == defaults[word]:
                    problems.append(f"{name}:{value.lineno} gives {word} {value.value}")
    return problems


def _given(node):
    if isinstance(node, (ast.FunctionDef, ast.Lambda)):
        arguments = node.args
        both = [*arguments.posonlyargs, *arguments.args]
        yield from zip(
            [one.arg for one in both[len(both) - len(arguments.defaults) :]], arguments.defaults, strict=True
        )
        yield from ((one.arg, value) for one, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True))
    elif isinstance(node, ast.ClassDef):
        yield from ((one.target.id, one.value) for one in node.body if isinstance(one, ast.AnnAssign))
    elif isinstance(node, ast.Dict):
        keys = [key.value if isinstance(key, ast.Constant) else None for key in node.keys]
        yield from zip(keys, node.values, strict=True)


def main():
    """Print the table; the exit status."""
    from surgery.nn.backbones import BACKBONES
    from surgery.nn.operators import OPERATORS

    defaults = {}
    for operator in OPERATORS.values():
        defaults = {**operator.defaults, **defaults}
    texts = sources(*PRODUCTION)
    lines = {name: len(text.splitlines()) for name, text in texts.items()}
    files = Counter(map(room_of, texts))
    by_room = Counter()
    for name, count in lines.items():
        by_room[room_of(name)] += count
    for room in sorted(files):
        print(f"{room:24} {files[room]:4} files {by_room[room]:6} lines")
    cpp = [path for folder in PRODUCTION for kind in ("*.cpp", "*.h") for path in sorted((ROOT / folder).rglob(kind))]
    tests = sources("tests")
    print(f"{'all':24} {len(texts):4} files {sum(lines.values()):6} lines")
    print(f"{'C++ beside it':24} {len(cpp):4} files {sum(len(path.read_text().splitlines()) for path in cpp):6} lines")
    print(f"{'tests':24} {len(tests):4} files {sum(len(text.splitlines()) for text in tests.values()):6} lines")
    loose = loose_modules(texts)
    print(f"loose modules: {', '.join(loose) or 'none'}")
    problems = [*repeated_backbones(texts, BACKBONES), *repeated_defaults(texts, defaults)]
    if len(loose) > LOOSE:
        problems.append(f"{len(loose)} loose modules; {LOOSE} at most")
    for problem in problems:
        print(problem, file=sys.stderr)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
