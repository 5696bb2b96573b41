"""A study that several tests look at."""

import pytest

from .study_files import build, draw_pairs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, pairs, Study, page, Key) of a study of 60 pairs."""
    folder = tmp_path_factory.mktemp("study")
    pairs = draw_pairs(folder / "images", 60)
    return folder, pairs, *build(folder, pairs)
