"""An artifact of the tiny trained pipeline that is drawn in two steps, and an Order for it."""

import json

import pytest

from surgery.artifact import read_manifest
from surgery.runtime.workers import Order
from surgery.validate.jobs import environment, sides_of

from ..analysis.study_files import build, draw_pairs

PROMPTS = ["a red circle", "two green stars", "a blue square", "a star", "a cross and a star", "three black crosses"]


@pytest.fixture(scope="session")
def artifact(tmp_path_factory):
    """The folder of an artifact; tests that change it copy it first."""
    import surgery

    overrides = ["sampling.steps=2", "operations.0.with.scale=2.0"]
    folder = tmp_path_factory.mktemp("validate") / "shapes"
    return surgery.apply("shapes", folder, overrides=overrides).folder


@pytest.fixture(scope="session")
def manifest(artifact):
    """Its Manifest."""
    return read_manifest(artifact)


@pytest.fixture(scope="session")
def sides(artifact, manifest):
    """(base Side, patched Side)."""
    return sides_of(manifest, artifact, environment("cpu", None))


@pytest.fixture(scope="session")
def order(artifact, manifest):
    """The Order that draws it on one thread of the CPU."""
    return Order(str(artifact), None, manifest.hash, manifest.sampling, device="cpu", threads=1)


@pytest.fixture
def prompt_file(tmp_path):
    """A file of six prompts in two categories."""
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": text, "category": "ab"[at % 2]} for at, text in enumerate(PROMPTS)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, pairs, Study, page, Key) of a study of 60 pairs."""
    folder = tmp_path_factory.mktemp("study")
    pairs = draw_pairs(folder / "images", 60)
    return folder, pairs, *build(folder, pairs)
