"""A recipe to write artifacts from."""

import pytest

from ..conftest import SHAPES


@pytest.fixture
def recipe(tmp_path):
    """A recipe on the shapes pipeline in a folder of its own."""
    path = tmp_path / "r.yaml"
    path.write_text(
        f"schema: 1\nname: r\nbase: {{pipeline: {SHAPES}}}\n"
        "operations: [{replace: cross-attention, with: {operator: pladis, scale: 1.0}}]\n"
        "publish: {license: apache-2.0}\n"
    )
    return path
