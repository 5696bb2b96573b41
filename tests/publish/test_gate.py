"""The gate: what scores significantly worse than its base is not published unasked, and its card says so at once."""

import json

import pytest

import surgery
from surgery.errors import PublishError

from .test_refusals import scores_of

REPO = "me/tiny-pladis"
VALIDATE = "validate: {{prompts: [a cat], metrics: [{metrics}], purpose: [{purpose}]}}\n"


def metric(name, interval, **more):
    low, high = interval
    middle = (low + high) / 2
    values = {"name": name, "higher_is_better": True, "n": 100, "base": 1.0, "patched": 1.0 + middle}
    return {**values, "difference": middle, "interval": [low, high], **more}


@pytest.fixture
def scored(hub, write_recipe, tmp_path):
    """scored(purpose, *metrics): an artifact whose recipe names that purpose, with these metrics in its scores.json."""

    def make(purpose, *metrics):
        more = VALIDATE.format(metrics="clip_score, fid, ssim, image_reward", purpose=purpose)
        folder = surgery.apply(write_recipe(more=more), tmp_path / "scored", force=True).folder
        own = json.loads((folder / "surgery.json").read_text())["hash"]
        (folder / "scores.json").write_text(json.dumps(scores_of(own, metrics=list(metrics))))
        return folder

    return make


def test_a_significant_loss_on_the_purpose_is_refused_and_nothing_is_sent(hub, scored):
    folder = scored("clip_score", metric("clip_score", (-0.3, -0.1), title="CLIPScore"))
    with pytest.raises(PublishError, match=r"significantly worse than its untouched base on CLIPScore \(1 to 0.8,"):
        surgery.push(folder, REPO)
    with pytest.raises(PublishError, match="--allow-regression"):
        surgery.push(folder, REPO, dry_run=True)
    assert REPO not in hub.repositories


def test_with_allow_regression_it_is_published_and_the_card_begins_with_it(hub, scored):
    folder = scored("clip_score", metric("clip_score", (-0.3, -0.1), title="CLIPScore"))
    surgery.push(folder, REPO, allow_regression=True)
    text = hub.read(REPO, "README.md").decode().split("---\n", 2)[2]
    assert text.lstrip().startswith("# tiny-pladis\n\n> [!WARNING]\n> **This patch makes the model significantly worse")
    assert "CLIPScore (1 to 0.8, 95% interval of the difference -0.3 to -0.1, n 100)" in text.splitlines()[4]


@pytest.mark.parametrize(
    ("purpose", "found"),
    [
        ("clip_score", metric("clip_score", (-0.3, 0.01))),  # the interval holds zero
        ("clip_score", metric("clip_score", (0.1, 0.3))),
        ("", metric("fid", (-3.0, -1.0), higher_is_better=False, kind="distance")),  # lower is better
        ("clip_score", metric("clip_score", (-0.3, -0.1), groups=5)),  # too few prompts to say so
        ("", metric("ssim", (0.2, 0.3), kind="fidelity", base=None, difference=None)),
    ],
)
def test_what_is_no_significant_loss_on_the_purpose_goes_through(hub, scored, purpose, found):
    surgery.push(scored(purpose, found), REPO)
    assert "[!WARNING]" not in hub.read(REPO, "README.md").decode()


def test_a_loss_on_what_it_is_not_for_goes_through_once_its_purpose_was_measured(hub, scored):
    worse = metric("clip_score", (-0.3, -0.1))
    with pytest.raises(PublishError, match="significantly worse"):  # nothing of the purpose: then all count
        surgery.push(scored("image_reward", worse), REPO)
    surgery.push(scored("image_reward", worse, metric("image_reward", (-0.1, 0.2))), REPO)
    assert "**Worse than the base on clip_score.**" in hub.read(REPO, "README.md").decode()


@pytest.mark.parametrize(
    "found",
    [
        metric("fid", (1.0, 3.0), higher_is_better=False, kind="distance"),
        metric("image_reward", (-0.3, -0.1)),
    ],
)
def test_without_a_purpose_every_metric_counts(hub, scored, found):
    with pytest.raises(PublishError, match="significantly worse"):
        surgery.push(scored("", found), REPO)


def test_a_purpose_that_was_not_measured_is_named(hub, scored):
    surgery.push(scored("clip_score", metric("image_reward", (0.1, 0.3))), REPO)
    assert "**Not measured: clip_score**, which the recipe names" in hub.read(REPO, "README.md").decode()


def test_the_command_refuses_and_obeys(hub, scored, run):
    folder = scored("clip_score", metric("clip_score", (-0.3, -0.1)))
    done = run("push", folder, "--repo", REPO, check=1)
    assert "Nothing was published" in done.stderr and REPO not in hub.repositories
    run("push", folder, "--repo", REPO, "--allow-regression", check=0)
    assert REPO in hub.repositories


def test_a_fidelity_metric_stands_on_the_card_without_a_base(hub, scored):
    found = metric("ssim", (0.8, 0.9), kind="fidelity", base=None, difference=None, title="SSIM", patched=0.85)
    folder = scored("clip_score", metric("clip_score", (0.1, 0.3), title="CLIPScore"), found)
    surgery.push(folder, REPO)
    card = hub.read(REPO, "README.md").decode()
    assert "of the same seed, mean and 95% interval: SSIM 0.85 (0.8 to 0.9)." in card
    assert "SSIM (to the base's images, n 100)" in card
