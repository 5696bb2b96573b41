"""The page of a blind study: one HTML file that holds every image, asks nothing of a network, and names no side."""

import base64
import hashlib
import io
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.artifact.manifest import json_text
from surgery.artifact.staging import unwritten
from surgery.console import progress_bar
from surgery.errors import InputError
from surgery.hub.bounded import open_image

from .key import SCHEMA_VERSION, Key, numbered_item, token
from .sources import Exhibit

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Study:
    """What write_study wrote. identical: items of which two images are equal pixel for pixel: no vote can tell them."""

    id: str
    sides: tuple[str, ...]
    models: dict[str, str]
    page: Path
    key: Path
    items: int
    page_bytes: int
    identical: int

    def to_json(self) -> dict[str, Any]:
        """The summary as plain data."""
        return {"schema_version": 2, **asdict(self), "page": str(self.page), "key": str(self.key)}


def write_study(
    exhibits: Iterable[Exhibit],
    page: str | Path,
    key: str | Path,
    *,
    models: Mapping[str, str],
    title: str,
    seed: int = 0,
) -> Study:
    """Write the page that raters vote on and the key that stays away from them; return the Study.

    exhibits: each model, prompt and seed with the same sides once. models: {model: where its images come from}. page:
    an HTML file, which may be sent to anybody and works from file://. key: a JSON file; whoever has it, and only they,
    can tell which image is whose. title: what raters read above it.

    Every id comes from `seed` and a salt that is drawn anew and stands in the key alone. Items and images stand in the
    page in the order of their ids, which is a shuffle; the page shuffles both again for each rater. Images are encoded
    anew from their pixels, so that nothing that a file says about itself gets into the page.

    Raises InputError where an image cannot be read, is not RGB, or differs in size from its partners; where a model's
    prompt and seed come twice; and where the key's file exists, since the votes of an earlier study may hang on it.
    """
    exhibits, page, key = list(exhibits), Path(page), Path(key)
    _check(exhibits, page, key)
    content, sources = _shuffled(exhibits, dict(models), title, seed)
    partials = [path.with_name(f".{path.name}.partial") for path in (page, key)]
    try:
        for path in (page, key):
            path.parent.mkdir(parents=True, exist_ok=True)
        pixels = _write_page(partials[0], content, sources)
        partials[1].write_text(json_text(content.model_dump()), encoding="utf-8")
        os.replace(partials[1], key)  # first: a page without its key would gather votes that nobody can read
        os.replace(partials[0], page)
    except OSError as error:
        raise unwritten(f"the study to {page} and {key}", error, "make room and run it again") from error
    finally:
        for path in partials:
            with suppress(OSError):  # it lies under what is no folder
                path.unlink(missing_ok=True)
    seen = [[pixels[image] for image in item.shown] for item in content.items.values()]
    return Study(
        id=content.study,
        sides=tuple(content.sides),
        models=content.models,
        page=page,
        key=key,
        items=len(exhibits),
        page_bytes=page.stat().st_size,
        identical=sum(len(set(images)) < len(images) for images in seen),
    )


def _check(exhibits, page, key):
    """Refuse what would make no study before anything is written."""
    if not exhibits:
        raise InputError("a study needs at least one pair of images")
    if page.resolve() == key.resolve():
        raise InputError(f"page and key are both {page}; the key must be a file of its own, away from the raters")
    if page.is_dir():
        raise InputError(f"{page} is a folder; name a file in it for the page, as study.html")
    if key.exists():
        raise InputError(
            f"{key} exists, and votes on an earlier page may need it; write another page (--out), or delete that key"
        )
    seen = set()
    for exhibit in exhibits:
        what = (exhibit.model, exhibit.prompt, exhibit.seed)
        if what in seen:
            raise InputError(f"the prompt {exhibit.prompt!r} comes twice with seed {exhibit.seed}; give each pair once")
        seen.add(what)
        (first, size), *others = [(path, _size(path)) for path in exhibit.images.values()]
        for path, other in others:
            if other != size:
                raise InputError(
                    f"{first} has {size[0]}x{size[1]} pixels and {path} {other[0]}x{other[1]}, which would tell the "
                    "sides apart; draw all at the same size"
                )


def _size(path):
    with _opened(path) as image:
        return image.size


def _shuffled(exhibits, models, title, seed):
    """(Key, {image id: file}), each in the order of its random ids."""
    salt = secrets.token_hex(16)
    items, sources = {}, {}
    for number, exhibit in enumerate(exhibits):
        about = {"prompt": exhibit.prompt, "seed": exhibit.seed, "model": exhibit.model}
        name, item = numbered_item(salt, seed, number, exhibit.images, **about)
        items[name] = item
        sources |= {image: exhibit.images[side] for side, image in item.images.items()}
    key = Key(
        schema_version=SCHEMA_VERSION,
        study=token(salt, seed, "study"),
        title=title,
        salt=salt,
        seed=seed,
        sides=list(dict.fromkeys(side for exhibit in exhibits for side in exhibit.images)),
        models=models,
        items=dict(sorted(items.items())),
    )
    return key, dict(sorted(sources.items()))


def _write_page(path, key, sources):
    """Fill the template; {image id: sha256 of its pixels}. One image at a time is in memory."""
    from jinja2 import Environment, PackageLoader

    loader = PackageLoader("surgery.analysis.study", ".")
    environment = Environment(loader=loader, autoescape=True)
    source = loader.get_source(environment, "page.html")[0]
    shown = [{"item": name, "prompt": item.prompt, "images": item.shown} for name, item in key.items.items()]
    study = {"study": key.study, "title": key.title, "items": shown}
    pixels = {}

    def encoded() -> Iterator[tuple[str, str]]:
        for image, file in sources.items():
            png, pixels[image] = _encoded(file)
            yield image, f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
            advance(1)

    with (
        path.open("w", encoding="utf-8", newline="\n") as file,
        progress_bar("page", len(sources), "images") as advance,
    ):
        filled = environment.get_template("page.html").generate(
            policy=_policy(source), title=key.title, study=study, images=encoded()
        )
        file.writelines(filled)
    return pixels


def _policy(template):
    """The Content-Security-Policy: the template's own script and style by their hashes, data URIs, and nothing else."""
    digests = {}
    for tag in ("script", "style"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
        digests[tag] = base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
    return (
        f"default-src 'none'; script-src 'sha256-{digests['script']}'; style-src 'sha256-{digests['style']}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _encoded(path):
    """(PNG, sha256 of the pixels) of an image file: its pixels alone, no text, no profile, no time."""
    from PIL import Image

    with _opened(path) as image:
        size, pixels = image.size, image.tobytes()
    buffer = io.BytesIO()
    Image.frombytes("RGB", size, pixels).save(buffer, format="PNG")
    return buffer.getvalue(), hashlib.sha256(pixels).hexdigest()


@contextmanager
def _opened(path: Path) -> "Iterator[Image]":
    """The PIL image of a file, its header read and no more; InputError for whatever is wrong with it."""
    try:
        with open_image(path) as image:
            if image.mode != "RGB":
                raise InputError(f"{path} has mode {image.mode}, not RGB; save it as RGB, as pipelines draw images")
            yield image
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"the image {path} cannot be read: {reason}; draw it again") from error
