"""A study that several tests look at."""

import pytest

from .study_files import build, draw_exhibits


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, exhibits, Study, page, Key) of a study of 60 pairs."""
    folder = tmp_path_factory.mktemp("study")
    exhibits = draw_exhibits(folder / "images", 60)
    return folder, exhibits, *build(folder, exhibits)
