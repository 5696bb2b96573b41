"""Several rows in one run: what is alike is drawn once, whatever else differs, and each is compared as it is asked."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from surgery.errors import InputError, RecipeError
from surgery.validate.metrics.distances import Fid, frechet_distance
from surgery.validate.report.rows import write_rows_report
from surgery.validate.rows import Row, score_rows
from surgery.validate.sweeping import sweep
from surgery.validate.validating import validate

from ..conftest import SHAPES
from .test_validate import prompts  # noqa: F401 a fixture

STEP = ("sampling.steps=1",)


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"), np.float64)


@pytest.fixture(scope="module")
def scored(prompts, tmp_path_factory):  # noqa: F811
    """(RowsResult of six rows, what was announced)."""
    rows = [
        Row("CFG", "shapes", STEP, patched=False),
        Row("PLADIS", "shapes", STEP),
        Row("<b>GAG", "shapes", (*STEP, "operations.0.with={operator: gag, scale: 1.0, zeta: 1.0, eta: .inf}")),
        Row("twice", "shapes", (*STEP, "operations.0.with.scale=2.0")),
        Row("no CFG", "shapes", (*STEP, "sampling.guidance_scale=1.0"), patched=False),
        Row("no CFG, PLADIS", "shapes", (*STEP, "sampling.guidance_scale=1.0"), against="no CFG"),
    ]
    told = []
    out = tmp_path_factory.mktemp("rows")
    options = {"prompts": prompts, "metrics": ["shape_alignment", "ssim"], "against": "CFG"}
    return score_rows(rows, out=out, announce=lambda *figures: told.append(figures), **options), told


def test_what_is_alike_is_drawn_once(scored):
    result, told = scored
    assert [lacking for _, lacking, _ in told] == [24, 12]  # four rows with guidance, two without
    assert len(list(result.folder.glob("images/*/batch-*/*.png"))) == 36
    cfg, pladis = result.row("CFG"), result.row("PLADIS")
    assert len(set(cfg.images + pladis.images)) == 12 and cfg.n == len(result.jobs) == 6
    # GAG at zeta 1 without a bound is PLADIS at a scale larger by 1 (GAG, eq. 11 to 13).
    for one, other in zip(result.row("<b>GAG").images, result.row("twice").images, strict=True):
        assert np.abs(pixels(one) - pixels(other)).max() <= 1


def test_each_row_is_compared_with_the_row_that_is_named(scored):
    result, _ = scored
    assert [row.against for row in result.rows] == [None, "CFG", "CFG", "CFG", "CFG", "no CFG"]
    assert result.row("CFG").metric("ssim") is None and result.row("CFG").metric("shape_alignment").difference is None
    for row in result.rows:
        aligned = row.metric("shape_alignment")
        low, high = aligned.interval
        assert low <= aligned.value <= high
        if row.against:
            other = result.row(row.against).metric("shape_alignment")
            assert aligned.difference == pytest.approx(aligned.value - other.value)
            assert aligned.paired.base == pytest.approx(other.value) and row.metric("ssim").value < 1
    assert result.row("no CFG").facts["operations"] is None and result.row("no CFG").facts["evaluations"] == 1
    assert result.row("PLADIS").facts["sampling"]["guidance_scale"] == 4.0


def test_a_second_run_draws_nothing_and_one_row_more_draws_that_alone(scored, prompts, monkeypatch):  # noqa: F811
    result, _ = scored
    options = {"out": result.folder, "prompts": prompts, "metrics": ["shape_alignment", "ssim"]}
    told = []
    more = Row("new", "shapes", (*STEP, "operations.0.with.scale=-1.0"))
    again = score_rows([more, result.rows[0].row], **options, announce=lambda *figures: told.append(figures))
    assert told == [(6, 6, 16)] and again.row("new").against == "its base"
    monkeypatch.setattr("surgery.validate.jobs.worker_pool", None)
    same = score_rows([row.row for row in result.rows], **options, against="CFG")
    assert same.rows == result.rows


def test_the_result_is_plain_data(scored):
    result, _ = scored
    told = result.to_json()
    assert json.loads(json.dumps(told)) == told and told["schema_version"] == 1
    assert [row["name"] for row in told["rows"]] == [row.name for row in result.rows]
    assert (result.folder / told["rows"][1]["images"][0]).is_file() and told["jobs"][0]["prompt"] == "a red circle"
    assert told["rows"][1]["metrics"][0]["paired"]["verdict"] == result.rows[1].metrics[0].verdict


def test_the_report_shows_every_row_and_loads_nothing(scored):
    result, _ = scored
    page = write_rows_report(result, "rows", ["a line & more"])
    text = page.read_text()
    assert "&lt;b&gt;GAG" in text and "<b>GAG" not in text and "a line &amp; more" in text
    assert text.count("data:image/png;base64,") == 1 and "cannot tell with 6 prompts" in text
    width, height = Image.open(result.folder / "images-1.png").size
    assert width > 6 * 192 and height > 6 * 192


def test_rows_of_two_base_models(prompts, tmp_path):  # noqa: F811
    other = tmp_path / "other"
    shutil.copytree(SHAPES, other)
    config = json.loads((other / "scheduler" / "scheduler_config.json").read_text())
    config["prediction_type"] = "sample" if config.get("prediction_type") != "sample" else "epsilon"
    (other / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    rows = [
        Row("one", "shapes", STEP, patched=False),
        Row("other", "shapes", (*STEP, f"base.pipeline={other}"), patched=False),
    ]
    result = score_rows(rows, out=tmp_path / "out", prompts=prompts, metrics=["ssim", "psnr"], limit=2, against="one")
    assert result.row("other").metric("ssim").value < 0.99 and len(list((tmp_path / "out").glob("artifact-*"))) == 2


class Colours(Fid):
    """FID of the mean colours of images in place of Inception's features."""

    def __init__(self, files, device):
        pass

    def features(self, images):
        return np.array([np.asarray(image, np.float64).reshape(-1, 3).mean(0) for image in images])


@pytest.fixture
def colours(monkeypatch, tmp_path):
    """Takes the place of FID; the checkpoint to give."""
    monkeypatch.setattr("surgery.validate.metrics.distances.Fid", Colours)
    path = tmp_path / "weights"
    path.write_bytes(b"")
    return {"fid.inception": path}


@pytest.fixture
def reference(tmp_path):
    """A folder of four grey images."""
    folder = tmp_path / "reference"
    folder.mkdir()
    for at in range(4):
        Image.new("RGB", (64, 64), (90 + 10 * at, 100, 110)).save(folder / f"{at}.png")
    return folder


def test_empty_prompts_are_scored_by_distances_alone(colours, reference, tmp_path):
    rows = [
        Row("base", "shapes", (*STEP, f"validate.reference={reference}"), patched=False),
        Row("far", "shapes", (*STEP, "operations.0.with.scale=40.0")),
    ]
    options = {"out": tmp_path / "out", "prompts": "empty", "limit": 8, "checkpoints": colours}
    result = score_rows(rows, metrics=["fid"], **options)
    known = Colours({}, "cpu").features([Image.open(path) for path in sorted(reference.iterdir())])
    for row in result.rows:
        features = Colours({}, "cpu").features([Image.open(path).convert("RGB") for path in row.images])
        fid = row.metric("fid")
        assert fid.value == pytest.approx(frechet_distance(features, known)) and fid.interval[0] < fid.value
    far = result.row("far").metric("fid").paired
    assert (far.n, far.groups) == (8, 8)  # each image of no text is an observation of its own
    assert far.difference == pytest.approx(far.patched - far.base)
    with pytest.raises(InputError, match="clip_score judges how well an image fits its prompt, and these prompts are"):
        score_rows(rows, metrics=["clip_score"], **options)
    with pytest.raises(InputError, match="fid compares with real images"):
        score_rows(rows[1:], metrics=["fid"], **options)


def test_empty_prompts_of_an_artifact(artifact, tmp_path):
    done = validate(artifact, prompts="empty", limit=6, metrics=["ssim"], out=tmp_path)
    assert done.scores.metrics[0].groups == 6 and done.scores.prompts[0].name == "empty"
    with pytest.raises(InputError, match="shape_alignment judges how well"):
        validate(artifact, prompts="empty", limit=6, metrics=["shape_alignment"], out=tmp_path)
    with pytest.raises(InputError, match="fid compares with real images"):
        validate(artifact, prompts="empty", limit=6, out=tmp_path)


def test_the_best_of_a_sweep_is_better_than_the_base(colours, tmp_path):
    overrides = ["sampling.steps=1"]
    # The reference: what scale 40 draws itself, from other noise.
    row = Row("reference", "shapes", (*overrides, "operations.0.with.scale=40.0"))
    drawn = score_rows([row], out=tmp_path / "first", prompts="empty", limit=12, seed=1, metrics=["ssim"])
    folder = tmp_path / "images"
    folder.mkdir()
    for number, path in enumerate(drawn.rows[0].images):
        (folder / f"{number}.png").write_bytes(path.read_bytes())
    given = {"prompts": "empty", "limit": 12, "metrics": ["fid", "ssim"], "reference": folder}
    options = {"overrides": overrides, "given": given, "out": tmp_path / "out", "checkpoints": colours}
    done = sweep("shapes", {"scale": [0.0, 40.0]}, **options)
    still, moved = (cell.metric("fid") for cell in done.cells)
    assert still.verdict == "no difference" and moved.verdict == "better"
    assert done.best is done.cells[1] and done.to_json()["best"] == {"scale": 40.0}
    assert "The best FID is that of scale 40" in (tmp_path / "out" / "report.html").read_text()
    none = sweep("shapes", {"scale": [0.0]}, **options)
    assert (
        none.best is None
        and "Nothing here is better than the base on FID" in (tmp_path / "out" / "report.html").read_text()
    )


@pytest.mark.parametrize(
    ("rows", "options", "error", "match"),
    [
        ([], {}, InputError, "there are no rows to score"),
        ([Row("a", "shapes"), Row("a", "shapes")], {}, InputError, "two rows are named 'a'"),
        ([Row("a", "shapes")], {"against": "b"}, InputError, "no row is named 'b'; there are a"),
        ([Row("a", "shapes", against="b")], {}, InputError, "no row is named 'b'"),
        ([Row("a", "shapes", ("sampling.stepps=2",))], {}, RecipeError, "sampling.stepps"),
        ([Row("a", "shapes")], {"metrics": ["ssin"]}, InputError, "there is no metric 'ssin'"),
        ([Row("a", "shapes", ("validate.reference=/nowhere",))], {"metrics": ["fid"]}, InputError, "no reference set"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_drawn(rows, options, error, match, prompts, tmp_path):  # noqa: F811
    with pytest.raises(error, match=match):
        score_rows(rows, out=tmp_path / "out", **{"prompts": prompts, **options})
    assert not (tmp_path / "out").exists()
