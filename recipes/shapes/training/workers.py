"""Several processes that train one model: each takes its part of every batch, gradients are averaged."""

import os
import signal
import tempfile
from pathlib import Path

import torch


class Workers:
    """This process's place among `count`: its rank, and what the processes do together."""

    def __init__(self, rank, count, device):
        self.rank, self.count, self.device = rank, count, torch.device(device)

    @property
    def is_first(self):
        return self.rank == 0

    def average_gradients(self, parameters):
        """Every process's gradients become their mean; as one message, because there are hundreds of small ones."""
        if self.count == 1:
            return
        gradients = [parameter.grad for parameter in parameters]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        torch.distributed.all_reduce(flat)
        flat /= self.count
        for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def wait(self):
        """Return when all have come here."""
        if self.count > 1:
            torch.distributed.barrier()


def run_workers(task, count, device, *arguments):
    """Call task(workers, *arguments) in `count` processes; in this one where there is only one."""
    if count == 1:
        task(Workers(0, 1, device), *arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        meeting = (Path(folder) / "meeting").as_uri()
        torch.multiprocessing.spawn(_worker, (task, count, device, meeting, arguments), nprocs=count)


def _worker(rank, task, count, device, meeting, arguments):
    # torch has SIGINT sent when the parent is gone; a shell's background jobs ignore it, and would train on for nobody.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # The processes share the cores: more threads than cores make each step several times slower.
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // count))
    torch.set_flush_denormal(True)
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count)
    try:
        task(Workers(rank, count, device), *arguments)
    finally:
        torch.distributed.destroy_process_group()
