"""What the operator of a server decides: how much it takes on, and how its replicas load the model."""

import math
from dataclasses import dataclass

from surgery.errors import InputError

from .request import Setting


@dataclass(frozen=True)
class Limits:
    """What a server takes on. Times are in seconds; `max_pixels` is of one image.

    queue: requests that are accepted and not finished, over all replicas. batch_wait: how long an image waits for
    others of its settings while a replica is idle. hosts: names that requests may call the server by, in lower case.
    """

    max_batch: int = 4
    batch_wait: float = 0.05
    queue: int = 64
    timeout: float = 300.0
    max_images: int = 4
    max_pixels: int | None = None
    hosts: tuple[str, ...] = ()

    def check(self):
        """Raise InputError for a number out of range, naming its option."""
        for name, least in (("max_batch", 1), ("queue", 1), ("max_images", 1), ("max_pixels", 64)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{option(name)} must be at least {least}, not {value}")
        check_seconds("batch_wait", self.batch_wait, zero=True)
        check_seconds("timeout", self.timeout)


@dataclass(frozen=True)
class Order:
    """What a replica is told to load.

    model: an absolute folder or a Hub repository, whose artifact must have this hash; None for a plain pipeline.
    threads: of the CPU, None for torch's own choice. dtype: "float16" and so on, None for the model's own.
    engine, trust_engines, fallback, compile: as in `surgery.load`. warm: what is drawn before the replica is ready, one
    image and then `max_batch` of them, so that what has to be built or compiled is, and what does not fit is known.
    """

    model: str
    revision: str | None
    hash: str | None
    warm: Setting
    max_batch: int
    device: str | None = None
    dtype: str | None = None
    threads: int | None = None
    engine: str | None = None
    trust_engines: bool = False
    fallback: bool = False
    compile: str | None = None


def check_seconds(name, value, zero=False):
    """Raise InputError for what is no time to wait."""
    if not (math.isfinite(value) and (value >= 0 if zero else value > 0)):
        raise InputError(f"{option(name)} must be a number of seconds {'of 0 or more' if zero else 'above 0'}")


def option(name):
    """ "--max-batch" for "max_batch"."""
    return f"--{name.replace('_', '-')}"
