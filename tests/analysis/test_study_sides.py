"""Studies of three sides and of several models: where the images come from, and what pooled votes say."""

import csv
import json
import random

import numpy
import pytest
from scipy.stats import beta

from surgery.analysis.study import Vote, analyse, choose_exhibits, read_key, read_sources, render, write_study
from surgery.errors import InputError

from .study_files import HASH, Elements, build, draw, draw_exhibits

SIDES = ("base", "PLADIS", "GAG")


def write_rows(folder, rows, prompts=3):
    """A run of rows as `surgery sweep` leaves it. rows: [(name, operator or None, against)]."""
    folder.mkdir(parents=True)
    jobs = [{"prompt": f"prompt {number}", "category": "", "seed": number} for number in range(prompts)]
    made = []
    for place, (name, operator, against) in enumerate(rows):
        files = [draw(folder / f"{place}-{number}.png", 10 * place + number).name for number in range(prompts)]
        operations = operator and [{"operator": operator}]
        made.append({"name": name, "against": against, "images": files, "facts": {"operations": operations}})
    (folder / "rows.json").write_text(json.dumps({"schema_version": 1, "jobs": jobs, "rows": made}))
    return folder


def write_validation(folder, patched_from, prompts=3, base_from=0):
    """A finished validation, whose base images are drawn from the seeds from `base_from` on."""
    report = folder / "report-abc"
    report.mkdir(parents=True)
    with (report / "pairs.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["prompt", "seed", "base", "patched"])
        table.writeheader()
        for number in range(prompts):
            row = {"prompt": f"prompt {number}", "seed": number}
            for side, first in (("base", base_from), ("patched", patched_from)):
                row[side] = draw(report / f"{side}{number}.png", first + number).name
            table.writerow(row)
    (report / "scores.json").write_text(json.dumps({"artifact_hash": HASH}))
    return folder


def test_the_rows_of_a_run_are_the_sides_and_all_stand_in_one_item(tmp_path):
    rows = [("base", None, None), ("PLADIS", "pladis", "base"), ("GAG", "gag", "base")]
    folder = write_rows(tmp_path / "run", rows)
    (source,) = read_sources([folder])
    assert source.sides == list(SIDES) and source.model == "run"
    exhibits = choose_exhibits([source], 2)
    assert len(exhibits) == 2 and all(list(each.images) == list(SIDES) for each in exhibits)
    assert exhibits[0].images["GAG"] == folder / f"2-{exhibits[0].seed}.png"
    pairs = choose_exhibits(read_sources([folder]), 3, pairwise=True)
    assert sorted(tuple(each.images) for each in pairs) == sorted([SIDES[:2], SIDES[::2], SIDES[1:]])
    (two,) = read_sources([folder], ["GAG", "base"])
    assert choose_exhibits([two], 1)[0].images.keys() == {"GAG", "base"}


def test_a_run_of_several_models_is_told_apart_by_its_rows_without_a_patch(tmp_path):
    rows = [("SDXL", None, None), ("SDXL + PLADIS", "pladis", "its base"), ("DMD2", None, None)]
    rows += [("DMD2 + PLADIS", "pladis", "its base")]
    sources = read_sources([write_rows(tmp_path / "run", rows)])
    assert [(source.model, source.sides) for source in sources] == [
        ("SDXL", ["base", "pladis"]),
        ("DMD2", ["base", "pladis"]),
    ]
    exhibits = choose_exhibits(sources, 5)
    assert [each.model for each in exhibits] == ["SDXL"] * 3 + ["DMD2"] * 2
    named = [(name, operator, name.partition(" ")[0] if operator else None) for name, operator, _ in rows]
    shuffled = [named[0], named[2], named[3], named[1]]  # as a sweep writes them: bases first
    again = read_sources([write_rows(tmp_path / "sweep", shuffled)])
    assert [source.sides for source in again] == [["base", "pladis"]] * 2
    assert again[0].images["prompt 1", 1]["pladis"].name == "3-1.png"


def test_validations_of_one_base_become_one_model_and_those_of_another_base_another(tmp_path):
    named = {"xl-pladis": 50, "xl-gag": 60}
    folders = [write_validation(tmp_path / f"{name}-validation", first) for name, first in named.items()]
    (source,) = read_sources(folders)
    assert source.sides == ["base", "xl-pladis", "xl-gag"] and len(source.images) == 3
    assert source.images["prompt 1", 1]["xl-gag"].parent.parent == folders[1]
    other = write_validation(tmp_path / "turbo", 70, base_from=30)
    sources = read_sources([folders[0], other])
    assert [(source.model, source.sides) for source in sources] == [
        ("xl-pladis", ["base", "patched"]),
        ("turbo", ["base", "patched"]),
    ]
    with pytest.raises(InputError, match="xl-pladis has the sides base, xl-pladis, xl-gag, and turbo base, patched"):
        read_sources([*folders, other])
    with pytest.raises(InputError, match="turbo has no gag; it has base, patched"):
        read_sources([other], ["base", "gag"])
    with pytest.raises(InputError, match="two sides at least, each once, not base"):
        read_sources([other], ["base"])
    with pytest.raises(InputError, match="no finished validation .* no run of rows"):
        read_sources([tmp_path])


def test_a_damaged_run_and_too_many_sides_are_refused(tmp_path):
    folder = write_rows(tmp_path / "run", [("base", None, None), *((f"g{n}", "gag", "base") for n in range(3))])
    with pytest.raises(InputError, match="4 sides cannot be shown at once: base, g0, g1, g2; name two or three"):
        choose_exhibits(read_sources([folder]), 2)
    assert len(choose_exhibits(read_sources([folder]), 3, pairwise=True)) == 3
    data = json.loads((folder / "rows.json").read_text())
    data["rows"][1]["images"].pop()
    (folder / "rows.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"rows\.json is damaged \(ValueError"):
        read_sources([folder])


def cast(key, raters, chance, lean=SIDES[2]):
    """Votes of raters who choose `lean` in three of five cases, else any of the others or no difference."""
    votes = []
    for rater in range(raters):
        for item, exhibit in key.items.items():
            shown = list(exhibit.shown)
            chance.shuffle(shown)
            side = chance.choice([lean] * 3 + [SIDES[0], None] if lean in exhibit.images else [None])
            votes.append(Vote(f"{rater:032x}", "", item, "alignment", tuple(shown), exhibit.images.get(side), 1000))
    return votes


@pytest.fixture
def pooled(tmp_path):
    """A key of two models with 12 and 8 items of three sides."""
    exhibits = draw_exhibits(tmp_path, 12, sides=SIDES, model="xl") + draw_exhibits(
        tmp_path, 8, sides=SIDES, model="dmd2"
    )
    _, page, key = build(tmp_path, exhibits)
    return page, key


def test_a_page_of_three_sides_holds_three_images_an_item_and_names_no_side(pooled):
    page, key = pooled
    shown = json.loads(Elements(page).scripts["study"])["items"]
    assert len(shown) == 20 and all(len(item["images"]) == 3 for item in shown)
    assert (
        "GAG" not in page.replace("GAG", "", 0).split("</style>")[0] and '"PLADIS"' not in page and "dmd2" not in page
    )
    assert key.sides == list(SIDES) and set(key.models) == {"xl", "dmd2"}


def test_pooled_votes_are_counted_by_model_and_in_all(pooled):
    _, key = pooled
    votes = cast(key, 5, random.Random(1))
    result = analyse(votes, key, draws=2000)
    (question,) = result.questions
    chosen = [key.items[vote.item].side_of(vote.chosen) if vote.chosen else None for vote in votes]
    for side in SIDES:
        assert question.shares[side].value == pytest.approx(chosen.count(side) / 100)
    assert question.no_difference.value == chosen.count(None) / 100 and question.votes == 100
    assert sum(share.value for share in question.places.values()) == pytest.approx(1) and len(question.places) == 3
    by_model = {model: questions[0] for model, questions in result.by_model.items()}
    assert (by_model["xl"].votes, by_model["dmd2"].votes) == (60, 40)
    own = [c for c, vote in zip(chosen, votes, strict=True) if key.items[vote.item].model == "dmd2"]
    assert by_model["dmd2"].shares["GAG"].value == own.count("GAG") / 40
    best = question.contest("GAG", "base")
    assert best.verdict == "GAG preferred" and best.preference.low > 0.5
    assert [(each.side, each.other) for each in question.contests] == [SIDES[1::-1], SIDES[::-2], SIDES[:0:-1]]
    text = render(result)
    assert "all, prompt alignment, base or GAG: GAG preferred" in text and "xl, prompt alignment, base or GAG:" in text


def test_intervals_of_three_sides_are_those_of_resampled_raters_and_items_and_of_the_binomial(pooled):
    _, key = pooled
    votes = cast(key, 6, random.Random(2))
    (question,) = analyse(votes, key, draws=8000).questions
    table = {(vote.session, vote.item): vote for vote in votes}
    raters, items = sorted({vote.session for vote in votes}), list(key.items)
    rng, shares = numpy.random.default_rng(3), []
    for _ in range(2000):
        rows, columns = rng.integers(0, 6, 6), rng.integers(0, 20, 20)
        drawn = [table[raters[row], items[column]] for row in rows for column in columns]
        shares.append(numpy.mean([vote.chosen == key.items[vote.item].images["GAG"] for vote in drawn]))
    low, high = numpy.quantile(shares, [0.025, 0.975])
    assert abs(question.shares["GAG"].low - low) < 0.02 and abs(question.shares["GAG"].high - high) < 0.02
    leads = []
    for item in items:
        of_item = [vote.chosen for vote in votes if vote.item == item]
        leads.append(of_item.count(key.items[item].images["GAG"]) - of_item.count(key.items[item].images["base"]))
    above, decided = sum(lead > 0 for lead in leads), sum(lead != 0 for lead in leads)
    won = question.contest("GAG", "base").won
    assert won.value == above / decided
    highest = 1.0 if above == decided else beta.ppf(0.975, above + 1, decided - above)  # Clopper and Pearson 1934
    assert won.high == pytest.approx(highest)
    assert won.low == pytest.approx(beta.ppf(0.025, above, decided - above + 1))


def test_votes_on_pairs_of_three_sides_count_where_a_side_was_shown(tmp_path):
    source = draw_exhibits(tmp_path, 3, sides=SIDES)
    pairs = [SIDES[:2], SIDES[::2], SIDES[1:]]
    exhibits = [
        type(each)(each.prompt, each.seed, {side: each.images[side] for side in pair})
        for each, pair in zip(source, pairs, strict=True)
    ]
    page, path = tmp_path / "page.html", tmp_path / "key.json"
    write_study(exhibits, page, path, models={"": HASH}, title="t")
    key = read_key(path)
    (question,) = analyse(cast(key, 4, random.Random(5)), key, draws=100).questions
    shown = {side: sum(side in item.images for item in key.items.values()) for side in SIDES}
    assert set(shown.values()) == {2} and question.votes == 12
    votes = cast(key, 4, random.Random(5))
    chosen = [vote.chosen for vote in votes]
    gag = [item.images["GAG"] for item in key.items.values() if "GAG" in item.images]
    assert question.shares["GAG"].value == sum(image in gag for image in chosen) / 8
    assert question.places.keys() == {"left", "right"}


def test_the_command_pools_folders_and_reads_their_votes(run, tmp_path):
    rows = [("base", None, None), ("PLADIS", "pladis", "base"), ("GAG", "gag", "base")]
    folders = [write_rows(tmp_path / name, rows) for name in ("xl", "dmd2")]
    page = tmp_path / "study.html"
    made = json.loads(run("study", *folders, "--pairs", "4", "--out", page, "--json", check=0).stdout)
    assert made["items"] == 4 and made["sides"] == list(SIDES) and set(made["models"]) == {"xl", "dmd2"}
    key = read_key(tmp_path / "study-key.json")
    lines = [
        {"item": item, "shown": list(each.shown), "question": "quality", "chosen": each.images["GAG"], "ms": 900}
        for item, each in key.items.items()
    ]
    data = {"schema_version": 2, "study": key.study, "session": "a" * 32, "rater": "", "votes": lines}
    (tmp_path / "votes.json").write_text(json.dumps(data))
    options = ("--out", page, "--votes", tmp_path / "votes.json")
    assert "dmd2, image quality" in run("study", *folders, *options, check=0).stdout
    result = json.loads(run("study", *folders, *options, "--json", check=0).stdout)
    assert result["by_model"]["xl"][0]["shares"]["GAG"]["value"] == 1.0
    assert "--sides names none" in run("study", *folders, "--sides", ",", check=2).stderr
