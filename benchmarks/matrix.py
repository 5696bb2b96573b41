"""The tables in docs of backbones by operators and by guidance, from what the tests did: they cannot lie.

    python benchmarks/matrix.py            # runs tests/nn/backbones and tests/guidance, and writes the tables
    python benchmarks/matrix.py --junit results.xml      # from a run with --junitxml=results.xml

A cell says on what the operator was run on that backbone, and how many checks of it passed; a check that failed is
named. The checks are the functions of tests/nn/backbones/test_backbones.py, tests/guidance/test_backbones.py and
tests/guidance/test_loops.py, which record what they are about.
"""

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from surgery.guidance.methods import METHODS
from surgery.nn.operators import operators_table

HERE = Path(__file__).resolve().parent.parent
DOCS = HERE / "docs"
TESTS = ("tests/nn/backbones/test_backbones.py", "tests/guidance/test_backbones.py", "tests/guidance/test_loops.py")
OPERATORS = ("pladis", "gag", "sparse", "anderson")
UNETS = ("shapes", "sdxl")
IMAGES = (
    *("pixart", "sana", "sana_sprint", "flux", "flux2", "flux3", "sd3", "qwen_image", "chroma", "z_image", "krea2"),
    *("longcat_image", "ovis_image", "bria", "bria_fibo", "bria_fibo2", "ernie_image", "hunyuan_image", "lumina2"),
    *("cogview4", "aura_flow", "prx", "kandinsky5", "hidream", "glm_image", "nucleus_moe"),
)
VIDEOS = ("ltx", "ltx2", "wan", "wan_from_image", "mochi", "hunyuan_video", "hunyuan_video15", "sana_video", "cosmos")
VIDEOS += ("cosmos25", "svd")
BACKBONES = (*UNETS, *IMAGES, *VIDEOS)  # the rows' order, whatever order the tests ran in
TRAINED = ("shapes",)  # backbones whose pipeline was trained; the others have random weights


def main():
    """Run the tests unless their results are given, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--junit", type=Path, nargs="+", help="results of runs of those tests with --junitxml")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        junit = options.junit or [run_tests(Path(folder) / "results.xml")]
        tables = {"backbones": table(read_results(junit)), "guidance": guidance_table(read_guidance(junit))}
        tables["operators"] = operators_table()
    for name, lines in tables.items():
        print("\n".join(lines))
        write_between_marks(DOCS / f"{name}.md", name, lines)


def run_tests(junit):
    """Run the tests of the backbones; the file with their results."""
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={junit}", "-m", "slow or not slow", *TESTS]
    subprocess.run(command, cwd=HERE, check=False)
    return junit


def cases(files):
    """[({property: value}, function, whether it failed)] of JUnit files' tests that were not skipped.

    Of one that is in several files, the last.
    """
    found = [case for path in files for case in ElementTree.parse(path).iter("testcase")]
    last = {(case.get("classname"), case.get("name")): case for case in found}
    return [
        (
            {one.get("name"): one.get("value") for one in case.iter("property")},
            name.partition("[")[0],
            case.find("failure") is not None or case.find("error") is not None,
        )
        for (_, name), case in last.items()
        if case.find("skipped") is None
    ]


def read_results(junit):
    """[(backbone, class, operator, check, "passed" | "failed")] of JUnit files; skipped tests are left out."""
    found = []
    for facts, check, failed in cases(junit):
        outcome = "failed" if failed else "passed"
        for operator in facts.get("operators", "").split():
            found.append((facts["backbone"], facts["model_class"], operator, check, outcome))
    return found


def table(results):
    """The lines of a Markdown table: a row for each backbone, a column for each operator."""
    rows = [f"| backbone | model class | {' | '.join(OPERATORS)} |", "|---" * (2 + len(OPERATORS)) + "|"]
    for backbone, model_class in in_order(result[:2] for result in results):
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


def read_guidance(junit):
    """[(backbone, method, check, "passed" | "failed" | "refused")] of JUnit files; skipped tests are left out."""
    found = []
    for facts, check, failed in cases(junit):
        outcome = "failed" if failed else "refused" if "refused" in facts else "passed"
        if "guided_backbone" in facts:
            found.append((facts["guided_backbone"], facts["method"], check, outcome))
    return found


def guidance_table(results):
    """The lines of a Markdown table: a row for each backbone, a column for each method."""
    rows = [f"| backbone | {' | '.join(METHODS)} |", "|---" * (1 + len(METHODS)) + "|"]
    for (backbone,) in in_order(result[:1] for result in results):
        cells = [guidance_cell([r[2:] for r in results if r[:2] == (backbone, method)]) for method in METHODS]
        rows.append(f"| {backbone} | {' | '.join(cells)} |")
    return rows


def in_order(rows):
    """The rows, each once, by the place of their backbone in BACKBONES, others by name behind them."""
    return sorted(set(rows), key=lambda row: (BACKBONES.index(row[0]) if row[0] in BACKBONES else len(BACKBONES), *row))


def guidance_cell(results):
    """ "checked" where the weak branch was held to one computed by hand, "ran" where it was run, "refused"."""
    outcomes = {outcome for _, outcome in results}
    if "failed" in outcomes:
        return f"**fails**: {', '.join(sorted(check for check, outcome in results if outcome == 'failed'))}"
    if not outcomes or "refused" in outcomes:
        return "refused" if outcomes else "not run"
    return "checked" if any("weak_branch" in check for check, _ in results) else "ran"


def write_between_marks(path, name, lines):
    """Put the lines between a table's marks in a file; SystemExit where there are no marks."""
    begin, end = f"<!-- {name}: written by benchmarks/matrix.py -->", f"<!-- end of {name} -->"
    text = path.read_text(encoding="utf-8")
    if begin not in text or end not in text:
        raise SystemExit(f"{path} has no {begin} ... {end}")
    before, _, rest = text.partition(begin)
    after = rest.partition(end)[2]
    path.write_text(f"{before}{begin}\n{chr(10).join(lines)}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
