"""Scoring what is on the Hub, and publishing what was scored."""

import json

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries

import surgery
from surgery.validate.validating import validate

from .test_refusals import scores_of

REPO = "me/tiny-pladis"
PROMPTS = ["a cat", "a dog", "a hat", "a car", "a sea", "a sun"]


def test_an_artifact_is_scored_published_and_scored_again_from_the_hub(hub, artifact, tmp_path, monkeypatch):
    done = validate(artifact, prompts=PROMPTS, metrics=["psnr"])
    surgery.push(artifact, REPO)
    card = hub.read(REPO, "README.md").decode()
    assert "How near the patched images are to the base's of the same seed" in card and "recipe (6 prompts" in card
    assert "; 1 image each" in card
    assert "| metric | better is |" not in card  # nothing to put into that table
    assert json.loads(hub.read(REPO, "scores.json"))["metrics"][0]["name"] == "psnr"
    assert surgery.verify(REPO).verified
    monkeypatch.chdir(tmp_path)
    again = validate(REPO, prompts=PROMPTS, metrics=["psnr"])
    assert again.scores.metrics == done.scores.metrics and again.scores.artifact_hash == done.scores.artifact_hash
    assert again.scores_file.parent == again.report.parent
    assert (tmp_path / "out" / "me--tiny-pladis-validation").is_dir()
    assert surgery.push(artifact, REPO).made is False


DRAWBENCH = {"name": "drawbench", "count": 200, "source": "sayakpaul/drawbench", "revision": "ad" * 20}


def scored(folder, prompts):
    """The artifact with scores on these prompts, of two metrics with a value for each side and one without."""
    own = json.loads((folder / "surgery.json").read_text())["hash"]
    side = {"higher_is_better": True, "n": 1000, "base": 26.0, "patched": 26.5, "difference": 0.5}
    metrics = [
        {"name": "clip_score", "title": "CLIPScore", "interval": [0.25, 0.75], "checkpoint": "a/b@" + "c" * 40, **side},
        {"name": "ssim", "kind": "fidelity", "interval": [0.8, 0.9], **side, "base": None, "difference": None},
        {"name": "kid", "kind": "distance", "interval": [-1.0, 2.0], **side, "higher_is_better": False},
    ]
    scores = scores_of(own, prompts=prompts, metrics=metrics, images_per_prompt=5, date="2026-11-28T15:00:00+00:00")
    (folder / "scores.json").write_text(json.dumps(scores))


def test_scores_on_a_data_set_of_the_hub_go_where_the_hub_reads_them(hub, artifact):
    scored(artifact, [DRAWBENCH])
    surgery.push(artifact, REPO)
    assert "; 5 images each" in hub.read(REPO, "README.md").decode()
    told = yaml.safe_load(hub.read(REPO, ".eval_results/drawbench.yaml"))
    assert told[0] == {
        "dataset": {"id": "sayakpaul/drawbench", "task_id": "clip_score", "revision": "ad" * 20},
        "value": 26.5,
        "date": "2026-11-28",
        "source": {"url": f"https://huggingface.co/{REPO}/blob/main/scores.json", "name": "scores.json"},
        "notes": "CLIPScore, higher is better; 200 prompts, 1000 images of 5 a prompt; untouched base 26, difference "
        f"+0.5 (95% +0.25 to +0.75); a/b@{'c' * 40}",
    }
    assert [entry.task_id for entry in parse_eval_result_entries(told)] == ["clip_score", "kid"]
    assert ".eval_results/drawbench.yaml" in json.loads(hub.read(REPO, "surgery.json"))["files"]
    assert surgery.verify(REPO).verified and surgery.push(artifact, REPO).made is False
    scored(artifact, [{"name": "shapes", "count": 600}])
    surgery.push(artifact, REPO)
    assert ".eval_results/drawbench.yaml" not in hub.tree(REPO) and surgery.verify(REPO).verified


@pytest.mark.parametrize(
    "prompts",
    [
        [{**DRAWBENCH, "source": "https://github.com/djghosh13/geneval"}],
        [{**DRAWBENCH, "revision": None}],
        [{**DRAWBENCH, "source": "mine.txt"}],
        [DRAWBENCH, {**DRAWBENCH, "name": "other"}],
    ],
)
def test_scores_on_other_prompts_do_not(hub, artifact, prompts):
    scored(artifact, prompts)
    surgery.push(artifact, REPO)
    assert not [path for path in hub.tree(REPO) if path.startswith(".eval_results")]
