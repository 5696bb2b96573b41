"""The blind study's page and key: nothing in the page tells which image is whose."""

import base64
import hashlib
import io
import json
import re
import secrets
import struct
from importlib.resources import files

import pytest
from PIL import Image

from surgery.analysis.study import read_key, write_study
from surgery.analysis.study.votes import QUESTIONS, VoteLine, VotesFile
from surgery.errors import InputError

from .study_files import HASH, HOSTILE, Elements, build, draw, draw_exhibits, with_images, without_images


def test_the_page_holds_the_pixels_of_every_image_and_no_other_byte_of_its_file(made):
    _, pairs, study, page, key = made
    scripts = Elements(page).scripts
    by_seed = {item.seed: item for item in key.items.values()}
    assert study.items == len(by_seed) == 60 and study.identical == 0
    for pair in pairs:
        for side in ("base", "patched"):
            kind, _, data = scripts[by_seed[pair.seed].images[side]].partition(",")
            png = base64.b64decode(data, validate=True)
            assert kind == "data:image/png;base64"
            with Image.open(io.BytesIO(png)) as shown, Image.open(pair.images[side]) as drawn:
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
    assert set(shown) == {"study", "title", "items"} and shown["study"] == key.study == study.id
    assert all(set(pair) == {"item", "prompt", "images"} for pair in shown["items"])


def test_order_in_the_page_says_nothing_of_sides_or_of_the_order_of_drawing(made):
    _, pairs, _, page, key = made
    shown = json.loads(Elements(page).scripts["study"])["items"]
    firsts = [key.items[pair["item"]].side_of(pair["images"][0]) for pair in shown]
    assert 10 <= firsts.count("base") <= 50  # of 60; a fair coin leaves this once in ten million pages
    for pair in shown:
        item = key.items[pair["item"]]
        assert pair["images"] == list(item.shown) == sorted(item.images.values())
    seeds = [key.items[pair["item"]].seed for pair in shown]
    assert sorted(seeds) == [pair.seed for pair in pairs] != seeds
    images = re.findall(r'<script type="text/plain" id="([0-9a-f]{16})">', page)
    assert images == sorted(image for item in key.items.values() for image in item.shown)


def test_with_the_sides_swapped_the_page_differs_in_its_images_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(secrets, "token_hex", lambda count: "5" * 2 * count)
    pairs = draw_exhibits(tmp_path / "images", 4)
    swapped = [with_images(pair, base=pair.images["patched"], patched=pair.images["base"]) for pair in pairs]
    _, page, key = build(tmp_path, pairs)
    _, other, other_key = build(tmp_path, swapped, "swapped")
    assert key == other_key and page != other and without_images(page) == without_images(other)


def test_ids_need_the_salt_and_change_with_the_seed(tmp_path, monkeypatch):
    pairs = draw_exhibits(tmp_path / "images", 2)
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
    plain = build(tmp_path, draw_exhibits(tmp_path / "images", 2))[1]
    hostile = build(tmp_path, draw_exhibits(tmp_path / "images", 2, (HOSTILE,)), "hostile", title=HOSTILE)[1]
    elements = Elements(hostile)
    assert [tag for tag, _ in elements.tags] == [tag for tag, _ in Elements(plain).tags]
    study = json.loads(elements.scripts["study"])
    assert study["title"] == HOSTILE and {pair["prompt"] for pair in study["items"]} == {HOSTILE}
    assert "<" not in elements.scripts["study"]
    assert ".innerHTML" not in hostile and "insertAdjacentHTML" not in hostile  # the script shows them as text


def test_the_page_can_be_used_by_keyboard_and_says_how():
    template = files("surgery.analysis.study").joinpath("page.html").read_text(encoding="utf-8")
    buttons = [attributes for tag, attributes in Elements(template).tags if tag == "button"]
    choices = {each["data-choice"]: each for each in buttons if "data-choice" in each}
    assert set(choices) == {"0", "1", "2", "same"} and all(each["aria-label"] for each in choices.values())
    assert all(each["type"] in ("button", "submit") for each in buttons)
    table = re.search(r"const KEYS = \{(.*?)\};", template, re.DOTALL)[1]
    keys = dict(re.findall(r'(\w+): "(\w+)"', table))
    shown = re.search(r'<p class="keys">(.*?)</p>', template, re.DOTALL)[1]
    named = {"arrowleft": "←", "arrowup": "↑", "arrowdown": "↓", "arrowright": "→"}
    assert set(keys.values()) == set(choices)
    assert all(f"<kbd>{named.get(key, key.upper())}</kbd>" in shown for key in keys)
    assert "<kbd>Backspace</kbd>" in shown and 'event.key === "Backspace"' in template


def test_the_page_writes_what_read_votes_reads():
    template = files("surgery.analysis.study").joinpath("page.html").read_text(encoding="utf-8")
    vote = re.search(r"session\.votes\.push\(\{(.*?)\}\)", template)[1]
    file = re.search(r"JSON\.stringify\(\{(.*?)\}, null", template)[1]
    assert [part.split(":")[0].strip() for part in vote.split(",")] == list(VoteLine.model_fields)
    assert [part.split(":")[0].strip() for part in file.split(",")] == list(VotesFile.model_fields)
    assert tuple(re.findall(r'\{ id: "(\w+)", text:', template)) == QUESTIONS
    assert re.search(r'id="rater" maxlength="40"', template)


def test_identical_images_are_counted(tmp_path):
    pairs = draw_exhibits(tmp_path / "images", 3)
    study, _, _ = build(tmp_path, [pairs[0], with_images(pairs[1], patched=pairs[1].images["base"]), pairs[2]])
    assert study.identical == 1
    assert json.loads(json.dumps(study.to_json()))["page_bytes"] == (tmp_path / "study.html").stat().st_size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pairs, folder: [], "at least one pair"),
        (lambda pairs, folder: [*pairs, pairs[0]], "comes twice with seed 1000"),
        (
            lambda pairs, folder: [with_images(pairs[0], base=draw(folder / "large.png", 0, (9, 6)))],
            "large.png has 9x6 pixels and .*0-patched.png 8x6",
        ),
        (
            lambda pairs, folder: [with_images(pairs[0], patched=draw(folder / "clear.png", 0, mode="RGBA"))],
            "clear.png has mode RGBA, not RGB",
        ),
        (lambda pairs, folder: [with_images(pairs[0], base=folder / "none.png")], "none.png cannot be read: No such"),
        (
            lambda pairs, folder: [pairs[0], with_images(pairs[1], base=broken(pairs[1].images["base"]))],
            "cannot be read: .*draw it",
        ),
    ],
)
def test_what_makes_no_study_is_refused_and_leaves_no_file(tmp_path, change, message):
    pairs = change(draw_exhibits(tmp_path / "images", 2), tmp_path / "images")
    out = tmp_path / "out"
    with pytest.raises(InputError, match=message):
        write_study(pairs, out / "page.html", out / "key.json", models={"": HASH}, title="t")
    assert not out.exists() or not list(out.iterdir())


def broken(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - 60])  # the header is whole, the pixels are not
    return path


def test_places_that_cannot_be_written_are_named(tmp_path):
    pairs = draw_exhibits(tmp_path / "images", 1)
    with pytest.raises(InputError, match="images is a folder"):
        write_study(pairs, tmp_path / "images", tmp_path / "key.json", models={"": HASH}, title="t")
    under = pairs[0].images["base"] / "page.html"
    with pytest.raises(InputError, match="cannot write the study to .*0-base.png/page.html and .*key.json"):
        write_study(pairs, under, tmp_path / "key.json", models={"": HASH}, title="t")
    assert not (tmp_path / "key.json").exists()


def test_an_old_key_is_never_overwritten_and_the_key_is_a_file_of_its_own(tmp_path):
    pairs = draw_exhibits(tmp_path / "images", 1)
    build(tmp_path, pairs)
    before = {path: path.read_bytes() for path in tmp_path.glob("study*")}
    with pytest.raises(InputError, match=r"study-key\.json exists, and votes on an earlier page may need it"):
        build(tmp_path, pairs)
    assert before == {path: path.read_bytes() for path in tmp_path.glob("study*")}
    with pytest.raises(InputError, match="must be a file of its own"):
        write_study(pairs, tmp_path / "x", tmp_path / "images" / ".." / "x", models={"": HASH}, title="t")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data | {"schema_version": 3}, "schema_version 3; .*update"),
        (lambda data: data | {"more": 1}, "no key of a study: more: extra"),
        (lambda data: data | {"items": {}}, "no key of a study: items"),
        (lambda data: data | {"sides": ["base", "other"]}, "is of a model or side that it does not list"),
        (lambda data: data | {"schema_version": 1}, "no key of a study: models.: input should be"),
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
