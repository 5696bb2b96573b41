"""The table of backbones and operators in the README and docs/backbones.md, from what the tests did: it cannot lie.

    python benchmarks/matrix.py            # runs tests/backbones and writes the table
    python benchmarks/matrix.py --junit results.xml      # from a run with --junitxml=results.xml

A cell says on what the operator was run on that backbone, and how many checks of it passed; a check that failed is
named. The checks are the functions of tests/backbones/test_backbones.py, which record what they are about.
"""

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
TARGETS = (HERE / "README.md",)
BEGIN, END = "<!-- backbones: written by benchmarks/matrix.py -->", "<!-- end of backbones -->"
OPERATORS = ("pladis", "gag", "sparse", "anderson")
TRAINED = ("shapes",)  # backbones whose pipeline was trained; the others have random weights


def main():
    """Run the tests unless their results are given, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--junit", type=Path, help="results of a run of tests/backbones with --junitxml")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        junit = options.junit or run_tests(Path(folder) / "results.xml")
        lines = table(read_results(junit))
    print("\n".join(lines))
    for path in TARGETS:
        write_between_marks(path, lines)


def run_tests(junit):
    """Run the tests of the backbones; the file with their results."""
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={junit}", "tests/backbones/test_backbones.py"]
    subprocess.run(command, cwd=HERE, check=False)
    return junit


def read_results(junit):
    """[(backbone, class, operator, check, "passed" | "failed")] of a JUnit file; skipped tests are left out."""
    found = []
    for case in ElementTree.parse(junit).iter("testcase"):
        facts = {one.get("name"): one.get("value") for one in case.iter("property")}
        if "backbone" not in facts or case.find("skipped") is not None:
            continue
        outcome = "failed" if case.find("failure") is not None or case.find("error") is not None else "passed"
        for operator in facts["operators"].split():
            found.append((facts["backbone"], facts["model_class"], operator, facts["check"], outcome))
    return found


def table(results):
    """The lines of a Markdown table: a row for each backbone, a column for each operator."""
    rows = [f"| backbone | model class | {' | '.join(OPERATORS)} |", "|---" * (2 + len(OPERATORS)) + "|"]
    for backbone, model_class in dict.fromkeys(result[:2] for result in results):
        cells = [cell(backbone, [r for r in results if r[0] == backbone and r[2] == name]) for name in OPERATORS]
        rows.append(f"| {backbone} | {model_class} | {' | '.join(cells)} |")
    return rows


def cell(backbone, results):
    """What was run, in a few words."""
    if not results:
        return "not run"
    weights = "trained" if backbone in TRAINED else "tiny"
    failed = sorted({check for *_, check, outcome in results if outcome == "failed"})
    if failed:
        return f"**fails**: {', '.join(failed)}"
    return f"{weights}, {len(results)} check{'s' if len(results) > 1 else ''}"


def write_between_marks(path, lines):
    """Put the lines between the marks of a file; SystemExit where there are no marks."""
    text = path.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{path} has no {BEGIN} ... {END}")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    path.write_text(f"{before}{BEGIN}\n{chr(10).join(lines)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
