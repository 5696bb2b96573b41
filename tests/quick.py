"""Parameters of which `make test` runs some, and `make test-all` all."""

import pytest


def quick(values, *wanted):
    """Values for `parametrize`; those that are not `wanted` are slow. A tuple is one value of several names."""
    absent = [value for value in wanted if value not in values]
    assert not absent, f"no such parameters: {absent}"
    return [value if value in wanted else pytest.param(*_names(value), marks=pytest.mark.slow) for value in values]


def one_in(count, values, start=0):
    """Values for `parametrize`; all but one in `count`, from place `start` on, are slow."""
    values = list(values)
    return quick(values, *values[start::count])


def taking_turns(count, first, second):
    """Pairs of values for `parametrize`: all but one in `count` of each value's pairs are slow, the others' turn."""
    pairs = [(one, other) for one in first for other in second]
    turns = [at // len(second) + at % len(second) for at in range(len(pairs))]
    return quick(pairs, *(pair for pair, turn in zip(pairs, turns, strict=True) if turn % count == 0))


def _names(value):
    return value if isinstance(value, tuple) else (value,)
