"""`surgery validate` on the tiny trained pipeline: what it writes, that it goes on, and what it refuses."""

import csv
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from surgery.artifact import read_manifest
from surgery.artifact.scores import read_scores
from surgery.errors import InputError
from surgery.validate.session import Drawing
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
    assert scores.sampling["steps"] == 2 and "torch" in scores.versions and scores.drawing["batch"] == "16"
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
    monkeypatch.setattr("surgery.validate.jobs.worker_pool", None)
    monkeypatch.setattr("surgery.validate.frames.read_drawn", None)
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
    assert f"report: {folder}-validation/report-{scored[1].scores.artifact_hash[:12]}-" in done.stdout


def test_prompts_of_one_text_are_one_in_the_verdict_and_beside_n_wherever_that_stands(scored, capsys):
    """8 pairs over 7 texts, as where a set has one twice: "n 8" and "with 7 prompts" would contradict each other."""
    from surgery.artifact.scores import Metric
    from surgery.cli.score import show_scores
    from surgery.export.publish.card import regression_text, score_lines
    from surgery.validate.report.page import validation_page

    figures = {"base": 0.5, "patched": 0.4, "difference": -0.1, "interval": [-0.3, 0.1], "decided": 3}
    part = {"name": "odd", "n": 3, "groups": 2, "base": 0.5, "patched": 0.4, "difference": -0.1, "interval": [-1, 1]}
    twice = Metric(name="twice", higher_is_better=True, n=8, groups=7, **figures, categories=[part])
    once = twice.model_copy(update={"name": "once", "groups": 8, "categories": []})
    assert (twice.verdict, twice.counted) == ("cannot tell with 7 prompts", "8 (7 prompts)")
    assert (once.verdict, once.counted) == ("cannot tell with 8 prompts", "8")
    done = replace(scored[1], scores=scored[1].scores.model_copy(update={"metrics": [twice, once]}))
    show_scores(done)
    table = capsys.readouterr().out
    manifest = read_manifest(scored[0])
    card, page = "\n".join(score_lines(manifest, done.scores)), validation_page(manifest, done.scores, {}, None)
    for text, beside in ((table, r"\s+"), (card, r" \| "), (page, r"</td>.*\n.*>")):
        assert re.search(rf"8 \(7 prompts\){beside}cannot tell with 7 prompts", text), text
        assert re.search(rf"\b8{beside}cannot tell with 8 prompts", text), text
    assert "3 (2 prompts)" in page and "n 8 (7 prompts))" in regression_text([twice])


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
        ({"limit": 1}, "one image of one prompt says nothing"),
        ({"prompts": "~nobody-here/x.txt"}, "is no file of prompts|there is no"),
        ({"prompts": "x" * 300 + ".txt"}, "is no file of prompts|too long"),
        ({"out": "file"}, "cannot be written to"),
        ({"out": "file/below"}, "cannot be written to"),
        ({"drawing": Drawing}, "--threads must be from 1 to 4096"),
    ],
)
def test_bad_input_is_told_before_anything_is_drawn(artifact, prompts, tmp_path, monkeypatch, options, match):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=match):
        if "drawing" in options:
            options = {"drawing": Drawing(threads=10**11)}
        validate(artifact, **{"out": tmp_path / "work", "prompts": prompts, "metrics": ["ssim"], **options})
    assert not (tmp_path / "work" / "images").exists()


def test_a_study_is_made_of_the_report_that_the_scores_are_of(scored, prompts, run):
    folder, done = scored
    page = folder.parent / "blind.html"
    made = json.loads(run("study", folder, "--pairs", "4", "--out", page, "--json", check=0).stdout)
    assert made["items"] == 4 and list(made["models"].values()) == [done.scores.artifact_hash] and page.is_file()
    assert "exists, and votes on an earlier page" in run("study", folder, "--out", page, check=2).stderr
    assert "run `surgery validate` first" in run("study", folder.parent, check=2).stderr


def test_what_is_no_artifact_has_no_other_side(run):
    from ..conftest import SHAPES as SHAPES_FOLDER

    done = run("validate", SHAPES_FOLDER, "--prompts", "shapes", check=2)
    assert "is no artifact, so there is no other side to it" in done.stderr


def test_a_work_folder_in_the_artifact_is_refused(artifact, prompts):
    for out in (artifact, artifact / "validation"):
        with pytest.raises(InputError, match="lies in the artifact"):
            validate(artifact, prompts=prompts, metrics=["ssim"], out=out)


def test_a_smaller_run_does_not_take_the_place_of_what_was_measured(scored, prompts, run):
    folder, _ = scored
    before = (folder / "scores.json").read_text()
    for options in ({"limit": 2, "metrics": ["shape_alignment"]}, {"metrics": ["psnr"]}):
        again = validate(folder, prompts=prompts, **options)
        assert again.kept == "Shape alignment on 6 pairs" and again.scores_file.parent == again.report.parent
        assert (folder / "scores.json").read_text() == before
    told = run("validate", folder, "--prompts", prompts, "--metrics", "psnr", check=0).stdout
    assert "left as it is, because it measured Shape alignment on 6 pairs" in told
    assert scored[1].report.is_file() and again.report != scored[1].report
    (folder / "scores.json").unlink()
    assert validate(folder, prompts=prompts, metrics=["psnr"]).scores_file == folder / "scores.json"
    (folder / "scores.json").write_text(before)


def test_names_that_are_markup_or_formulas_are_shown_as_they_are(artifact, tmp_path):
    from surgery.artifact import read_manifest
    from surgery.export.publish.card import model_card
    from surgery.recipe.schema import Publish

    names = ["<!-- hidden", "[click](http://there) <img src=x>", "$\\frac$"]
    lines = [{**line, "category": names[at % 3], "relation": None} for at, line in enumerate(SHAPES)]
    path = tmp_path / "odd.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    folder = tmp_path / "artifact"
    shutil.copytree(artifact, folder)
    done = validate(folder, prompts=path, metrics=["shape_alignment"])
    assert "<img src=x>" not in done.report.read_text() and "&lt;img src=x&gt;" in done.report.read_text()
    card = model_card(read_manifest(folder), Publish(), "", scores=done.scores)
    assert "<!--" not in card and "<img" not in card and "[click](" not in card and "\\[click\\]" in card


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
    from surgery.runtime import draw as generating

    real = generating.draw

    def blackened(pipeline, jobs, sampling=None, *rest):
        images = real(pipeline, jobs, sampling, *rest)
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
    again = run("apply", recipe, "--out", tmp_path / "out", check=0)  # as after a kill while it was scoring
    assert "holds the artifact of this recipe already" in again.stdout and "Shape alignment" in again.stdout
    assert "give it as --prompts" in run("validate", tmp_path / "out", check=2).stderr
    recipe.write_text((text % SHAPES_FOLDER).replace("six.jsonl", "gone.jsonl"))
    assert "gone.jsonl" in run("apply", recipe, "--out", tmp_path / "gone", check=2).stderr
    assert not (tmp_path / "gone").exists()
    recipe.write_text((text % SHAPES_FOLDER).replace("./six.jsonl", str(prompts)))
    assert "must be written from the recipe's folder on" in run("apply", recipe, check=2).stderr
    recipe.write_text(text % SHAPES_FOLDER)
    plain = run("apply", recipe, "--out", tmp_path / "plain", "--no-validate", check=0)
    assert not (tmp_path / "plain" / "scores.json").exists() and "not carried out" not in plain.stdout
    recipe.write_text((text % SHAPES_FOLDER).replace("shape_alignment]", "shape_alignment], purpose: [ssim]"))
    assert "purpose names ssim, which is not among the metrics" in run("apply", recipe, check=2).stderr
