"""A job's items divided among processes: compiling for a GPU takes a core each, and there are many.

    python benchmarks/gpu_workers.py MODULE INDEX OF FILE DEVICE SECONDS      # what `spread` starts

A job is a module beside this one with `items(device)`, a list that is the same in every process, and
`work(item, device)`, whose result is a dictionary. A worker takes every OF-th item and appends a line of JSON before
and after each, so a crash costs that item alone: another worker goes on behind it.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

_BROKEN = 3  # exit status of a worker whose CUDA context is no longer usable
_MOST_STARTS = 6  # of one share


def spread(report, module, seconds, processes=None):
    """[(item's index, its result, or {"error_text"})] of what was done in time, and how many items there are."""
    items = len(import_module(module).items(report.device))
    count = min(processes or len(os.sched_getaffinity(0)), items)  # one a core
    deadline = time.time() + min(seconds, report.left())
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{index}.jsonl" for index in range(count)]
        running, starts, said = {}, dict.fromkeys(range(count), 0), -1

        def start(index):
            starts[index] += 1
            left = str(deadline - time.time())
            command = [sys.executable, __file__, module, str(index), str(count), str(files[index]), report.device, left]
            log = files[index].with_suffix(f".{starts[index]}.log")
            with log.open("w") as output:
                running[index] = subprocess.Popen(command, stdout=output, stderr=output, env=environment)

        for index in range(count):
            start(index)
        try:
            while running and time.time() < deadline:
                time.sleep(0.1)
                for index, process in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[index]
                    if process.returncode and starts[index] < _MOST_STARTS:
                        start(index)
                done = sum(_results(file)[1] for file in files)
                if done >= said + max(1, items // 10):
                    said = done
                    report.say(f"{done} of {items} done by {len(running)} processes")
        finally:
            for process in running.values():
                process.kill()
            for process in running.values():
                process.wait()
        found = [result for file in files for result in _results(file)[0]]
        if not found:
            report.fact("workers_said", _last_words(Path(folder)))
    return sorted(found, key=lambda result: result[0]), items


def _results(file):
    """([(index, result)], how many were ended) of a worker's file; one begun and never ended crashed its worker."""
    begun, ended = [], {}
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue  # the worker was stopped within a line
        if "result" in entry:
            ended[entry["index"]] = entry["result"]
        else:
            begun.append(entry["index"])
    crashed = {index: {"error_text": "its process died"} for index in begun[:-1] if index not in ended}
    return [*ended.items(), *crashed.items()], len(ended)


def _last_words(folder):
    texts = [path.read_text(errors="replace").strip() for path in sorted(folder.glob("*.log"))]
    return next((text.splitlines()[-1][:300] for text in texts if text), "nothing")


def main():
    """Work through a share."""
    module, index, of, path, device, seconds = sys.argv[1:]
    stop = time.time() + float(seconds)
    import torch
    from gpu_report import first_lines

    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    job, path = import_module(module), Path(path)
    seen = {json.loads(line)["index"] for line in path.read_text().splitlines()} if path.is_file() else set()
    with path.open("a") as file:
        for number, item in list(enumerate(job.items(device)))[int(index) :: int(of)]:
            if number in seen or time.time() > stop:
                continue
            print(json.dumps({"index": number}), file=file, flush=True)
            try:
                result = job.work(item, device)
            except Exception as error:
                result = {"error_text": first_lines(error)}
            print(json.dumps({"index": number, "result": result}), file=file, flush=True)
            if device == "cuda":
                try:
                    torch.cuda.synchronize()
                except RuntimeError:
                    sys.exit(_BROKEN)


if __name__ == "__main__":
    main()
