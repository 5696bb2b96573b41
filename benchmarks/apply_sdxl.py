"""Time, peak memory and disk of `surgery plan` and `surgery apply` on an SDXL-sized folder.

    python benchmarks/sdxl_folder.py DIR && python benchmarks/apply_sdxl.py DIR

Each command runs as its user would start it, in a process of its own; wall time therefore includes starting Python
and importing torch and diffusers. Prints one JSON object.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

RECIPE = """
schema: 1
name: sdxl-benchmark
base: {{pipeline: {base}}}
operations: [{{replace: cross-attention, layers: all, with: {{operator: pladis}}}}]
"""


def timed(*command):
    """(seconds, peak resident bytes, standard output) of a command."""
    before = time.monotonic()
    run = subprocess.Popen([sys.executable, "-m", "surgery", *command], stdout=subprocess.PIPE, text=True)
    output = run.stdout.read()
    _, status, usage = os.wait4(run.pid, 0)
    if status:
        sys.exit(f"surgery {' '.join(command)} failed")
    return time.monotonic() - before, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), output


def main():
    """Run the commands and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    base = parser.parse_args().base.resolve()
    figures = {"machine": f"{os.cpu_count()} CPUs, {platform.platform()}, torch {torch.__version__}"}
    with tempfile.TemporaryDirectory(dir=base.parent) as work:
        recipe, out = Path(work, "sdxl.yaml"), Path(work, "out")
        recipe.write_text(RECIPE.format(base=base))
        help_seconds = [timed("--help")[0] for _ in range(3)]
        timed("plan", str(recipe))  # once, so that the libraries' files are in the page cache for all that follow
        plans = [timed("plan", str(recipe), "--json") for _ in range(3)]
        free = shutil.disk_usage(work).free
        applied, memory, output = timed("apply", str(recipe), "--out", str(out), "--json")
        written = json.loads(output)
        own = [path.stat() for path in out.rglob("*") if path.is_file()]
        figures |= {
            "help_s": round(min(help_seconds), 3),
            "plan_s": [round(seconds, 2) for seconds, _, _ in plans],
            "plan_modules_replaced": json.loads(plans[0][2])["totals"]["replaced"],
            "apply_wall_s": round(applied, 2),
            "apply_hashing_s": written["seconds"]["hashing"],
            "apply_wall_without_hashing_s": round(applied - written["seconds"]["hashing"], 2),
            "apply_peak_memory_mb": round(memory / 1e6),
            "artifact_gb": round(sum(stat.st_size for stat in own) / 1e9, 2),
            "artifact_own_kb": round(sum(stat.st_size for stat in own if stat.st_nlink == 1) / 1e3),
            "disk_taken_kb": round((free - shutil.disk_usage(work).free) / 1e3),
        }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
