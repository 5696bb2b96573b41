"""One opened model for the room: the shapes recipe's artifact, as `surgery studio shapes` opens it."""

import pytest

from surgery.studio.opening import open_for_page
from surgery.studio.session import Session

PROMPT = "a red circle to the left of a blue square"
QUICK = {"prompt": PROMPT, "steps": 3, "images": 1}  # of a screen


@pytest.fixture(scope="package")
def opened(tmp_path_factory):
    """The Opened of the recipe."""
    return open_for_page("shapes", out=tmp_path_factory.mktemp("studio"))


@pytest.fixture(scope="package")
def session(opened):
    """A Session with it."""
    return Session(opened)
