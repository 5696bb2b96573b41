"""The blind study's votes: read strictly, and no bolder in what they say than they are many."""

import json
import secrets
from dataclasses import replace

import numpy
import pytest

from surgery.analysis.study import Vote, analyse, read_key, read_votes, render
from surgery.errors import InputError

from .study_files import HASH, NO_DIFFERENCE, Elements, build, draw_exhibits


def session_file(key, number=1, count=3, rater="Zoë"):
    """What the page saves when `number`th rater has voted on `count` pairs: left is better, and no difference."""
    votes = []
    for item, pair in list(key.items.items())[:count]:
        shown = list(pair.shown[:: 1 if number % 2 else -1])
        votes.append({"item": item, "shown": shown, "question": "quality", "chosen": shown[0], "ms": 1500})
        votes.append({"item": item, "shown": shown, "question": "alignment", "chosen": None, "ms": 900})
    return {"schema_version": 2, "study": key.study, "session": f"{number:032x}", "rater": rater, "votes": votes}


def of_schema_1(data):
    """The same file as version 0.3 of the page wrote it."""
    votes = []
    for vote in data["votes"]:
        left, right = vote["shown"]
        choice = {left: "left", right: "right", None: "same"}[vote["chosen"]]
        kept = {"item": vote["item"], "left": left, "right": right, "question": vote["question"]}
        votes.append({**kept, "choice": choice, "ms": vote["ms"]})
    return {**data, "schema_version": 1, "votes": votes}


def write(folder, data, name="votes.json"):
    path = folder / name
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def test_votes_are_read_as_they_were_given_whole_or_half_a_session(made, tmp_path):
    key = made[4]
    whole, half = session_file(key, 1, len(key.items)), session_file(key, 2, 2)
    half["votes"].pop()
    pasted = tmp_path / "pasted.json"
    pasted.write_bytes(b"\xef\xbb\xbf" + json.dumps(half).encode())  # as Windows editors save it
    votes = read_votes([write(tmp_path, whole), pasted], key)
    assert len(votes) == 2 * len(key.items) + 3
    last = half["votes"][-1]
    assert votes[-1] == Vote(session=half["session"], rater="Zoë", **{**last, "shown": tuple(last["shown"])})
    assert votes[0].chosen == votes[0].shown[0] and votes[1].chosen is None and votes[0].ms == 1500


def test_votes_and_keys_of_schema_1_are_read_and_mean_the_same(made, tmp_path):
    key, data = made[4], session_file(made[4], 2, 40)
    now, before = write(tmp_path, data, "now.json"), write(tmp_path, of_schema_1(data), "before.json")
    assert read_votes([before], key) == read_votes([now], key)
    first = key.model_dump() | {"schema_version": 1, "artifact_hash": HASH}
    del first["models"], first["sides"]
    first["items"] = {
        name: {"prompt": item.prompt, "seed": item.seed, **item.images} for name, item in key.items.items()
    }
    old = read_key(write(tmp_path, first, "key.json"))
    assert old.items == key.items and old.sides == key.sides and old.models == {"": HASH}
    assert analyse(read_votes([before], old), old, draws=50) == analyse(read_votes([now], key), key, draws=50)


def changed(**values):
    def change(data):
        data["votes"][2].update(values)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(study="0" * 16), "votes on another study .0000000000000000; this key"),
        (lambda data: data.update(schema_version=3), "schema_version 3; .*update"),
        (lambda data: data.update(of_schema_1(data), schema_version=2), "damaged at votes.0.shown"),
        (lambda data: data.update(votes=[]), "holds no votes; leave it out"),
        (lambda data: data.update(extra=1), "damaged at extra: extra inputs"),
        (lambda data: data.update(session="me"), "damaged at session"),
        (lambda data: data.update(rater="x" * 41), "damaged at rater"),
        (changed(chosen="base"), "damaged at votes.2.chosen"),
        (changed(chosen="0" * 16), "votes.2: 0000000000000000 is not among the images that were shown"),
        (changed(question="beauty"), "damaged at votes.2.question"),
        (changed(ms=-1), "damaged at votes.2.ms"),
        (changed(ms="9"), "damaged at votes.2.ms"),
        (changed(item="0" * 16), "votes.2: the key has no item 0000"),
        (changed(shown=["0" * 16, "1" * 16]), "votes.2: 0000000000000000, 1111.* are not the images of"),
        (
            lambda data: data["votes"][2].update(shown=data["votes"][2]["shown"][:1] * 2),
            "votes.2: .* are not the images",
        ),
        (lambda data: data["votes"][1].update(shown=data["votes"][1]["shown"][::-1]), "votes.1: .* in another order"),
        (lambda data: data["votes"].append(data["votes"][0]), "votes.6: the quality of .* is answered twice"),
    ],
)
def test_a_file_that_the_page_did_not_write_is_refused_with_its_name(made, tmp_path, change, message):
    data = session_file(made[4])
    change(data)
    with pytest.raises(InputError, match=message) as caught:
        read_votes([write(tmp_path, data)], made[4])
    assert "votes.json" in str(caught.value)


def test_damaged_json_repeated_sessions_and_no_files_are_refused(made, tmp_path):
    key = made[4]
    path = tmp_path / "torn.json"
    for text in ('{"schema_version": 1', "[1]", '"x"', "[" * 100_000, "\xff"):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(InputError, match=r"torn\.json cannot be read: .*save it again"):
            read_votes([path], key)
    early = write(tmp_path, session_file(key, 1, 2), "early.json")
    late = write(tmp_path, session_file(key, 1, 3), "late.json")
    with pytest.raises(
        InputError, match=r"late\.json \(6 votes\) and .*early\.json \(4 votes\) are of the same session"
    ):
        read_votes([early, late], key)
    with pytest.raises(InputError, match="there are no votes"):
        read_votes([], key)
    with pytest.raises(InputError, match="none.json cannot be read: No such file"):
        read_votes([tmp_path / "none.json"], key)


def contest(question):
    return question.contest("patched", "base")


def preference(question):
    """The share of "patched" among the votes for either."""
    return contest(question).preference


def cast(key, answers, question="quality"):
    """Votes from answers[rater][pair]: "p" for patched, "b" for base, "=" for no difference, " " for none.

    The patched image stands left where rater plus pair is even.
    """
    votes = []
    for rater, row in enumerate(answers):
        for number, (answer, (item, pair)) in enumerate(zip(row, key.items.items(), strict=False)):
            patched, base = pair.images["patched"], pair.images["base"]
            shown = (patched, base) if (rater + number) % 2 == 0 else (base, patched)
            chosen = {"p": patched, "b": base}.get(answer)
            if answer != " ":
                votes.append(Vote(f"{rater:032x}", "", item, question, shown, chosen, 1000 * (number + 1)))
    return votes


def test_rates_are_the_shares_that_a_hand_counts(made):
    key = made[4]
    result = analyse(cast(key, ["ppb=", "p=b ", "pp  "]) + cast(key, ["bb"], "alignment"), key, draws=200)
    quality, alignment = result.questions
    assert (quality.votes, quality.raters, quality.items) == (9, 3, 4)
    assert (alignment.votes, alignment.raters, alignment.items) == (2, 1, 2)
    assert (quality.shares["patched"].value, quality.shares["base"].value) == (5 / 9, 2 / 9)
    assert quality.no_difference.value == 2 / 9
    assert preference(quality).value == 5 / 7 and preference(alignment).value == 0
    # Patched stood left for rater 0 at pairs 0 and 2, rater 1 at pair 1, rater 2 at pair 0; base left: the others.
    assert quality.places["left"].value == 3 / 7
    assert quality.median_ms == 2000 and contest(quality).sign_test == 1  # the signs of the pairs are + + - 0
    assert (result.votes, result.raters, result.items, result.items_in_study) == (11, 3, 4, 60)
    assert result.models == {"": HASH} and result.study == key.study
    assert json.loads(json.dumps(result.to_json()))["questions"][0]["shares"]["patched"]["value"] == 5 / 9


def test_intervals_are_those_of_a_bootstrap_over_raters_and_pairs_written_as_loops(made):
    key = made[4]
    answers = ["pppbpp=pbp", "ppbbp=bpbb", "pp=pppppbp", "bpbbp b=bb"]
    quality = analyse(cast(key, answers), key, draws=20000).questions[0]
    rng, shares, decided = numpy.random.default_rng(7), [], []
    for _ in range(20000):
        rows, columns = rng.integers(0, 4, 4), rng.integers(0, 10, 10)
        drawn = [answers[row][column] for row in rows for column in columns if answers[row][column] != " "]
        shares.append(drawn.count("p") / len(drawn))
        decided.append(drawn.count("p") / (len(drawn) - drawn.count("=")))
    for estimate, reference in ((quality.shares["patched"], shares), (preference(quality), decided)):
        low, high = numpy.quantile(reference, [0.025, 0.975])
        assert abs(estimate.low - low) < 0.02 and abs(estimate.high - high) < 0.02
        assert estimate.low < estimate.value < estimate.high


def test_one_rater_is_resampled_over_pairs_alone_and_raters_who_differ_widen_the_interval(made):
    key = made[4]
    one = analyse(cast(key, ["p" * 30 + "b" * 20]), key)
    assert one.resampled == "items" and "not from person to person" in one.notes[0]
    width = 2 * 1.96 * (0.6 * 0.4 / 50) ** 0.5  # of a share of 50 independent pairs
    found = preference(one.questions[0])
    assert abs((found.high - found.low) - width) < 0.03
    agree = analyse(cast(key, ["p" * 30 + "b" * 20] * 6), key)
    differ = analyse(cast(key, ["p" * 50] * 3 + ["p" * 10 + "b" * 40] * 3), key)
    assert agree.resampled == differ.resampled == "raters and items"
    widths = [preference(each.questions[0]).high - preference(each.questions[0]).low for each in (agree, differ)]
    assert abs(widths[0] - width) < 0.03  # more raters who all say the same are no more pairs
    assert widths[1] > 2 * widths[0]
    assert analyse(cast(key, ["p", "b"]), key).resampled == "raters"
    assert analyse(cast(key, ["p"]), key).resampled == "nothing"


@pytest.mark.parametrize(
    ("answers", "verdict"),
    [
        (["p" * 40 + "b" * 10] * 5, "patched preferred"),
        (["b" * 40 + "p" * 10] * 5, "base preferred"),
        (["p" * 26 + "b" * 24] * 5, NO_DIFFERENCE),
        (["=" * 50] * 5, NO_DIFFERENCE),
        (["ppppp"], NO_DIFFERENCE),  # its interval is [1, 1], but five pairs can fall so by chance
        (["pppppp"], "patched preferred"),
        (["p"] * 40, NO_DIFFERENCE),  # many raters, one pair: nothing is known of other pairs
        (["p" * 50] * 3 + ["b" * 45 + "p" * 5] * 3, NO_DIFFERENCE),  # two tastes
    ],
)
def test_the_verdict_is_no_bolder_than_the_votes(made, answers, verdict):
    assert contest(analyse(cast(made[4], answers), made[4], draws=2000).questions[0]).verdict == verdict


def test_votes_without_any_preference_have_none(made):
    result = analyse(cast(made[4], ["===", "=="]), made[4], draws=100)
    quality = result.questions[0]
    assert preference(quality) is None and quality.places == {} and quality.no_difference.value == 1
    assert "-" in render(result)


def test_raters_who_saw_no_pair_in_common_still_have_an_interval(made):
    quality = analyse(cast(made[4], ["pb  ", "  pp"]), made[4], draws=500).questions[0]
    patched = quality.shares["patched"]
    assert quality.votes == 4 and patched.value == 0.75
    assert 0 <= patched.low < 0.75 < patched.high <= 1  # no draw without votes turned them into NaN


def test_the_same_votes_give_the_same_figures_in_any_order_and_mirrored_votes_mirrored_ones(made):
    key = made[4]
    votes = cast(key, ["ppb=pbp", "pp=bppb", "bpp=ppp"])
    result = analyse(votes, key, draws=500, seed=3)
    assert analyse(votes[::-1], key, draws=500, seed=3) == result
    assert analyse(votes, key, draws=500, seed=4) != result
    items = {
        name: item.model_copy(update={"images": dict(zip(("patched", "base"), item.images.values(), strict=True))})
        for name, item in key.items.items()
    }
    mirrored = analyse(votes, key.model_copy(update={"items": items}), draws=500, seed=3).questions[0]
    quality = result.questions[0]
    assert mirrored.shares["base"] == quality.shares["patched"] and mirrored.places == quality.places
    assert preference(mirrored).low == pytest.approx(1 - preference(quality).high)


def test_raters_who_favour_a_side_or_sign_twice_are_pointed_out(made):
    key = made[4]
    lefts = cast(key, [("pb" * 25), ("bp" * 25)])  # always the left image
    result = analyse([replace(vote, rater="Anna") for vote in lefts], key, draws=500)
    assert result.questions[0].places["left"].value == 1 and preference(result.questions[0]).value == 0.5
    assert any("favoured the left image" in note for note in result.notes)
    assert any("2 sessions are signed 'anna'" in note for note in result.notes)
    assert any("nobody answered the question on prompt alignment" in note for note in result.notes)
    fair = analyse(cast(key, ["pppp" * 10] * 6), key, draws=500)
    assert not any("favoured" in note or "signed" in note for note in fair.notes)


def test_what_cannot_be_analysed_is_refused(made):
    key = made[4]
    votes = cast(key, ["pp"])
    with pytest.raises(InputError, match="no votes"):
        analyse([], key)
    with pytest.raises(InputError, match="at least one draw"):
        analyse(votes, key, draws=0)
    with pytest.raises(InputError, match="the key has no item 0000000000000000"):
        analyse([*votes, replace(votes[0], item="0" * 16)], key)


def test_the_table_shows_rates_intervals_and_verdicts(made):
    key = made[4]
    answers = ["p" * 40 + "b" * 10] * 5
    result = analyse(cast(key, answers) + cast(key, ["bp" * 25] * 5, "alignment"), key, draws=500)
    text = render(result)
    quality = result.questions[0]
    share = quality.shares["patched"]
    assert f"80.0% [{100 * share.low:.1f}, {100 * share.high:.1f}]" in text
    assert "500 votes by 5 raters on 50 of 60 items" in text and HASH[:12] in text
    assert "image quality, base or patched: patched preferred (" in text
    assert f"prompt alignment, base or patched: {NO_DIFFERENCE} (" in text
    assert "500 bootstrap draws over raters and items" in text


def test_from_the_images_to_the_verdict(tmp_path):
    study, page, key = build(tmp_path, draw_exhibits(tmp_path / "images", 12))
    shown = json.loads(Elements(page).scripts["study"])
    paths = []
    for number in range(4):  # four raters who like the patched image better and do not mind the text
        data = {
            "schema_version": 2,
            "study": shown["study"],
            "session": secrets.token_hex(16),
            "rater": "",
            "votes": [],
        }
        for pair in shown["items"]:
            sees = {"item": pair["item"], "shown": pair["images"] if number % 2 else pair["images"][::-1]}
            better = key.items[pair["item"]].images["patched"]
            data["votes"].append({**sees, "question": "quality", "chosen": better, "ms": 1200})
            data["votes"].append({**sees, "question": "alignment", "chosen": None, "ms": 800})
        paths.append(write(tmp_path, data, f"votes-{study.id}-{number}.json"))
    quality, alignment = analyse(read_votes(paths, key), key, draws=300).questions
    assert contest(quality).verdict == "patched preferred" and preference(quality).value == 1
    assert quality.places["left"].value == 0.5
    assert contest(alignment).verdict == NO_DIFFERENCE and alignment.no_difference.value == 1
