"""The manifests: every table is there, its rows are recipes that hold, its figures are the papers'."""

import json
from pathlib import Path

import pytest

from surgery.errors import InputError
from surgery.papers.costs import cost_of, fetched_for, sides_of
from surgery.papers.entries import entries_of, sets_of
from surgery.papers.manifest import models, rates, read_table, table_names
from surgery.recipe.reading import shipped_recipes

ROOT = Path(__file__).parent.parent.parent
PLADIS = [*(f"table-{n}" for n in (2, 3, 4, 5, 6, 7, 8)), "table-5-time", *(f"figure-{n}" for n in range(3, 20))]
GAG = [*(f"table-{n}" for n in ("1-left", "1-right", "2-left", "2-right", 3, 4, 5, 6, 7)), "figure-3", "figure-4"]
GAG += [*(f"figure-5{part}" for part in "abc"), *(f"figure-{n}" for n in range(7, 18))]
OSEG = [*(f"table-{n}" for n in (1, 2, 3, 4)), "sigma"]
NAMES = [*(f"pladis-{n}" for n in PLADIS), *(f"gag-{n}" for n in GAG), *(f"oseg-{n}" for n in OSEG)]


def test_every_table_and_figure_has_a_manifest_and_the_list_is_in_the_papers_order():
    assert sorted(table_names()) == sorted(NAMES)
    names = table_names()
    assert names.index("pladis-figure-9") < names.index("pladis-figure-10") < names.index("gag-table-3")


def test_a_table_that_does_not_exist_is_refused_with_the_nearest():
    with pytest.raises(InputError, match=r'no table or figure .*; did you mean "pladis-table-2"\?'):
        read_table("pladis-tabel-2")
    for name in ("models", "../x", ""):
        with pytest.raises(InputError, match="no table or figure"):
            read_table(name)


@pytest.mark.parametrize("name", NAMES)
def test_every_row_is_a_recipe_that_holds_on_its_own_model_and_on_the_shapes_model(name):
    table = read_table(name)
    spelt_out = sum(len(values) for row in table.rows for values in row.over.values() or [[0]])
    for on in (None, "shapes"):
        if table.cannot and on is None:
            with pytest.raises(InputError, match="cannot be drawn: .*--on shapes"):
                entries_of(table)
            continue
        entries = entries_of(table, on)
        assert len({entry.name for entry in entries}) == len(entries) == spelt_out
        for entry in entries:
            recipe = entry.recipe_file.recipe  # RecipeError where an override does not fit
            assert entry.recipe in shipped_recipes() and (on is None or recipe.base.pipeline == "./shapes")
            if entry.patched:
                assert recipe.operations[0].settings.operator == entry.operator
        assert cost_of(table, on, limit=2).images > 0


def test_models_that_no_table_has_are_gone():
    used = {row.model for name in NAMES for row in read_table(name).rows}
    assert used == set(models())


def test_w_of_the_papers_is_one_less_than_guidance_scale():
    """PLADIS, appendix C: w from (3, 5); GAG, appendix G: w = 5, and APG's scale by its own paper's formula, 12."""
    found = {entry.model: entry.recipe_file.recipe.sampling for n in NAMES for entry in _entries(n)}
    drawn = found["sdxl-25"].guidance_scale
    assert list(drawn.uniform) == [3 + 1, 5 + 1] and found["sdxl-25"].steps == 25
    assert found["sdxl-50"].guidance_scale == 5 + 1 and found["sdxl-50"].steps == 50
    assert found["sdxl-50-apg"].guidance_scale == 12
    assert {name: found[name].steps for name in ("turbo-4", "turbo-1", "flux1-dev", "hyper-8")} == {
        "turbo-4": 4,
        "turbo-1": 1,
        "flux1-dev": 28,
        "hyper-8": 8,
    }


def test_models_at_one_step_take_their_own_files():
    bases = {entry.model: entry.recipe_file.recipe.base for entry in _entries("pladis-table-6")}
    assert bases["lightning-1"].components.unet.file == "sdxl_lightning_1step_unet_x0.safetensors"
    assert bases["lightning-1"].scheduler.overrides()["prediction_type"] == "sample"
    assert bases["dmd2-1"].components.unet.file == "dmd2_sdxl_1step_unet_fp16.bin"
    assert bases["hyper-1"].components.unet.file == "Hyper-SDXL-1step-Unet.safetensors" and not bases["hyper-1"].loras


# (table, row, compared row, prompts, column, the difference that the paper prints beside its figure)
PRINTED = [
    ("pladis-table-2", "no CFG + PLADIS", "no CFG", "coco", "fid", -3.96),
    ("pladis-table-2", "CFG + SEG + PLADIS", "CFG + SEG", "coco", "clip_score", 1.10),
    ("pladis-table-3", "PAG + PLADIS", "PAG", "hpd", "hps_v2.1", 0.48),
    ("pladis-table-3", "SEG + PLADIS", "SEG", "pick-a-pic", "hps_v2.1", 0.77),
    ("pladis-table-4", "SDXL-Lightning + PLADIS", "SDXL-Lightning", "drawbench", "clip_score", 0.84),
    ("pladis-table-4", "Hyper-SDXL + PLADIS", "Hyper-SDXL", "pick-a-pic", "pick_score", 0.08),
    ("pladis-table-5", "PLADIS, alpha 2", "alpha 1", "coco", "fid", -6.88),
    ("pladis-table-5-time", "PLADIS, alpha 1.5", "alpha 1", "time", "seconds", 0.56),
    ("pladis-table-6", "SDXL-Lightning + PLADIS", "SDXL-Lightning", "hpd", "clip_score", 1.05),
    ("pladis-table-7", "SANA 1.6B + PLADIS", "SANA 1.6B", "coco", "image_reward", 0.016),
    ("pladis-table-8", "Up, Down", "Baseline", "coco", "fid", -5.30),
]


@pytest.mark.parametrize(("name", "row", "other", "prompts", "column", "printed"), PRINTED)
def test_differences_are_those_that_the_papers_print(name, row, other, prompts, column, printed):
    reported = {entry.name: entry.reported for entry in _entries(name)}
    difference = reported[row][prompts][column] - reported[other][prompts][column]
    assert difference == pytest.approx(printed, abs=0.01)  # printed to two digits, some cut short


def test_gpu_hours_are_of_the_step_that_was_measured():
    """GAG, Table 6: 10,000 captions by one untouched side and two of GAG, 50 steps with CFG, a batch of two a step."""
    rows = {row["what"]: row for row in _measured() if row["how"] == "eager"}
    milliseconds = rows["unpatched"]["ms"] + 2 * rows["GAG"]["ms"]
    cost = cost_of(read_table("gag-table-6"))
    assert cost.images == 30_000 and cost.unmeasured == 0
    assert cost.hours == pytest.approx(10_000 * 50 * milliseconds / 1000 / 3600, rel=1e-9)
    assert cost_of(read_table("gag-table-6"), limit=10).images == 30
    assert cost_of(read_table("gag-table-3")).hours_text == "not measured"
    mixed = cost_of(read_table("pladis-table-4"))
    assert mixed.images == 8 * 5 * (200 + 400 + 500) and mixed.unmeasured == mixed.images // 4  # SDXL-Turbo's
    assert mixed.hours_text.endswith("11,000 images not measured")


def test_rates_are_those_of_the_gpu_report():
    (rate,) = rates()["steps"]
    rows = {row["what"]: row["ms"] for row in _measured() if row["how"] == "eager"}
    assert rate["ms"] == {"none": rows["unpatched"], "pladis": rows["PLADIS alpha 1.5"], "gag": rows["GAG"]}
    assert rates()["device"] == _section()["machine"]["device"]


def test_what_is_alike_is_counted_and_fetched_once():
    table = read_table("gag-table-1-left")
    assert len(sides_of(entries_of(table), None)) == 9  # the three bases are rows themselves
    fetched = fetched_for(entries_of(table), sets_of(table))
    names = [part.repo.rpartition("/")[2] for part in fetched]
    assert names[0] == "stable-diffusion-xl-base-1.0" and names[-2:] == ["erasing", "geneval"]
    assert {"clip-vit-large-patch14", "PickScore_v1", "HPSv2"} <= set(names) and names.count(names[0]) == 1
    dmd2 = fetched_for(_entries("gag-figure-11"), {})
    assert [(part.repo, part.what) for part in dmd2][1:] == [("tianweiy/DMD2", "dmd2_sdxl_4step_unet_fp16.bin")]


def _entries(name):
    table = read_table(name)
    return () if table.cannot else entries_of(table)


def _measured():
    return _section()["rows"]


def _section():
    return json.loads((ROOT / "docs/gpu.json").read_text())["sections"]["unet"]
