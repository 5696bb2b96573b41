"""The blind study: the page gives nothing away, votes are checked before they count, and the figures are right."""

import base64
import hashlib
import io
import json
import re
import secrets
import struct
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files

import numpy
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from surgery.errors import InputError
from surgery.validate.study import Pair, Vote, analyse, read_key, read_votes, render, write_study
from surgery.validate.study.votes import QUESTIONS, _VoteLine, _VotesFile

HASH = "ab" * 32
HOSTILE = '</script><img src=x onerror=alert(1)><!--<script> & "quotes" \u2028 狐 @@IMAGES@@ @@STUDY@@ \\1 \\u003c'
NO_DIFFERENCE = "no difference that these votes can show"


def draw(path, seed, size=(8, 6), mode="RGB"):
    """A random image with a text chunk that names its file; an image is drawn from its seed."""
    pixels = numpy.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=numpy.uint8)
    text = PngInfo()
    text.add_itxt("surgery", json.dumps({"side": path.stem}))
    Image.fromarray(pixels).convert(mode).save(path, pnginfo=text, icc_profile=b"of " + path.stem.encode())
    return path


def draw_pairs(folder, count, prompts=("a prompt",)):
    folder.mkdir(exist_ok=True)
    return [
        Pair(
            prompts[number % len(prompts)],
            1000 + number,
            draw(folder / f"{number}-base.png", 2 * number),
            draw(folder / f"{number}-patched.png", 2 * number + 1),
        )
        for number in range(count)
    ]


def build(folder, pairs, name="study", title="Which is better?", seed=0):
    page, key = folder / f"{name}.html", folder / f"{name}-key.json"
    study = write_study(pairs, page, key, artifact_hash=HASH, title=title, seed=seed)
    return study, page.read_text(encoding="utf-8"), read_key(key)


class Elements(HTMLParser):
    """What a browser makes of the page: (tag, attributes) in order, and the text of each script by its id."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.scripts, self._inside = [], {}, None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._inside = dict(attributes).get("id", "") if tag in ("script", "style") else None

    def handle_data(self, data):
        if self._inside is not None:
            self.scripts[self._inside] = self.scripts.get(self._inside, "") + data

    def handle_endtag(self, tag):
        self._inside = None


def without_images(page):
    return re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "IMAGE", page)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, pairs, Study, page, Key) of a study of 60 pairs."""
    folder = tmp_path_factory.mktemp("study")
    pairs = draw_pairs(folder / "images", 60)
    return folder, pairs, *build(folder, pairs)


def test_the_page_holds_the_pixels_of_every_image_and_no_other_byte_of_its_file(made):
    _, pairs, study, page, key = made
    scripts = Elements(page).scripts
    by_seed = {item.seed: item for item in key.items.values()}
    assert study.pairs == len(by_seed) == 60 and study.identical == 0
    for pair in pairs:
        for side in ("base", "patched"):
            kind, _, data = scripts[getattr(by_seed[pair.seed], side)].partition(",")
            png = base64.b64decode(data, validate=True)
            assert kind == "data:image/png;base64"
            with Image.open(io.BytesIO(png)) as shown, Image.open(getattr(pair, side)) as drawn:
                assert shown.tobytes() == drawn.tobytes() and shown.size == drawn.size
                assert drawn.info and not shown.info
            chunks, place = [], 8
            while place < len(png):
                length, name = struct.unpack(">I4s", png[place : place + 8])
                chunks.append(name)
                place += 12 + length
            assert set(chunks) == {b"IHDR", b"IDAT", b"IEND"}


def test_the_page_names_no_side_no_file_no_seed_and_no_secret(made):
    folder, pairs, study, page, key = made
    text = re.sub('"[0-9a-f]{16}"', '"ID"', without_images(page))
    for telling in (key.salt, HASH, str(folder), *(str(pair.seed) for pair in pairs[:5]), ".png"):
        assert telling not in text
    assert re.findall(r"(?i)\bbase\b(?!-uri)|patched|baseline|pladis|surgery", text) == []
    shown = json.loads(Elements(page).scripts["study"])
    assert set(shown) == {"study", "title", "pairs"} and shown["study"] == key.study == study.id
    assert all(set(pair) == {"item", "prompt", "images"} for pair in shown["pairs"])


def test_order_in_the_page_says_nothing_of_sides_or_of_the_order_of_drawing(made):
    _, pairs, _, page, key = made
    shown = json.loads(Elements(page).scripts["study"])["pairs"]
    firsts = [key.items[pair["item"]].first for pair in shown]
    assert 10 <= firsts.count("base") <= 50  # of 60; a fair coin leaves this once in ten million pages
    for pair in shown:
        item = key.items[pair["item"]]
        assert pair["images"] == list(item.images) and getattr(item, item.first) == pair["images"][0]
    seeds = [key.items[pair["item"]].seed for pair in shown]
    assert sorted(seeds) == [pair.seed for pair in pairs] != seeds
    images = re.findall(r'<script type="text/plain" id="([0-9a-f]{16})">', page)
    assert images == sorted(image for item in key.items.values() for image in item.images)


def test_with_the_sides_swapped_the_page_differs_in_its_images_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(secrets, "token_hex", lambda count: "5" * 2 * count)
    pairs = draw_pairs(tmp_path / "images", 4)
    swapped = [replace(pair, base=pair.patched, patched=pair.base) for pair in pairs]
    _, page, key = build(tmp_path, pairs)
    _, other, other_key = build(tmp_path, swapped, "swapped")
    assert key == other_key and page != other and without_images(page) == without_images(other)


def test_ids_need_the_salt_and_change_with_the_seed(tmp_path, monkeypatch):
    pairs = draw_pairs(tmp_path / "images", 2)
    first, second = (build(tmp_path, pairs, name)[2] for name in ("one", "two"))
    assert first.salt != second.salt and not set(first.items) & set(second.items) and first.study != second.study
    monkeypatch.setattr(secrets, "token_hex", lambda count: first.salt)
    again, other_seed = (build(tmp_path, pairs, f"seed{seed}", seed=seed)[2] for seed in (0, 1))
    assert again == first and not set(first.items) & set(other_seed.items)


def test_the_page_asks_nothing_of_a_network_and_runs_no_script_but_its_own(made):
    _, _, _, page, _ = made
    elements = Elements(page)
    assert not re.search(r"https?:|//[a-z]|@import|url\(|fetch\(|XMLHttp|sendBeacon|WebSocket", without_images(page))
    for _, attributes in elements.tags:
        assert not {"src", "style", "action", "onclick", "onload"} & set(attributes)
        assert attributes.get("href", "data:,") == "data:,"
    metas = [attributes for tag, attributes in elements.tags if tag == "meta"]
    policy = next(each["content"] for each in metas if each.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:" and rules["form-action"] == "'none'"
    for tag in ("script", "style"):
        (own,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"
    running = [attributes for tag, attributes in elements.tags if tag == "script" and "type" not in attributes]
    assert len(running) == 1


def test_a_prompt_or_title_that_is_markup_stays_text(tmp_path):
    plain = build(tmp_path, draw_pairs(tmp_path / "images", 2))[1]
    hostile = build(tmp_path, draw_pairs(tmp_path / "images", 2, (HOSTILE,)), "hostile", title=HOSTILE)[1]
    elements = Elements(hostile)
    assert [tag for tag, _ in elements.tags] == [tag for tag, _ in Elements(plain).tags]
    study = json.loads(elements.scripts["study"])
    assert study["title"] == HOSTILE and {pair["prompt"] for pair in study["pairs"]} == {HOSTILE}
    assert "<" not in elements.scripts["study"]
    assert ".innerHTML" not in hostile and "insertAdjacentHTML" not in hostile  # the script shows them as text


def test_the_page_can_be_used_by_keyboard_and_says_how():
    template = files("surgery.validate.study").joinpath("page.html").read_text(encoding="utf-8")
    buttons = [attributes for tag, attributes in Elements(template).tags if tag == "button"]
    choices = {each["data-choice"]: each for each in buttons if "data-choice" in each}
    assert set(choices) == {"left", "same", "right"} and all(each["aria-label"] for each in choices.values())
    assert all(each["type"] in ("button", "submit") for each in buttons)
    table = re.search(r"const KEYS = \{(.*?)\};", template, re.DOTALL)[1]
    keys = dict(re.findall(r'(\w+): "(\w+)"', table))
    shown = re.search(r'<p class="keys">(.*?)</p>', template, re.DOTALL)[1]
    named = {"arrowleft": "←", "arrowdown": "↓", "arrowright": "→"}
    assert set(keys.values()) == set(choices)
    assert all(f"<kbd>{named.get(key, key.upper())}</kbd>" in shown for key in keys)
    assert "<kbd>Backspace</kbd>" in shown and 'event.key === "Backspace"' in template


def test_the_page_writes_what_read_votes_reads():
    template = files("surgery.validate.study").joinpath("page.html").read_text(encoding="utf-8")
    vote = re.search(r"session\.votes\.push\(\{(.*?)\}\)", template)[1]
    file = re.search(r"JSON\.stringify\(\{(.*?)\}, null", template)[1]
    assert [part.split(":")[0].strip() for part in vote.split(",")] == list(_VoteLine.model_fields)
    assert [part.split(":")[0].strip() for part in file.split(",")] == list(_VotesFile.model_fields)
    assert tuple(re.findall(r'\{ id: "(\w+)", text:', template)) == QUESTIONS
    assert re.search(r'id="rater" maxlength="40"', template)


def test_identical_images_are_counted(tmp_path):
    pairs = draw_pairs(tmp_path / "images", 3)
    study, _, _ = build(tmp_path, [pairs[0], replace(pairs[1], patched=pairs[1].base), pairs[2]])
    assert study.identical == 1
    assert json.loads(json.dumps(study.to_json()))["page_bytes"] == (tmp_path / "study.html").stat().st_size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pairs, folder: [], "at least one pair"),
        (lambda pairs, folder: [*pairs, pairs[0]], "comes twice with seed 1000"),
        (
            lambda pairs, folder: [replace(pairs[0], base=draw(folder / "large.png", 0, (9, 6)))],
            "large.png has 9x6 pixels and .*0-patched.png 8x6",
        ),
        (
            lambda pairs, folder: [replace(pairs[0], patched=draw(folder / "clear.png", 0, mode="RGBA"))],
            "clear.png has mode RGBA, not RGB",
        ),
        (lambda pairs, folder: [replace(pairs[0], base=folder / "none.png")], "none.png cannot be read: No such file"),
        (lambda pairs, folder: [pairs[0], replace(pairs[1], base=broken(pairs[1].base))], "cannot be read: .*draw it"),
    ],
)
def test_what_makes_no_study_is_refused_and_leaves_no_file(tmp_path, change, message):
    pairs = change(draw_pairs(tmp_path / "images", 2), tmp_path / "images")
    out = tmp_path / "out"
    with pytest.raises(InputError, match=message):
        write_study(pairs, out / "page.html", out / "key.json", artifact_hash=HASH, title="t")
    assert not out.exists() or not list(out.iterdir())


def broken(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - 60])  # the header is whole, the pixels are not
    return path


def test_places_that_cannot_be_written_are_named(tmp_path):
    pairs = draw_pairs(tmp_path / "images", 1)
    with pytest.raises(InputError, match="images is a folder"):
        write_study(pairs, tmp_path / "images", tmp_path / "key.json", artifact_hash=HASH, title="t")
    under = pairs[0].base / "page.html"
    with pytest.raises(InputError, match="cannot write the study to .*0-base.png/page.html and .*key.json"):
        write_study(pairs, under, tmp_path / "key.json", artifact_hash=HASH, title="t")
    assert not (tmp_path / "key.json").exists()


def test_an_old_key_is_never_overwritten_and_the_key_is_a_file_of_its_own(tmp_path):
    pairs = draw_pairs(tmp_path / "images", 1)
    build(tmp_path, pairs)
    before = {path: path.read_bytes() for path in tmp_path.glob("study*")}
    with pytest.raises(InputError, match=r"study-key\.json exists, and votes on an earlier page may need it"):
        build(tmp_path, pairs)
    assert before == {path: path.read_bytes() for path in tmp_path.glob("study*")}
    with pytest.raises(InputError, match="must be a file of its own"):
        write_study(pairs, tmp_path / "x", tmp_path / "images" / ".." / "x", artifact_hash=HASH, title="t")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data | {"schema_version": 2}, "schema_version 2; .*update"),
        (lambda data: data | {"more": 1}, "no key of a study: more: extra"),
        (lambda data: data | {"items": {}}, "no key of a study: items"),
        (lambda data: data | {"items": {**data["items"], "0" * 16: next(iter(data["items"].values()))}}, "twice"),
        (lambda data: [data], "cannot be read: it holds no mapping"),
    ],
)
def test_a_damaged_key_is_refused(made, tmp_path, change, message):
    data = json.loads((made[0] / "study-key.json").read_text(encoding="utf-8"))
    path = tmp_path / "key.json"
    path.write_text(json.dumps(change(data)), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_key(path)
    with pytest.raises(InputError, match="No such file"):
        read_key(tmp_path / "none.json")


def session_file(key, number=1, count=3, rater="Zoë"):
    """What the page saves when `number`th rater has voted on `count` pairs: left is better, and no difference."""
    votes = []
    for item, pair in list(key.items.items())[:count]:
        left, right = pair.images[:: 1 if number % 2 else -1]
        shown = {"item": item, "left": left, "right": right}
        votes.append({**shown, "question": "quality", "choice": "left", "ms": 1500})
        votes.append({**shown, "question": "alignment", "choice": "same", "ms": 900})
    return {"schema_version": 1, "study": key.study, "session": f"{number:032x}", "rater": rater, "votes": votes}


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
    assert votes[-1] == Vote(session=half["session"], rater="Zoë", **last)
    assert votes[0].choice == "left" and votes[1].choice == "same" and votes[0].ms == 1500


def changed(**values):
    def change(data):
        data["votes"][2].update(values)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(study="0" * 16), "votes on another study .0000000000000000; this key"),
        (lambda data: data.update(schema_version=2), "schema_version 2; .*update"),
        (lambda data: data.update(votes=[]), "holds no votes; leave it out"),
        (lambda data: data.update(extra=1), "damaged at extra: extra inputs"),
        (lambda data: data.update(session="me"), "damaged at session"),
        (lambda data: data.update(rater="x" * 41), "damaged at rater"),
        (changed(choice="base"), "damaged at votes.2.choice"),
        (changed(question="beauty"), "damaged at votes.2.question"),
        (changed(ms=-1), "damaged at votes.2.ms"),
        (changed(ms="9"), "damaged at votes.2.ms"),
        (changed(item="0" * 16), "votes.2: the key has no pair 0000"),
        (changed(left="0" * 16), "votes.2: 0000000000000000 and .* are not the images of"),
        (lambda data: data["votes"][2].update(left=data["votes"][2]["right"]), "votes.2: .* are not the images of"),
        (lambda data: data["votes"][1].update(swapped(data["votes"][1])), "votes.1: .* stand on other sides"),
        (lambda data: data["votes"].append(data["votes"][0]), "votes.6: the quality of .* is answered twice"),
    ],
)
def test_a_file_that_the_page_did_not_write_is_refused_with_its_name(made, tmp_path, change, message):
    data = session_file(made[4])
    change(data)
    with pytest.raises(InputError, match=message) as caught:
        read_votes([write(tmp_path, data)], made[4])
    assert "votes.json" in str(caught.value)


def swapped(vote):
    return {"left": vote["right"], "right": vote["left"]}


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


def cast(key, answers, question="quality"):
    """Votes from answers[rater][pair]: "p" for patched, "b" for base, "=" for no difference, " " for none.

    The patched image stands left where rater plus pair is even.
    """
    votes = []
    for rater, row in enumerate(answers):
        for number, (answer, (item, pair)) in enumerate(zip(row, key.items.items(), strict=False)):
            patched_left = (rater + number) % 2 == 0
            left, right = (pair.patched, pair.base) if patched_left else (pair.base, pair.patched)
            choice = "same" if answer == "=" else "left" if (answer == "p") == patched_left else "right"
            if answer != " ":
                votes.append(Vote(f"{rater:032x}", "", item, question, left, right, choice, 1000 * (number + 1)))
    return votes


def test_rates_are_the_shares_that_a_hand_counts(made):
    key = made[4]
    result = analyse(cast(key, ["ppb=", "p=b ", "pp  "]) + cast(key, ["bb"], "alignment"), key, draws=200)
    quality, alignment = result.questions
    assert (quality.votes, quality.raters, quality.pairs) == (9, 3, 4)
    assert (alignment.votes, alignment.raters, alignment.pairs) == (2, 1, 2)
    assert (quality.patched.value, quality.base.value, quality.no_difference.value) == (5 / 9, 2 / 9, 2 / 9)
    assert quality.preference.value == 5 / 7 and alignment.preference.value == 0
    # Patched stood left for rater 0 at pairs 0 and 2, rater 1 at pair 1, rater 2 at pair 0; base left: the others.
    assert quality.left.value == 3 / 7
    assert quality.median_ms == 2000 and quality.sign_test == 1  # the signs of the pairs are + + - 0
    assert (result.votes, result.raters, result.pairs, result.pairs_in_study) == (11, 3, 4, 60)
    assert result.artifact_hash == HASH and result.study == key.study
    assert json.loads(json.dumps(result.to_json()))["questions"][0]["patched"]["value"] == 5 / 9


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
    for estimate, reference in ((quality.patched, shares), (quality.preference, decided)):
        low, high = numpy.quantile(reference, [0.025, 0.975])
        assert abs(estimate.low - low) < 0.02 and abs(estimate.high - high) < 0.02
        assert estimate.low < estimate.value < estimate.high


def test_one_rater_is_resampled_over_pairs_alone_and_raters_who_differ_widen_the_interval(made):
    key = made[4]
    one = analyse(cast(key, ["p" * 30 + "b" * 20]), key)
    assert one.resampled == "pairs" and "not from person to person" in one.notes[0]
    width = 2 * 1.96 * (0.6 * 0.4 / 50) ** 0.5  # of a share of 50 independent pairs
    preference = one.questions[0].preference
    assert abs((preference.high - preference.low) - width) < 0.03
    agree = analyse(cast(key, ["p" * 30 + "b" * 20] * 6), key)
    differ = analyse(cast(key, ["p" * 50] * 3 + ["p" * 10 + "b" * 40] * 3), key)
    assert agree.resampled == differ.resampled == "raters and pairs"
    widths = [each.questions[0].preference.high - each.questions[0].preference.low for each in (agree, differ)]
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
    assert analyse(cast(made[4], answers), made[4], draws=2000).questions[0].verdict == verdict


def test_votes_without_any_preference_have_none(made):
    result = analyse(cast(made[4], ["===", "=="]), made[4], draws=100)
    quality = result.questions[0]
    assert quality.preference is None and quality.left is None and quality.no_difference.value == 1
    assert "-" in render(result)


def test_raters_who_saw_no_pair_in_common_still_have_an_interval(made):
    quality = analyse(cast(made[4], ["pb  ", "  pp"]), made[4], draws=500).questions[0]
    assert quality.votes == 4 and quality.patched.value == 0.75
    assert 0 <= quality.patched.low < 0.75 < quality.patched.high <= 1  # no draw without votes turned them into NaN


def test_the_same_votes_give_the_same_figures_in_any_order_and_mirrored_votes_mirrored_ones(made):
    key = made[4]
    votes = cast(key, ["ppb=pbp", "pp=bppb", "bpp=ppp"])
    result = analyse(votes, key, draws=500, seed=3)
    assert analyse(votes[::-1], key, draws=500, seed=3) == result
    assert analyse(votes, key, draws=500, seed=4) != result
    items = {
        name: item.model_copy(update={"base": item.patched, "patched": item.base}) for name, item in key.items.items()
    }
    mirrored = analyse(votes, key.model_copy(update={"items": items}), draws=500, seed=3).questions[0]
    quality = result.questions[0]
    assert mirrored.base == quality.patched and mirrored.left == quality.left
    assert mirrored.preference.low == pytest.approx(1 - quality.preference.high)


def test_raters_who_favour_a_side_or_sign_twice_are_pointed_out(made):
    key = made[4]
    lefts = cast(key, [("pb" * 25), ("bp" * 25)])  # always the left image
    result = analyse([replace(vote, rater="Anna") for vote in lefts], key, draws=500)
    assert result.questions[0].left.value == 1 and result.questions[0].preference.value == 0.5
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
    with pytest.raises(InputError, match="the key has no pair 0000000000000000"):
        analyse([*votes, replace(votes[0], item="0" * 16)], key)


def test_the_table_shows_rates_intervals_and_verdicts(made):
    key = made[4]
    answers = ["p" * 40 + "b" * 10] * 5
    result = analyse(cast(key, answers) + cast(key, ["bp" * 25] * 5, "alignment"), key, draws=500)
    text = render(result)
    quality = result.questions[0]
    assert f"80.0% [{100 * quality.preference.low:.1f}, {100 * quality.preference.high:.1f}]" in text
    assert "500 votes by 5 raters on 50 of 60 pairs" in text and HASH[:12] in text
    assert "image quality: patched preferred (" in text and f"prompt alignment: {NO_DIFFERENCE} (" in text
    assert "500 bootstrap draws over raters and pairs" in text


def test_from_the_images_to_the_verdict(tmp_path):
    study, page, key = build(tmp_path, draw_pairs(tmp_path / "images", 12))
    shown = json.loads(Elements(page).scripts["study"])
    paths = []
    for number in range(4):  # four raters who like the patched image better and do not mind the text
        data = {
            "schema_version": 1,
            "study": shown["study"],
            "session": secrets.token_hex(16),
            "rater": "",
            "votes": [],
        }
        for pair in shown["pairs"]:
            left, right = pair["images"] if number % 2 else pair["images"][::-1]
            sees = {"item": pair["item"], "left": left, "right": right}
            better = "left" if key.items[pair["item"]].patched == left else "right"
            data["votes"].append({**sees, "question": "quality", "choice": better, "ms": 1200})
            data["votes"].append({**sees, "question": "alignment", "choice": "same", "ms": 800})
        paths.append(write(tmp_path, data, f"votes-{study.id}-{number}.json"))
    quality, alignment = analyse(read_votes(paths, key), key, draws=300).questions
    assert quality.verdict == "patched preferred" and quality.preference.value == 1 and quality.left.value == 0.5
    assert alignment.verdict == NO_DIFFERENCE and alignment.no_difference.value == 1
