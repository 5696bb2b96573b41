"""An artifact of the tiny trained pipeline that is drawn in two steps, and the WorkerConfig for it."""

import json

import pytest

from surgery.artifact import read_manifest
from surgery.runtime.worker import WorkerConfig
from surgery.validate.jobs import environment, sides_of

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
def config(artifact, manifest):
    """The WorkerConfig that draws it on one thread of the CPU."""
    return WorkerConfig(str(artifact), None, manifest.hash, manifest.sampling, device="cpu", threads=1)


@pytest.fixture
def prompt_file(tmp_path):
    """A file of six prompts in two categories."""
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": text, "category": "ab"[at % 2]} for at, text in enumerate(PROMPTS)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path
