"""What was tried against the package and what happened, counted from the results of its tests, as docs/reliability.md.

    python benchmarks/reliability.py                        # run the tests of reliability_kinds.py, write the page
    python benchmarks/reliability.py --all                  # the slow ones as well, which try ten times as much
    python benchmarks/reliability.py --junit results.xml    # count what `pytest --junitxml=results.xml` wrote

A case is a test; or, where a test tries many things and says how many (pytest's record_property "cases"), one of these.
Exits with 1, and names them, when tests failed or a kind has none; the page says so too. --junit has to be of the same
machine and versions: the page names those that the script finds.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

from reliability_kinds import SECTIONS

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reliability.md"
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "huggingface_hub", "peft")
INTRODUCTION = """# What was tried against it

`python benchmarks/reliability.py` runs the tests and writes this page from their results. A case is one test, or, where
a test tries many things, one of these: a mutated file, or a request that fails. *Errors of ours* counts, of such a
test's cases, those that ended in an error of this package, a `SurgeryError`, which the command line prints as one line;
the others gave a result. A push whose process was killed counts as such. A test that sees another error fails."""


@dataclass(frozen=True)
class Case:
    """A test in a JUnit file. place: file::name, without parameters. ended: "passed", "failed" or "skipped"."""

    place: str
    name: str
    ended: str
    cases: int
    refused: int | None


def main():
    """Count, write the page, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--junit", nargs="+", type=Path, metavar="FILE", help="count these, run nothing")
    parser.add_argument("--all", action="store_true", help="run the slow tests as well")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes of pytest")
    parser.add_argument("--out", type=Path, default=PAGE)
    options = parser.parse_args()
    if options.junit:
        cases, date = read_junit(options.junit)
    else:
        with tempfile.TemporaryDirectory() as folder:
            results = Path(folder) / "results.xml"
            run_tests(results, options.all, options.workers)
            cases, date = read_junit([results])
    summary, page, problems = counted(cases)
    options.out.write_text(f"{INTRODUCTION}\n\n{machine()}; {date}.\n\n{summary}\n\n{page}\n", encoding="utf-8")
    print("\n".join(problems), file=sys.stderr)
    print(f"{options.out}: {summary}")
    return 1 if problems else 0


def run_tests(results, slow, workers):
    """Run the tests of every kind; their results go to a JUnit file."""
    places = [place for kinds in SECTIONS.values() for kind in kinds for place in kind[2]]
    command = [sys.executable, "-m", "pytest", *places, f"--junitxml={results}", "-n", str(workers), "--dist=loadfile"]
    environment = {"OMP_NUM_THREADS": "1", "MKL_CBWR": "AVX2,STRICT", **os.environ}
    subprocess.run([*command, *(["-m", "slow or not slow"] if slow else [])], cwd=ROOT, env=environment)


def read_junit(paths):
    """([Case], date) of JUnit files; of a test that is in several, what the last one says."""
    found, dates = {}, []
    for path in paths:
        root = ElementTree.parse(path).getroot()
        dates += [suite.get("timestamp", "")[:10] for suite in root.iter("testsuite")]
        for node in root.iter("testcase"):
            found[node.get("classname"), node.get("name")] = _case(node)
    return list(found.values()), max(dates, default="")


def _case(node):
    file = node.get("classname", "").replace(".", "/") + ".py"
    name = node.get("name")
    tags = {child.tag for child in node}
    ended = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
    said = {part.get("name"): part.get("value") for part in node.iter("property")}
    cases = int(said.get("cases", 1)) if ended == "passed" else 1
    refused = int(said["refused"]) if ended == "passed" and "refused" in said else None
    return Case(f"{file}::{name.partition('[')[0]}", f"{file}::{name}", ended, cases, refused)


def _is_of(case, place):
    return case.place == place or case.place.startswith(f"{place}::")


def counted(cases):
    """(how many cases ended how, the tables as Markdown, [what is wrong])."""
    parts, problems, total = [], [], Counter()
    for section, kinds in SECTIONS.items():
        lines = [f"## {section}", "", "| what | cases | errors of ours | failed | skipped | what happens |"]
        lines.append("|---|---|---|---|---|---|")
        for title, words, places in kinds:
            own = [case for case in cases if any(_is_of(case, place) for place in places)]
            problems += [f"{title}: no case of {place}" for place in places if not any(_is_of(c, place) for c in own)]
            problems += [f"{title}: {case.name} failed" for case in own if case.ended == "failed"]
            count = Counter()
            for case in own:
                count[case.ended] += case.cases
            total += count
            refused = [case.refused for case in own if case.refused is not None]
            tried = sum(count.values()) - count["skipped"]
            cells = (title, tried, sum(refused) if refused else "", count["failed"], count["skipped"], words)
            lines.append(f"| {' | '.join(map(str, cells))} |")
        parts.append("\n".join(lines))
    if problems:
        parts.append("## Failed\n\n" + "\n".join(f"- {problem}" for problem in problems))
    summary = f"{total['passed']:,} cases passed, {total['failed']} failed, {total['skipped']} skipped."
    return summary, "\n\n".join(parts), problems


def machine():
    """What it ran on and with, in a line."""
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    cores = len(os.sched_getaffinity(0))
    return (
        f"{cores} CPU cores ({platform.machine()}, {platform.system()}), Python {platform.python_version()}, {versions}"
    )


if __name__ == "__main__":
    sys.exit(main())
