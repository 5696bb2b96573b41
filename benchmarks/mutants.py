"""Random single changes to the code, and whether the tests notice, in the rooms that must not be wrong.

    python benchmarks/mutants.py [--seed 0] [--each 10] [--rooms nn artifact hub publish statistics]    # `make mutants`

cosmic-ray finds what can be changed (an operator, a comparison, a number, a condition) and changes it; a seeded sample
of each room is tried, two at a time, in copies of this checkout, with the room's tests alone. Annotations are left out,
where any change fails at import, and caches, without which all is the same. A survivor is printed as a diff: it asks
for an assertion, unless the change means the same. Exits with 1 where fewer than 9 in 10 are noticed.
An hour on two cores with the defaults.
"""

import argparse
import ast
import functools
import itertools
import os
import random
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).resolve().parent.parent
COPIES = 2
WANTED = 0.9
SECONDS = 900  # after which a change counts as noticed: it hangs


@dataclass(frozen=True)
class Room:
    """What is changed, by glob patterns from the root, and what should notice."""

    files: tuple[str, ...]
    tests: tuple[str, ...]


ROOMS = {
    # The Triton kernels have a test of hours, benchmarks/triton_registers.py, and are left out.
    "nn": Room(
        ("surgery/nn/*.py", "surgery/nn/kernels/[!t]*.py"),
        ("tests/nn", "--ignore=tests/nn/test_triton_compiles.py", "--ignore=tests/nn/test_triton_traced.py"),
    ),
    "artifact": Room(
        ("surgery/artifact/*.py",),
        ("tests/artifact", "tests/validate/test_scoring.py", "tests/publish", "tests/runtime"),
    ),
    "hub": Room(("surgery/hub/*.py",), ("tests/hub", "tests/publish", "tests/recipe")),
    "publish": Room(("export/publish/**/*.py",), ("tests/publish", "tests/artifact/test_weights.py")),
    "statistics": Room(("surgery/validate/statistics.py",), ("tests/validate/test_statistics.py",)),
}


def sample(room: Room, count: int, seed: int) -> list:
    """`count` of cosmic-ray's MutationSpecs for a room, drawn by the seed."""
    from cosmic_ray.commands import init
    from cosmic_ray.work_db import WorkDB, use_db

    paths = sorted({path for pattern in room.files for path in ROOT.glob(pattern)})
    with tempfile.TemporaryDirectory() as folder, use_db(str(Path(folder, "work.sqlite")), WorkDB.Mode.create) as db:
        init([path.relative_to(ROOT) for path in paths], db, {})
        found = sorted(
            (mutation for item in db.work_items for mutation in item.mutations),
            key=lambda one: (str(one.module_path), one.operator_name, one.occurrence),
        )
    random.Random(seed).shuffle(found)
    return list(itertools.islice(filter(says_something, found), count))


def says_something(mutation) -> bool:
    """Whether a change can be made, elsewhere than in an annotation or to a cache, and leaves what Python can read."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    path = ROOT / mutation.module_path
    text = path.read_text()
    if any(start <= tuple(mutation.start_pos) < end for start, end in annotations(path)):
        return False
    if "Decorator" in mutation.operator_name and "cache" in text.splitlines()[mutation.start_pos[0] - 1]:
        return False
    try:
        operator = get_operator(mutation.operator_name)(**mutation.operator_args)
        ast.parse(mutate_code(text, operator, mutation.occurrence))
    except (AttributeError, SyntaxError):  # the first is cosmic-ray's own, at an exception whose name has a dot
        return False
    return True


@functools.cache
def annotations(path: Path) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where the annotations of a file begin and end, as (line, column)."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    found = [getattr(node, name, None) for node in nodes for name in ("annotation", "returns")]
    return [((one.lineno, one.col_offset), (one.end_lineno, one.end_col_offset)) for one in found if one]


def attempt(mutation, room: Room, copy: Path) -> tuple[bool, str]:
    """(whether the tests notice, the diff) of one change, made in a copy of the checkout and taken back."""
    from attrs import evolve
    from cosmic_ray.mutating import mutate_and_test
    from cosmic_ray.work_item import TestOutcome

    here = evolve(mutation, module_path=str(copy / mutation.module_path))
    result = mutate_and_test([here], tests_of(room, copy), SECONDS)
    return result.test_outcome != TestOutcome.SURVIVED, (result.diff or "").replace(f"{copy}/", "")


def tests_of(room: Room, copy: Path) -> str:
    """The command that runs a room's tests on a copy."""
    python = f"{sys.executable} -m pytest -x -p no:cacheprovider {' '.join(room.tests)}"
    return f"sh -c 'cd {copy} && PYTHONPATH={copy} exec {python}'"


def copies(folder: str) -> SimpleQueue:
    """A queue of copies of what git has here, changes that are not committed included."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
    ).stdout
    made = SimpleQueue()
    for index in range(COPIES):
        copy = Path(folder, str(index))
        for name in filter(None, listed.split("\0")):
            if os.path.lexists(ROOT / name):
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
        made.put(copy)
    return made


def main() -> int:
    """Try the sample; the exit status."""
    from cosmic_ray.testing import run_tests
    from cosmic_ray.work_item import TestOutcome

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--each", type=int, default=10, help="changes to each room")
    parser.add_argument("--rooms", nargs="+", choices=ROOMS, default=list(ROOMS))
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.chdir(ROOT)
    missed = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(COPIES) as pool:
        free = copies(folder)

        def one(mutation, room):
            copy = free.get()
            try:
                return attempt(mutation, room, copy)
            finally:
                free.put(copy)

        for name in arguments.rooms:
            room = ROOMS[name]
            outcome, output = run_tests(tests_of(room, copy := free.get()), SECONDS)
            free.put(copy)
            if outcome != TestOutcome.SURVIVED:
                sys.exit(f"{name}: its tests fail without a change:\n{output[-2000:]}")
            tried = list(
                pool.map(lambda mutation, room=room: one(mutation, room), sample(room, arguments.each, arguments.seed))
            )
            survivors = [diff for noticed, diff in tried if not noticed]
            print(f"{name}: {len(tried) - len(survivors)} of {len(tried)} noticed", flush=True)
            print(*survivors, sep="\n", flush=True)
            missed += len(survivors) > (1 - WANTED) * len(tried)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
