"""Which of every method on every backbone `make test` samples: a backbone meets a sixth of them there, or an eighth."""

import pytest

from surgery.guidance.methods import METHODS

WHOLE = "flux"  # meets every method, as the UNets do in test_methods.py


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark the others slow; benchmarks/matrix.py and `make test-all` run them all."""
    families = {}
    for item in items:
        if item.name.startswith("test_it_runs_in"):
            at = families.setdefault(item.callspec.params["built"], len(families))
            if (at + list(METHODS).index(item.callspec.params["method"])) % 8:
                item.add_marker(pytest.mark.slow)
        if item.name.startswith("test_it_runs_with_pladis_and_gag_or_is_refused_by_name"):
            family, method = item.callspec.params["built"], item.callspec.params["method"]
            at = families.setdefault(str(family), len(families))
            if family.name != WHOLE and (at + list(METHODS).index(method)) % 6:
                item.add_marker(pytest.mark.slow)
