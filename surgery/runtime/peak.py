"""Peak memory of drawing: what CUDA allocated, or how much of a fresh process of a CPU was resident."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from surgery.errors import SurgeryError

from .worker import ImageRequest, Worker, WorkerConfig

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
HOW = {
    "cuda": "the most that torch had allocated on the GPU while drawing",
    "cpu": "the most resident memory of a fresh process while it drew, the model and Python's libraries included",
    "whole": "the most resident memory of a fresh process, loading the model included",
}


def cuda_peak(draw: Callable[[], object]) -> int:
    """The most bytes that torch had allocated on the current GPU while `draw` ran."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    draw()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def process_peak(
    config: WorkerConfig,
    operations: list[dict] | None,
    requests: list[ImageRequest],
    sampling: Mapping[str, Any],
    warm: Mapping[str, Any],
) -> tuple[int, str]:
    """(most resident bytes of a new process that draws `requests`, the key in HOW), after it drew them as `warm` says.

    Raises SurgeryError where that process fails, which the system may have killed.
    """
    asked = {"config": asdict(config), "operations": operations, "sampling": dict(sampling), "warm": dict(warm)}
    asked["requests"] = [asdict(request) for request in requests]
    done = subprocess.run(
        [sys.executable, "-m", __name__], input=json.dumps(asked), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"it ended with status {done.returncode}"]
        raise SurgeryError(f"the process that measures memory failed: {last[0]}; leave memory out with --no-memory")
    told = json.loads(done.stdout.splitlines()[-1])
    return told["bytes"], told["how"]


def resident_peak(act: Callable[[], object]) -> tuple[int, str]:
    """(most resident bytes of this process while `act` ran, "cpu"); "whole" where it is since the process began."""
    try:
        _CLEAR.write_text("5")  # of Linux: the high-water mark is what is resident now
    except OSError:
        act()
        return _whole_peak(), "whole"
    act()
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024, "cpu"


def _whole_peak():
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _main():
    from surgery.console import quiet_notices
    from surgery.models.patching import operate

    asked = json.loads(sys.stdin.read())
    quiet_notices()
    worker = Worker(WorkerConfig(**asked["config"]))
    requests = [ImageRequest(**request) for request in asked["requests"]]
    operate(worker.pipeline, asked["operations"])
    worker.draw(requests, asked["warm"])
    most, how = resident_peak(lambda: worker.draw(requests, asked["sampling"]))
    print(json.dumps({"bytes": most, "how": how}))


if __name__ == "__main__":
    _main()
