"""How long a refused client is told to wait: each longer than the one before, by what was measured."""

import pytest

from surgery.export.serve.waiting import Line, retry_headers


def test_each_refused_client_is_told_when_there_is_room_for_it():
    now = [100.0]
    line = Line(clock=lambda: now[0])
    line.start(0.5)
    waits = [line.seconds(steps=4, replicas=2) for _ in range(3)]
    # A request is 4 steps of 0.5 s on two replicas: one is done each second. The first is told to wait for one and for
    # the batch that is being drawn, 2 s; all with a quarter more.
    assert waits == pytest.approx([1.25 * 3, 1.25 * 4, 1.25 * 5])
    now[0] += 100
    assert line.seconds(4, 2) == pytest.approx(1.25 * 3)  # those have been
    together = Line(2, lambda: now[0])
    together.start(0.5)
    assert [together.seconds(4, 2) for _ in range(4)] == pytest.approx([5.0, 5.0, 7.5, 7.5])


def test_the_pace_is_that_of_the_batches_and_the_warm_up_counts_until_there_is_one():
    line = Line(clock=lambda: 0.0)
    line.start(9.0)
    line.batch(seconds=2.0, steps=20)
    line.start(9.0)
    assert line.seconds(10, 1, promise=False) == pytest.approx(1.25 * (1.0 + 2.0))
    line.batch(seconds=4.0, steps=20)
    assert line.seconds(10, 1, promise=False) == pytest.approx(1.25 * (1.3 + 2.6))  # the newest weighs 0.3


def test_no_client_is_told_more_than_it_would_wait_for_and_none_nothing():
    line = Line(clock=lambda: 0.0)
    line.start(100.0)
    assert line.seconds(1000, 1) == 110
    assert retry_headers(0.0) == {"Retry-After": "1", "retry-after-ms": "1"}
    assert retry_headers(2.3) == {"Retry-After": "3", "retry-after-ms": "2300"}
