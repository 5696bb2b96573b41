"""The artifact with engines that the tests of this folder share."""

import os
import shutil

import pytest

from .artifact import built_once


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The folder of an artifact with engines; tests copy it."""
    own = tmp_path_factory.getbasetemp()
    return built_once(own.parent if "PYTEST_XDIST_WORKER" in os.environ else own)  # the parent outlives a plain run


@pytest.fixture
def artifact(built, tmp_path):
    """A copy of it."""
    return shutil.copytree(built, tmp_path / "artifact")
