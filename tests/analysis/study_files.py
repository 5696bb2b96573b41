"""Studies to test with: tiny pairs of images, the page that is made of them, votes as the page writes them."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from surgery.analysis.study import Exhibit, read_key, write_study

HASH = "ab" * 32
HOSTILE = (
    '</script><img src=x onerror=alert(1)><!--<script> & "quotes" \u2028 狐 '
    "{{ study }} {% raw %} {# {{ '' }} \\1 \\u003c"
)
NO_DIFFERENCE = "no difference that these votes can show"


def draw(path, seed, size=(8, 6), mode="RGB"):
    """A random image with a text chunk that names its file; an image is drawn from its seed."""
    pixels = numpy.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=numpy.uint8)
    text = PngInfo()
    text.add_itxt("surgery", json.dumps({"side": path.stem}))
    Image.fromarray(pixels).convert(mode).save(path, pnginfo=text, icc_profile=b"of " + path.stem.encode())
    return path


def draw_exhibits(folder, count, prompts=("a prompt",), sides=("base", "patched"), model=""):
    """Exhibits of random images, each drawn from a seed of its own."""
    folder.mkdir(exist_ok=True)
    return [
        Exhibit(
            prompts[number % len(prompts)],
            1000 + number,
            {
                side: draw(folder / f"{model}{number}-{side}.png", len(sides) * number + place)
                for place, side in enumerate(sides)
            },
            model,
        )
        for number in range(count)
    ]


def with_images(exhibit, **images):
    """An Exhibit with other files for some sides."""
    return replace(exhibit, images={**exhibit.images, **images})


def build(folder, exhibits, name="study", title="Which is better?", seed=0):
    page, key = folder / f"{name}.html", folder / f"{name}-key.json"
    models = {exhibit.model: HASH for exhibit in exhibits}
    study = write_study(exhibits, page, key, models=models, title=title, seed=seed)
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
