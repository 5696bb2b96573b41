"""Files that clients upload: what is read, what is refused before anything is decoded, and in which words."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from surgery.export.serve.refusal import Refusal
from surgery.export.serve.uploads import image_size

LARGEST = 100 * 100


def saved(image, form, **options):
    """The bytes of a file."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def raw_png(width, height, depth, kind, rows, more=b""):
    """A PNG file written by hand."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + more + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


RED = Image.new("RGB", (64, 48), (200, 10, 10))
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8))


@pytest.mark.parametrize(
    "content",
    [
        saved(RED, "PNG"),
        saved(RED.convert("P"), "PNG"),
        saved(RED.convert("1"), "PNG"),
        saved(RED.convert("CMYK"), "JPEG"),
        saved(RED.convert("L"), "JPEG"),
        saved(RED, "MPO", save_all=True, append_images=[NOISE]),
        saved(RED, "WEBP"),
        saved(Image.fromarray(np.full((48, 64), 40000, np.uint16)), "PNG"),
        raw_png(64, 48, 16, 2, b"\0" + bytes(64 * 6) + (b"\0" + bytes(64 * 6)) * 47),
    ],
    ids=["png", "palette", "bits", "cmyk", "grey jpeg", "camera", "webp", "16-bit grey", "48-bit"],
)
def test_what_people_have_is_read(content):
    assert image_size(content, "image", LARGEST) == (64, 48)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (saved(RED, "TIFF"), "a PNG, JPEG or WEBP file, not TIFF: convert it"),
        (saved(RED, "GIF"), "not GIF: convert it"),
        (saved(RED, "BMP"), "not BMP: convert it"),
        (b"\0\0\0\x18ftypheic" + bytes(100), "not HEIC: convert it"),
        (b"<?xml version='1.0'?><svg/>", "not SVG: convert it"),
        (saved(RED, "PNG", save_all=True, append_images=[NOISE]), "animated, with 2 frames"),
        (saved(RED, "WEBP", save_all=True, append_images=[NOISE]), "animated, with 2 frames"),
        (saved(NOISE, "PNG")[:3000], "cannot be read: .*truncated"),
        (saved(NOISE, "JPEG")[:900], "cannot be read: .*truncated"),
        (b"", "must be a PNG, JPEG or WEBP file$"),
        (b"\x89PNG\r\n\x1a\n", "must be a PNG"),
        (raw_png(60000, 60000, 1, 0, b""), "could be decompression bomb"),
        (raw_png(101, 100, 1, 0, b"\0" * 1400), "at most 10000 pixels, not 101x100"),
    ],
)
def test_what_is_not_is_refused_in_words_that_say_what_to_do(content, words):
    with pytest.raises(Refusal, match=f"^image .*{words}"):
        image_size(content, "image", LARGEST)


def test_a_mask_has_to_say_where_it_is_clear():
    clear = Image.new("RGBA", (64, 48))
    for content in (saved(clear, "PNG"), saved(clear.convert("LA"), "PNG"), saved(clear, "WEBP")):
        assert image_size(content, "mask", LARGEST) == (64, 48)
    for content in (saved(RED, "PNG"), saved(RED, "JPEG")):
        with pytest.raises(Refusal, match="^mask must have an alpha channel"):
            image_size(content, "mask", LARGEST)
