"""Scoring what is on the Hub, and publishing what was scored."""

import json

import surgery
from surgery.validate.validating import validate

REPO = "me/tiny-pladis"
PROMPTS = ["a cat", "a dog", "a hat", "a car", "a sea", "a sun"]


def test_an_artifact_is_scored_published_and_scored_again_from_the_hub(hub, artifact, tmp_path, monkeypatch):
    done = validate(artifact, prompts=PROMPTS, metrics=["psnr"])
    surgery.push(artifact, REPO)
    card = hub.read(REPO, "README.md").decode()
    assert "How near the patched images are to the base's of the same seed" in card and "recipe (6 prompts" in card
    assert "| metric | better is |" not in card  # nothing to put into that table
    assert json.loads(hub.read(REPO, "scores.json"))["metrics"][0]["name"] == "psnr"
    assert surgery.verify(REPO).verified
    monkeypatch.chdir(tmp_path)
    again = validate(REPO, prompts=PROMPTS, metrics=["psnr"])
    assert again.scores.metrics == done.scores.metrics and again.scores.artifact_hash == done.scores.artifact_hash
    assert again.scores_file.parent == again.report.parent
    assert (tmp_path / "out" / "me--tiny-pladis-validation").is_dir()
    assert surgery.push(artifact, REPO).made is False
