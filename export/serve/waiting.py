"""When a client that finds the queue full should come back: when there is likely to be room for it alone."""

import math
import time
from collections.abc import Callable

_FIRST_GUESS = 0.25  # seconds that an image takes a step, until one was drawn
_LATEST = 110.0  # seconds; OpenAI's client gives up where it is told to wait for more than 120
_MARGIN = 1.25
_NEWEST = 0.3  # the weight of the newest batch


class Line:
    """Clients that were refused and told when to come back.

    One time for all would have them come back together and be refused again: the k-th is told when k of the requests
    that are accepted now will be done, as measured of late; but as many at once as a batch holds. clock: seconds,
    monotonic.
    """

    def __init__(self, batch: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self._at_once, self._clock = batch, clock
        self._pace, self._batch, self._is_measured = _FIRST_GUESS, 0.0, False
        self._promised = []

    def start(self, pace: float) -> None:
        """What a replica tells of its warm-up: seconds that an image takes a step."""
        if pace > 0 and not self._is_measured:
            self._pace = pace

    def batch(self, seconds: float, steps: float) -> None:
        """A batch took so many seconds; steps: of all its images together, one of n times the pixels counting n."""
        if steps > 0:
            pace = seconds / steps
            self._pace += _NEWEST * (pace - self._pace) if self._is_measured else pace - self._pace
            self._batch += _NEWEST * (seconds - self._batch) if self._is_measured else seconds
            self._is_measured = True

    def seconds(self, steps: float, replicas: int, promise: bool = True) -> float:
        """For how long a client should wait. steps: of an accepted request, on average. promise: it will come back."""
        now = self._clock()
        self._promised = [when for when in self._promised if when > now]
        each = steps * self._pace / max(1, replicas)
        before = math.ceil((len(self._promised) + 1) / self._at_once) * self._at_once
        wait = (before * each + max(self._batch, steps * self._pace)) * _MARGIN
        wait = min(wait, _LATEST)
        if promise:
            self._promised.append(now + wait)
        return wait


def retry_headers(seconds: float) -> dict[str, str]:
    """Retry-After, which is in whole seconds, and what OpenAI's clients read before it."""
    return {"Retry-After": str(max(1, math.ceil(seconds))), "retry-after-ms": str(max(1, round(seconds * 1000)))}
