"""Which of every method on every backbone `make test` samples: a backbone meets a third of them there, or a sixth."""

import pytest

from surgery.guidance.methods import METHODS

WHOLE = ("sd15", "flux")  # these meet every method


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark the others slow; benchmarks/matrix.py and `make test-all` run them all."""
    families = {}
    for item in items:
        if item.name.startswith("test_it_runs_in"):
            at = families.setdefault(item.callspec.params["built"], len(families))
            if (at + list(METHODS).index(item.callspec.params["method"])) % 6:
                item.add_marker(pytest.mark.slow)
        if item.name.startswith("test_it_runs_with_pladis_and_gag_or_is_refused_by_name"):
            family, method = item.callspec.params["built"], item.callspec.params["method"]
            at = families.setdefault(str(family), len(families))
            if family.name not in WHOLE and (at + list(METHODS).index(method)) % 3:
                item.add_marker(pytest.mark.slow)
