"""Which of every method on every backbone `make test` samples: each backbone meets a quarter of the methods there."""

import pytest

from surgery.guidance.methods import METHODS

WHOLE = "flux"  # meets every method, as the UNets do in test_methods.py


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark the others slow; benchmarks/matrix.py and `make test-all` run them all."""
    families = {}
    for item in items:
        if item.path.parts[-2:] == ("guidance", "test_backbones.py"):
            family, method = item.callspec.params["built"], item.callspec.params["method"]
            at = families.setdefault(str(family), len(families))
            if family.name != WHOLE and (at + list(METHODS).index(method)) % 4:
                item.add_marker(pytest.mark.slow)
