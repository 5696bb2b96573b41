"""Peak memory and time of `surgery export` on an SDXL-sized folder, beside the size of its weights on disk.

    python benchmarks/sdxl_folder.py DIR && python benchmarks/export_sdxl.py DIR --shapes 1x128x128 --regional

Applies PLADIS and builds one engine as a user would, in a process of its own; other options go to `surgery export`.
Memory is what is resident of that process and its children (compilers among them), read every half second: what is
theirs alone, and pages of files that are mapped, as the weights are. The peak is the largest sum of both of a stage.
Prints one JSON object.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch
from apply_sdxl import RECIPE, timed


class Memory(threading.Thread):
    """The most memory of a process tree, by the last line that it said: {line: {"anonymous": ..., "mapped": ...}}."""

    def __init__(self, pid):
        super().__init__(daemon=True)
        self.process, self.said, self.most = psutil.Process(pid), "start", {}

    def run(self):
        while self.process.is_running():
            try:
                below = [self.process, *self.process.children(recursive=True)]
                found = [one.memory_info() for one in below]
            except psutil.NoSuchProcess:
                continue
            mapped = sum(one.shared for one in found)
            most = self.most.setdefault(self.said, {"anonymous": 0, "mapped": 0})
            most["anonymous"] = max(most["anonymous"], sum(one.rss for one in found) - mapped)
            most["mapped"] = max(most["mapped"], mapped)
            time.sleep(0.5)


def main():
    """Run the commands and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("--target", default="inductor")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--shapes", default="1x256x256")
    options, more = parser.parse_known_args()
    base = options.base.resolve()
    weights = sum(path.stat().st_size for path in base.rglob("*.safetensors"))
    with tempfile.TemporaryDirectory(dir=base.parent) as work:
        recipe, out = Path(work, "sdxl.yaml"), Path(work, "out")
        recipe.write_text(RECIPE.format(base=base))
        timed("apply", str(recipe), "--out", str(out))
        command = ["export", str(out), "--target", options.target, "--dtype", options.dtype, "--shapes", options.shapes]
        command = [sys.executable, "-m", "surgery", *command, "--json", *more]
        begun = time.monotonic()
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        memory = Memory(run.pid)
        memory.start()
        for line in run.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            if line.startswith("surgery: "):
                memory.said = line.removeprefix("surgery: ").strip()
        output = run.stdout.read()
        if run.wait():
            sys.exit("surgery export failed")
        seconds = time.monotonic() - begun
    engine = json.loads(output)["engines"][0]
    peak = max(sum(one.values()) for one in memory.most.values())
    figures = {
        "machine": f"{os.cpu_count()} CPUs, {platform.platform()}, torch {torch.__version__}",
        "engine": engine["folder"].rpartition("/")[2],
        "seconds": round(seconds),
        "weights_gb": round(weights / 1e9, 2),
        "peak_gb": round(peak / 1e9, 2),
        "peak_over_weights": round(peak / weights, 2),
        "difference": engine["difference"],
        "stages_gb": {
            line: {kind: round(size / 1e9, 2) for kind, size in most.items()} for line, most in memory.most.items()
        },
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
