"""Threads on a CPU that others use too: the seconds of an image, with threads that spin while they wait or sleep.

    python benchmarks/threads.py [--others 0 4] [--rounds 3]

Each way is a process of its own that draws shapes images; they take turns, beside as many others as --others says,
which do nothing but count. Wall seconds, as ratios to one thread on the CPU that nobody shares, the median of all
rounds.
"""

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys

WAYS = {
    "one thread": {"OMP_NUM_THREADS": "1"},
    "all, spinning": {"OMP_WAIT_POLICY": "ACTIVE"},
    "all, torch's default": {},
    "all, asleep": {"OMP_WAIT_POLICY": "PASSIVE"},
    "all, as the commands": {"GOMP_SPINCOUNT": "10000"},
}
LIMIT = 120  # seconds of one process
DRAW = """
import time
from importlib import resources

import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(str(resources.files("surgery.recipes") / "shapes"), dtype=torch.float32)
pipeline.set_progress_bar_config(disable=True)
seconds = []
for _ in range(4):
    begun = time.perf_counter()
    pipeline("a red circle", num_inference_steps=4, height=64, width=64)
    seconds.append(time.perf_counter() - begun)
print(sorted(seconds[1:])[1])
"""


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--others", type=int, nargs="+", default=[0, 2 * (os.cpu_count() or 1)])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    found = {(way, others): [] for others in options.others for way in WAYS}
    for _ in range(options.rounds):
        for others in options.others:
            busy = [multiprocessing.Process(target=count, daemon=True) for _ in range(others)]
            for process in busy:
                process.start()
            for way, environment in WAYS.items():
                found[way, others].append(drawn(environment))
            for process in busy:
                process.kill()
    base = statistics.median(found["one thread", options.others[0]])
    print(f"| {os.cpu_count()} cores, beside | " + " | ".join(f"{others} others" for others in options.others) + " |")
    print("|---|" + "---|" * len(options.others))
    for way in WAYS:
        cells = [statistics.median(found[way, others]) / base for others in options.others]
        print(f"| {way} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |", flush=True)
    print(f"1.00 is {base:.3f} s; a process was cut off after {LIMIT} s")


def count() -> None:
    """Keep one core busy."""
    while True:
        pass


def drawn(environment: dict[str, str]) -> float:
    """Seconds of an image, or what is sure of it where the process was cut off."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    try:
        done = subprocess.run(
            [sys.executable, "-c", DRAW], env={**known, **environment}, capture_output=True, timeout=LIMIT, check=True
        )
    except subprocess.TimeoutExpired:
        return LIMIT / 4
    return float(done.stdout)


if __name__ == "__main__":
    main()
