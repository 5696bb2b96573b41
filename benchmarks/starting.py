"""CPU seconds of a verb that reads no weights, from its start to its end, light beside whole (surgery/cli/light.py).

    python benchmarks/starting.py [--rounds 5]

Each is a process of its own, user and system time together; they take turns. One thread; the files that python has
compiled are there. The figures are medians of all rounds, the share that of the medians.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from importlib import resources
from pathlib import Path

PIPELINE = str(resources.files("surgery.recipes") / "shapes")
SURGERY = [sys.executable, "-m", "surgery"]
STARTS = {
    "import torch": [sys.executable, "-c", "import torch"],
    "surgery plan shapes": [*SURGERY, "plan", "shapes"],
    "surgery inspect": [*SURGERY, "inspect", PIPELINE],
    "surgery new": [*SURGERY, "new", PIPELINE, "--out", "-"],
    "surgery verify": [*SURGERY, "verify", "./artifact"],
    "surgery recipes": [*SURGERY, "recipes"],
    "surgery generate --help": [*SURGERY, "generate", "--help"],
}
WHOLE = {"SURGERY_START_WHOLE": "1"}
LIGHT = ("surgery plan shapes", "surgery inspect", "surgery new")


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        cpu_seconds([*SURGERY, "apply", "shapes", "--out", str(Path(folder) / "artifact")], folder)
        for _ in range(options.rounds):
            for title, command in STARTS.items():
                found.setdefault(title, []).append(cpu_seconds(command, folder))
                if title in LIGHT:
                    found.setdefault((title, "whole"), []).append(cpu_seconds(command, folder, WHOLE))
    print("| | CPU seconds | with everything | share |\n|---|---|---|---|")
    for title in STARTS:
        light = statistics.median(found[title])
        whole = statistics.median(found[title, "whole"]) if title in LIGHT else None
        print(f"| `{title}` | {light:.2f} | " + (f"{whole:.2f} | {light / whole:.2f} |" if whole else "| |"))


def cpu_seconds(command: list[str], folder: str, environment: dict[str, str] | None = None) -> float:
    """User and system time of a command in a process of its own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
