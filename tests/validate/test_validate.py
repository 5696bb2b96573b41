"""`surgery validate` on the tiny trained pipeline: what it writes, that it goes on, and what it refuses."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from surgery.artifact.scores import read_scores
from surgery.errors import InputError
from surgery.validate.validating import validate

SHAPES = [
    {"prompt": "a red circle", "category": "colours", "objects": [["red", "circle"]]},
    {"prompt": "a blue square", "category": "colours", "objects": [["blue", "square"]]},
    {"prompt": "a star", "category": "single", "objects": [[None, "star"]]},
    {"prompt": "a cross", "category": "single", "objects": [[None, "cross"]]},
    {"prompt": "a circle", "category": "single", "objects": [[None, "circle"]]},
    {"prompt": "a green star", "category": "colours", "objects": [["green", "star"]]},
]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """A file of six shapes prompts."""
    path = tmp_path_factory.mktemp("prompts") / "six.jsonl"
    path.write_text("\n".join(json.dumps({**line, "relation": None}) for line in SHAPES))
    return path


@pytest.fixture(scope="module")
def scored(artifact, prompts, tmp_path_factory):
    """A Validation of a copy of the artifact."""
    folder = tmp_path_factory.mktemp("scored") / "shapes"
    shutil.copytree(artifact, folder)
    return folder, validate(folder, prompts=prompts, metrics=["shape_alignment", "ssim", "psnr"])


def test_the_scores_say_what_was_measured_on_what(scored, manifest):
    folder, done = scored
    scores = read_scores(folder, manifest.hash)
    assert scores == done.scores and done.scores_file == folder / "scores.json"
    (prompts,) = scores.prompts
    assert (prompts.name, prompts.count, prompts.source) == ("six", 6, "six.jsonl") and len(prompts.sha256) == 64
    assert scores.sampling["steps"] == 2 and "torch" in scores.versions and scores.drawing["batch"] == 16
    assert scores.purpose == ["shape_alignment"] and scores.excluded == 0
    aligned, ssim, psnr = scores.metrics
    assert aligned.n == 6 and [part.name for part in aligned.categories] == ["colours", "single"]
    assert ssim.base is None and 0 < ssim.patched < 1 and 5 < psnr.patched < 60


def test_the_table_of_pairs_holds_what_the_scores_sum_up(scored):
    _, done = scored
    with open(done.report.parent / "pairs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["prompt"] for row in rows] == [line["prompt"] for line in SHAPES]
    aligned, ssim, _ = done.scores.metrics
    assert np.mean([float(row["shape_alignment patched"]) for row in rows]) == pytest.approx(aligned.patched)
    assert np.mean([float(row["ssim"]) for row in rows]) == pytest.approx(ssim.patched, rel=1e-6)
    for row in rows:
        base, patched = (np.asarray(Image.open(done.report.parent / row[side])) for side in ("base", "patched"))
        assert base.shape == patched.shape == (64, 64, 3) and (base != patched).any()
        assert json.loads(Image.open(done.report.parent / row["base"]).info["surgery"])["seed"] == int(row["seed"])


def test_the_report_is_one_file_that_loads_nothing(scored):
    _, done = scored
    text = done.report.read_text()
    assert "Shape alignment" in text and "95% interval" in text and done.scores.artifact_hash in text
    assert not re.search(r"(src|href)=[\"'](?!data:)", text) and "<script" not in text
    assert text.count("data:image/png;base64,") == len(list(done.report.parent.glob("*.png")))


def test_a_second_run_draws_and_scores_nothing_and_says_the_same(scored, prompts, monkeypatch):
    folder, done = scored
    monkeypatch.setattr("surgery.validate.drawing.run.crew", None)
    monkeypatch.setattr("surgery.validate.scoring.read_image", None)
    again = validate(folder, prompts=prompts, metrics=["shape_alignment", "ssim", "psnr"])
    assert again.scores.metrics == done.scores.metrics


def test_an_artifact_of_the_same_base_shares_its_images(scored, prompts, tmp_path):
    import surgery

    overrides = ["sampling.steps=2", "operations.0.with={operator: gag}"]
    gag = surgery.apply("shapes", tmp_path / "gag", overrides=overrides).folder
    told = []
    options = {"prompts": prompts, "out": scored[1].folder, "metrics": ["ssim"]}
    validate(gag, **options, announce=lambda *figures: told.append(figures))
    assert [lacking for _, lacking, _ in told] == [6]


def test_the_command_prints_the_table_and_the_files(scored, prompts, run):
    folder, _ = scored
    done = run("validate", folder, "--prompts", prompts, "--metrics", "shape_alignment", "ssim", check=0)
    assert "Shape alignment" in done.stdout and f"scores: {folder}/scores.json" in done.stdout
    assert f"report: {folder}-validation/report-{scored[1].scores.artifact_hash[:12]}/report.html" in done.stdout


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"metrics": ["shape_aligment"]}, "there is no metric 'shape_aligment'; did you mean shape_alignment"),
        ({"prompts": "drawbunch"}, "there is no prompt set 'drawbunch'; did you mean drawbench"),
        ({"prompts": "empty.txt"}, r"empty\.txt.* (no prompt|empty)"),
        ({"prompts": "gone.txt"}, r"gone\.txt"),
        ({"prompts": None}, "the recipe names no prompts under `validate`"),
        ({"limit": 0}, "--limit must be at least 1"),
        ({"images_per_prompt": 0}, "--images-per-prompt must be at least 1"),
        ({"prompts": ["a poem"], "metrics": ["shape_alignment"]}, "(?i)shape"),
    ],
)
def test_bad_input_is_told_before_anything_is_drawn(artifact, prompts, tmp_path, monkeypatch, options, match):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(InputError, match=match):
        validate(artifact, out=tmp_path / "work", **{"prompts": prompts, "metrics": ["ssim"], **options})
    assert not (tmp_path / "work" / "images").exists()


def test_what_is_no_artifact_has_no_other_side(run):
    from ..conftest import SHAPES as SHAPES_FOLDER

    done = run("validate", SHAPES_FOLDER, "--prompts", "shapes", check=2)
    assert "is no artifact, so there is no other side to it" in done.stderr


def test_an_altered_artifact_is_not_scored(artifact, prompts, tmp_path):
    from surgery.errors import ArtifactError

    folder = tmp_path / "altered"
    shutil.copytree(artifact, folder)
    weights = next(folder.glob("unet/diffusion*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.unlink()
    weights.write_bytes(data)
    with pytest.raises(ArtifactError, match="is not the file that was written"):
        validate(folder, prompts=prompts, metrics=["ssim"])


def test_images_of_another_size_are_told(scored, prompts, tmp_path):
    folder, done = scored
    work = tmp_path / "work"
    shutil.copytree(done.folder, work)
    shutil.rmtree(work / "values")
    for path in work.glob("images/patched-*/batch-*/*.png"):
        Image.open(path).resize((32, 32)).save(path)
    with pytest.raises(InputError, match="(?i)size|64"):
        validate(folder, prompts=prompts, metrics=["ssim"], out=work)


def test_blackened_images_are_left_out_and_counted(artifact, prompts, tmp_path, monkeypatch):
    from surgery import generating

    real = generating.draw

    def blackened(pipeline, jobs, sampling=None, on_step=None):
        images = real(pipeline, jobs, sampling, on_step)
        for image, (prompt, _) in zip(images, jobs, strict=True):
            if prompt == "a red circle":
                image.info["flagged"] = True
        return images

    monkeypatch.setattr(generating, "draw", blackened)
    folder = tmp_path / "artifact"
    shutil.copytree(artifact, folder)
    done = validate(folder, prompts=prompts, metrics=["ssim"])
    assert done.scores.excluded == 1 and done.scores.metrics[0].n == 5


def test_apply_carries_out_the_validate_section_unless_told_not_to(prompts, run, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    text = (
        "schema: 1\nname: x\nbase: {pipeline: %s}\n"
        "operations: [{replace: cross-attention, with: {operator: pladis}}]\n"
        "sampling: {steps: 2, guidance_scale: 4.0, height: 64, width: 64}\n"
        "validate: {prompts: ./six.jsonl, limit: 4, metrics: [shape_alignment]}\n"
    )
    from ..conftest import SHAPES as SHAPES_FOLDER

    recipe.write_text(text % SHAPES_FOLDER)
    shutil.copy(prompts, tmp_path / "six.jsonl")
    done = json.loads(run("apply", recipe, "--out", tmp_path / "out", "--json", check=0).stdout)
    assert done["scores"]["metrics"][0]["n"] == 4 and (tmp_path / "out" / "scores.json").is_file()
    plain = run("apply", recipe, "--out", tmp_path / "plain", "--no-validate", check=0)
    assert not (tmp_path / "plain" / "scores.json").exists() and "not carried out" not in plain.stdout
    recipe.write_text((text % SHAPES_FOLDER).replace("shape_alignment]", "shape_alignment], purpose: [ssim]"))
    assert "purpose names ssim, which is not among the metrics" in run("apply", recipe, check=2).stderr
