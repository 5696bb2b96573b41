"""What others wrote is read within bounds: no device, no pipe, no bomb of brackets or pixels, no name too long."""

import os
import struct
import time
import zlib

import pytest
import yaml

from surgery.errors import ArtifactError, BaseError, InputError, RecipeError, SurgeryError
from surgery.export.publish.content import read_pictures
from surgery.hub import bounded
from surgery.hub.base import LocalBase
from surgery.recipe.reading import read_recipe
from surgery.validate.prompts import open_prompts
from surgery.validate.reference import open_reference
from surgery.validate.store import is_flagged, read_image

LONG, FAR = "x" * 300, "y/" * 2500


def png(width, height):
    """The PNG of an image as large as it says, whose pixels are not there."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


@pytest.fixture(params=["device", "pipe", "link to a device", "link to a pipe", "folder"])
def no_file(request, tmp_path):
    """no_file(name): a path of that name where something other than a plain file lies."""

    def make(name):
        path = tmp_path / name
        if request.param == "folder":
            path.mkdir()
        elif "device" in request.param:
            path.symlink_to("/dev/zero")
        elif request.param == "pipe":
            os.mkfifo(path)
        else:
            os.mkfifo(tmp_path / "pipe")
            path.symlink_to(tmp_path / "pipe")
        return path

    return make


@pytest.mark.parametrize("name", ["x.yaml", "x.txt", "x.json", "x.npz"])
def test_what_is_no_file_is_refused_at_once(no_file, name):
    path = no_file(name)
    read = {".yaml": read_recipe, ".npz": open_reference}.get(path.suffix, open_prompts)
    with pytest.raises(InputError, match=name):
        read(path)
    with pytest.raises((OSError, ValueError)):
        bounded.read_bytes(path)


def test_a_file_that_is_longer_than_it_may_be_is_not_read(tmp_path):
    (tmp_path / "x").write_bytes(b"12345")
    assert bounded.read_bytes(tmp_path / "x", 5) == b"12345"
    with pytest.raises(ValueError, match="larger than 4 bytes"):
        bounded.read_bytes(tmp_path / "x", 4)


@pytest.mark.parametrize("text", ["[" * 8000, "{a: " * 2000, "- " * 4000, "? " * 4000, "a: &x 1\nb: *x"])
def test_yaml_that_would_take_seconds_is_refused_at_once(text):
    started = time.process_time()
    with pytest.raises(yaml.YAMLError):
        bounded.parse_yaml(text)
    assert time.process_time() - started < 2


@pytest.mark.parametrize("text", ["[" * 8000, "[" * 60 + "]" * 60, '{"a":' * 60 + "1" + "}" * 60, '"\\ud800"'])
def test_json_that_is_too_deep_or_holds_half_a_character_is_refused(text):
    with pytest.raises(ValueError):
        bounded.parse_json(text)
    with pytest.raises(ValueError, match="more than 50 levels"):
        bounded.parse_json("[" * 51 + "]" * 51)
    assert bounded.parse_json("[" * 50 + "]" * 50) and bounded.parse_json('"\\ud83d\\ude00"') == "😀"


def test_files_are_listed_eight_folders_deep_and_no_deeper(tmp_path):
    for depth in (0, 1, 8, 9):
        folder = tmp_path.joinpath(*["x"] * depth)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "f").write_text("")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "f").write_text("")
    assert list(bounded.files_below(tmp_path)) == ["f", "x/f", f"{'x/' * 8}f"]


def test_a_recipe_of_thousands_of_operations_is_refused_and_one_of_hundreds_is_not(tmp_path):
    path = tmp_path / "r.yaml"
    head = "schema: 1\nname: r\nbase: {pipeline: a/b}\noperations:\n"
    one = "- {replace: cross-attention, with: {operator: sparse}}\n"
    path.write_text(head + one * 300)
    assert len(read_recipe(path).recipe.operations) == 300
    for count, match in ((1100, "at most 1000"), (15_000, "larger than")):
        path.write_text(head + one * count)
        with pytest.raises(RecipeError, match=match):
            read_recipe(path)
    path.write_text(head + f"- {{replace: cross-attention, layers: '{'[' * 8000}', with: {{operator: sparse}}}}\n")
    with pytest.raises(RecipeError, match="at most 300 characters"):
        read_recipe(path)


def test_half_a_character_is_no_recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text('summary: "\\ud800"\n')
    with pytest.raises(RecipeError, match="surrogates"):
        read_recipe(path)
    with pytest.raises(RecipeError, match="not UTF-8"):
        read_recipe("shapes", ["summary=\udcff"])


def test_a_folder_of_too_many_files_is_no_base(tmp_path, monkeypatch):
    for name in "abc":
        (tmp_path / name).write_text("")
    assert len(LocalBase(tmp_path).files) == 3
    (tmp_path / "loop").symlink_to(tmp_path)
    assert set(LocalBase(tmp_path).files) > set("abc")
    monkeypatch.setattr(bounded, "_MOST_FILES", 20)
    with pytest.raises(BaseError, match="holds more than 20 files"):
        LocalBase(tmp_path)


@pytest.mark.parametrize("name", [LONG, FAR, "\0"], ids=["long", "far", "zero"])
def test_names_that_no_file_can_have_are_refused_in_words(tmp_path, name):
    import surgery
    from surgery.models.inspecting import inspect_model

    for act in (
        lambda: surgery.apply(f"{name}.yaml"),
        lambda: surgery.apply("shapes", tmp_path / name),
        lambda: surgery.load(f"./{name}"),
        lambda: surgery.verify(f"./{name}"),
        lambda: inspect_model(f"./{name}"),
        lambda: open_prompts(f"{name}.txt"),
        lambda: surgery.apply("shapes", tmp_path / "out", overrides=[f"base.pipeline=./{name}"]),
    ):
        with pytest.raises(SurgeryError):
            act()


def test_images_that_claim_too_many_pixels_are_not_decoded(tmp_path):
    (tmp_path / "images").mkdir()
    for width, height in ((12_000, 12_000), (60_000, 60_000)):
        bomb = tmp_path / "images/bomb.png"
        bomb.write_bytes(png(width, height))
        assert not is_flagged(bomb)
        with pytest.raises(ArtifactError, match="was drawn elsewhere"):
            read_pictures(tmp_path, "0" * 64)
        (tmp_path / "images/other.png").write_bytes(png(8, 8))
        with pytest.raises(InputError, match=r"bomb\.png cannot be read"):
            open_reference(tmp_path / "images")
        with pytest.raises(SurgeryError, match=r"bomb\.png is damaged"):
            read_image(bomb)
