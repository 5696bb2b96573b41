"""The training loop: learning rate, averaged weights, checkpoints, progress."""

import contextlib
import os
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch

_SAVE_EVERY = 300  # seconds


@dataclass(frozen=True)
class Training:
    """How long and how fast one part is trained. `samples` in all, `batch` of them a step, over all workers.

    The learning rate rises over `warmup` steps, stays, and falls to zero over the last `decay` of the steps; so a run
    can be lengthened from the checkpoint that is kept where it began to fall.
    """

    samples: int
    rate: float
    batch: int = 64
    warmup: int = 50
    decay: float = 0.3
    average: float = 0.999  # of the weights that are kept, per step
    seed: int = 0

    @property
    def steps(self):
        return self.samples // self.batch

    @property
    def falls_from(self):
        return round(self.steps * (1 - self.decay))

    def rate_at(self, step):
        falling = (self.steps - step) / max(1, self.steps - self.falls_from)
        return self.rate * min(1.0, (step + 1) / self.warmup, falling)


def train(name, parameters, loss_of, training, workers, folder):
    """Train `parameters` in place; they end as the average of their last values.

    loss_of(random, generator, count) -> (loss, {name: number} to show); the numpy and the torch generator are those of
    this step and worker, so that a run that was interrupted goes on as if it had not been. Checkpoints lie in `folder`.
    """
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=training.rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    averaged = [parameter.detach().clone() for parameter in parameters]
    step, seconds = _resume(folder / f"{name}.pt", parameters, optimizer, averaged, training, workers)
    started = saved = time.monotonic()
    shown = []
    while step < training.steps:
        if workers.is_first and step == training.falls_from:
            _save(folder / f"{name}-before-decay.pt", step, parameters, optimizer, averaged, seconds, training)
        for group in optimizer.param_groups:
            group["lr"] = training.rate_at(step)
        # A step's randomness is a matter of its number alone.
        random = np.random.default_rng([training.seed, step, workers.rank])
        generator = torch.Generator(workers.device).manual_seed(int(random.integers(2**62)))
        loss, figures = loss_of(random, generator, training.batch // workers.count)
        optimizer.zero_grad()
        loss.backward()
        workers.average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            share = min(training.average, step / (step + 10))
            torch._foreach_lerp_(averaged, [parameter.detach() for parameter in parameters], 1 - share)
        shown.append({"loss": loss.item(), **figures})
        if workers.is_first and step % 50 == 0:
            spent = seconds + time.monotonic() - started
            means = ", ".join(f"{key} {np.mean([one[key] for one in shown]):.4f}" for key in shown[0])
            left = spent / step * (training.steps - step)
            print(
                f"{name}: step {step} of {training.steps}, {means}, {spent:.0f} s, about {left:.0f} s left", flush=True
            )
            shown = []
        if workers.is_first and time.monotonic() - saved > _SAVE_EVERY:
            spent = seconds + time.monotonic() - started
            _save(folder / f"{name}.pt", step, parameters, optimizer, averaged, spent, training)
            saved = time.monotonic()
    with torch.no_grad():
        for parameter, average in zip(parameters, averaged, strict=True):
            parameter.copy_(average)
    return seconds + time.monotonic() - started


def precision(device):
    """Half-precision products where the device has them; a CPU without them is slower that way."""
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


def _save(path, step, parameters, optimizer, averaged, seconds, training):
    state = {"step": step, "seconds": seconds, "optimizer": optimizer.state_dict(), "averaged": averaged}
    state |= {"parameters": [parameter.detach() for parameter in parameters], "seed": training.seed}
    state["batch"] = training.batch
    temporary = path.with_suffix(".part")
    torch.save(state, temporary)
    os.replace(temporary, path)


def _resume(path, parameters, optimizer, averaged, training, workers):
    """(step, seconds spent) of the checkpoint at `path`, read into what is given; (0, 0) where there is none."""
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, map_location=workers.device, weights_only=True)
    if (state["seed"], state["batch"]) != (training.seed, training.batch) or state["step"] > training.steps:
        sys.exit(
            f"{path}: a checkpoint of another run (seed, batch or length differ). Move it away or take another --out."
        )
    optimizer.load_state_dict(state["optimizer"])
    with torch.no_grad():
        for kept, read in ((parameters, state["parameters"]), (averaged, state["averaged"])):
            for tensor, value in zip(kept, read, strict=True):
                tensor.copy_(value)
    if workers.is_first:
        print(f"{path.name}: going on from step {state['step']}", flush=True)
    return state["step"], state["seconds"]
