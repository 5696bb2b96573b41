"""Throughput and latency of `surgery serve` at saturation: one by one, in batches, with a replica killed; and a soak.

    surgery apply shapes --out out/shapes && python benchmarks/serving.py out/shapes --steps 8
    python benchmarks/serving.py OWNER/NAME --replicas 1 --device cuda --clients 32 --max-batch 8 --seconds 120
    python benchmarks/serving.py out/shapes --steps 8 --soak 1000

Closed loop: each of so many clients sends its next request as soon as its last one is answered, for so many seconds,
after a few seconds that are not counted; what is still under way at the end is waited for and not counted either. Every
request asks for one image with equal settings and a seed of its own. Each round starts two servers one after the other,
one with --max-batch 1 and one with --max-batch N, and measures the second twice; the second time, at half of the time,
it sends SIGKILL to the process of one replica. Rounds are repeated because a machine's speed varies; figures are over
all of them. The server's own /metrics say how many images a batch had.

With --soak N a server answers N requests instead, of which some have another size, some other hyperparameters, some an
address for an answer and some a mistake, so that all that it keeps is used; the memory of its processes is read after
each tenth.

Prints a table, and with --json one JSON object instead.
"""

import argparse
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import psutil

WARM_SECONDS = 3
CONDITIONS = ("one image at a time", "batches of up to {}", "the same, a replica killed")


@contextmanager
def server(arguments, max_batch):
    """(URL, process) of a `surgery serve` that is ready."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "surgery", "serve", arguments.model, "--port", port, "--max-batch", max_batch]
    command += [
        "--replicas",
        arguments.replicas,
        "--queue",
        2 * arguments.clients,
        "--batch-wait",
        arguments.batch_wait,
    ]
    command += ["--device", arguments.device] if arguments.device else []
    command += ["--threads", arguments.threads] if arguments.threads else []
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True)
    try:
        if not process.stdout.readline().startswith("http"):
            raise SystemExit("the server did not start")
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def ask(url, seed, arguments, more=None):
    """(HTTP status, seconds) of one request for one image. more: further fields of it."""
    asked = {"prompt": arguments.prompt, "seed": seed, "steps": arguments.steps, **(more or {})}
    begun = time.perf_counter()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/images/generations", json.dumps(asked).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            answer.read()
            status = answer.status
    except urllib.error.HTTPError as error:
        status = error.code
    return status, time.perf_counter() - begun


def load(url, arguments, at_half=lambda: None):
    """[(when it was answered, status, seconds)] of the requests that were answered in the time that counts."""
    answers, begun = [], time.perf_counter() + WARM_SECONDS
    end = begun + arguments.seconds

    def client(number):
        seed = number << 32
        while time.perf_counter() < end:
            status, seconds = ask(url, seed, arguments)
            answers.append((time.perf_counter(), status, seconds))
            seed += 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(arguments.clients)]
    for thread in threads:
        thread.start()
    time.sleep(WARM_SECONDS + arguments.seconds / 2)
    at_half()
    for thread in threads:
        thread.join()
    return [(when, status, seconds) for when, status, seconds in answers if begun <= when < end]


def metrics(url):
    """{name: value} of /metrics."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def kill_one(process):
    """Send SIGKILL to one replica of a server."""
    below = psutil.Process(process.pid).children(recursive=True)
    replica = next(one for one in below if ":Replica" in " ".join(one.cmdline()[:1]))
    os.kill(replica.pid, signal.SIGKILL)


def measure(url, arguments, at_half=lambda: None):
    """(answers, images a batch had on average, images drawn again) of one load."""
    before = metrics(url)
    answers = load(url, arguments, at_half)
    after = metrics(url)
    gained = {name: after[name] - before.get(name, 0.0) for name in after}
    batch = gained["surgery_batch_images_sum"] / gained["surgery_batch_images_count"]
    return answers, batch, gained["surgery_retried_images_total"]


SOAKED = (
    {},
    {"size": "64x96"},
    {"pladis": {"scale": 1.5}},
    {"response_format": "url", "output_format": "webp"},
    {"stream": True, "partial_images": 1},
    {"size": "63x64"},  # a mistake
)


def megabytes(processes):
    """What processes hold in memory."""
    return sum(one.memory_info().rss for one in processes) / 1e6


def soak(url, process, arguments):
    """[{process: MB of memory}] after each tenth of the requests, and {status: how many}."""
    below = psutil.Process(process.pid).children(recursive=True)
    kinds = {"gateway": ":Gateway", "replica": ":Replica", "proxy": ":ProxyActor"}
    named = {kind: [one for one in below if mark in " ".join(one.cmdline()[:1])] for kind, mark in kinds.items()}
    numbers, statuses, memory = iter(range(arguments.soak)), {}, []
    lock = threading.Lock()

    def client():
        while (number := next(numbers, None)) is not None:
            status, _ = ask(url, number, arguments, SOAKED[number % len(SOAKED)])
            with lock:
                statuses[status] = statuses.get(status, 0) + 1
                if not sum(statuses.values()) % max(1, arguments.soak // 10):
                    memory.append({kind: megabytes(each) for kind, each in named.items()})

    threads = [threading.Thread(target=client) for _ in range(arguments.clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return memory, statuses


def figures(rounds, arguments):
    """The figures of one condition over its rounds, [(answers, batch, retried)]."""
    seconds = sorted(seconds for answers, _, _ in rounds for _, status, seconds in answers if status == 200)
    each = [sum(status == 200 for _, status, _ in answers) / arguments.seconds for answers, _, _ in rounds]
    statuses = [status for answers, _, _ in rounds for _, status, _ in answers]
    return {
        "images_per_second": statistics.median(each),
        "images_per_second_of_each_round": each,
        "p50_seconds": seconds[len(seconds) // 2],
        "p95_seconds": seconds[min(len(seconds) - 1, int(0.95 * len(seconds)))],
        "p99_seconds": seconds[min(len(seconds) - 1, int(0.99 * len(seconds)))],
        "longest_seconds": seconds[-1],
        "images_per_batch": statistics.mean(batch for _, batch, _ in rounds),
        "drawn_again": sum(retried for _, _, retried in rounds),
        "answered": len(statuses),
        "answered_other_than_200": sum(status != 200 for status in statuses),
    }


def machine():
    """What this was measured on."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **{name: version(name) for name in ("torch", "diffusers", "ray")},
    }


def main():
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--max-batch", type=int, default=4)
    parser.add_argument("--batch-wait", type=float, default=0.05)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--prompt", default="a red circle to the left of a blue square")
    parser.add_argument("--device")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--soak", type=int, metavar="N")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.soak:
        with server(arguments, arguments.max_batch) as (url, process):
            memory, statuses = soak(url, process, arguments)
        if arguments.json:
            print(json.dumps({"machine": machine(), "megabytes": memory, "answers": statuses}, indent=2))
            return
        print(f"| of {arguments.soak} requests | {' | '.join(memory[0])} |\n|---|{'---|' * len(memory[0])}")
        for tenth, read in enumerate(memory, 1):
            print(f"| {tenth}/10 | {' | '.join(f'{value:.0f} MB' for value in read.values())} |")
        print(f"answers by status: {statuses}")
        return
    rounds = {name.format(arguments.max_batch): [] for name in CONDITIONS}
    single, batched, killed = rounds.values()
    for _ in range(arguments.rounds):
        with server(arguments, 1) as (url, _process):
            single.append(measure(url, arguments))
        with server(arguments, arguments.max_batch) as (url, process):
            batched.append(measure(url, arguments))
            killed.append(measure(url, arguments, lambda process=process: kill_one(process)))
    found = {name: figures(each, arguments) for name, each in rounds.items()}
    if arguments.json:
        print(json.dumps({"machine": machine(), "settings": vars(arguments), "figures": found}, indent=2))
        return
    print(", ".join(f"{name} {value}" for name, value in machine().items() if value))
    print(f"{arguments.replicas} replicas, {arguments.clients} clients, {arguments.steps} steps, ", end="")
    print(f"{arguments.rounds} rounds of {arguments.seconds:g} s\n")
    print("| | images/s | p50 | p95 | p99 | longest | images a batch | drawn again | answered | not 200 |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, made in found.items():
        times = " | ".join(
            f"{made[key]:.2f} s" for key in ("p50_seconds", "p95_seconds", "p99_seconds", "longest_seconds")
        )
        counts = " | ".join(f"{made[key]:.0f}" for key in ("drawn_again", "answered", "answered_other_than_200"))
        print(f"| {name} | {made['images_per_second']:.2f} | {times} | {made['images_per_batch']:.2f} | {counts} |")


if __name__ == "__main__":
    main()
