"""The page of a blind study: one HTML file that holds every image, asks nothing of a network, and names no side."""

import base64
import csv
import hashlib
import html
import io
import json
import os
import random
import re
import secrets
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path

from surgery.artifact.manifest import json_text
from surgery.artifact.scores import SCORES
from surgery.console import progress_bar
from surgery.errors import InputError
from surgery.hub.bounded import open_image, read_json, read_text

from .key import SCHEMA_VERSION, Item, Key, token


@dataclass(frozen=True)
class Pair:
    """Image files of one prompt and seed, drawn by the untouched base and by the patched pipeline: RGB, of one size."""

    prompt: str
    seed: int
    base: Path
    patched: Path


@dataclass(frozen=True)
class Study:
    """What write_study wrote. identical: pairs whose images are equal pixel for pixel, on which no vote can tell."""

    id: str
    artifact_hash: str
    page: Path
    key: Path
    pairs: int
    page_bytes: int
    identical: int

    def to_json(self):
        """The summary as plain data."""
        return {"schema_version": 1, **asdict(self), "page": str(self.page), "key": str(self.key)}


def write_study(pairs, page, key, *, artifact_hash, title, seed=0):
    """Write the page that raters vote on and the key that stays away from them; return the Study.

    pairs: Pairs, each prompt and seed once. page: an HTML file, which may be sent to anybody and works from file://.
    key: a JSON file; whoever has it, and only they, can tell which image is whose. title: what raters read above it.

    Every id comes from `seed` and a salt that is drawn anew and stands in the key alone. Pairs and images stand in the
    page in the order of their ids, which is a shuffle; the page shuffles both again for each rater. Images are encoded
    anew from their pixels, so that nothing that a file says about itself gets into the page.

    Raises InputError where an image cannot be read, is not RGB, or differs in size from its partner; where a prompt and
    seed come twice; and where the key's file exists, since the votes of an earlier study may hang on it.
    """
    pairs, page, key = list(pairs), Path(page), Path(key)
    _check(pairs, page, key)
    content, sources = _shuffled(pairs, artifact_hash, title, seed)
    partials = [path.with_name(f".{path.name}.partial") for path in (page, key)]
    try:
        for path in (page, key):
            path.parent.mkdir(parents=True, exist_ok=True)
        pixels = _write_page(partials[0], content, sources)
        partials[1].write_text(json_text(content.model_dump()), encoding="utf-8")
        os.replace(partials[1], key)  # first: a page without its key would gather votes that nobody can read
        os.replace(partials[0], page)
    except OSError as error:
        raise InputError(f"cannot write the study to {page} and {key}: {error.strerror or error}") from error
    finally:
        for path in partials:
            with suppress(OSError):  # it lies under what is no folder
                path.unlink(missing_ok=True)
    return Study(
        id=content.study,
        artifact_hash=artifact_hash,
        page=page,
        key=key,
        pairs=len(pairs),
        page_bytes=page.stat().st_size,
        identical=sum(pixels[item.base] == pixels[item.patched] for item in content.items.values()),
    )


def _check(pairs, page, key):
    """Refuse what would make no study before anything is written."""
    if not pairs:
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
    for pair in pairs:
        if (pair.prompt, pair.seed) in seen:
            raise InputError(f"the prompt {pair.prompt!r} comes twice with seed {pair.seed}; give each pair once")
        seen.add((pair.prompt, pair.seed))
        with _opened(pair.base) as base, _opened(pair.patched) as patched:
            if base.size != patched.size:
                sizes = ["{}x{}".format(*image.size) for image in (base, patched)]
                raise InputError(
                    f"{pair.base} has {sizes[0]} pixels and {pair.patched} {sizes[1]}, which would tell the sides "
                    "apart; draw both at the same size"
                )


def _shuffled(pairs, artifact_hash, title, seed):
    """(Key, {image id: file}), each in the order of its random ids."""
    salt = secrets.token_hex(16)
    items, sources = {}, {}
    for number, pair in enumerate(pairs):
        base, patched = (token(salt, seed, "image", number, side) for side in ("base", "patched"))
        items[token(salt, seed, "item", number)] = Item(prompt=pair.prompt, seed=pair.seed, base=base, patched=patched)
        sources |= {base: pair.base, patched: pair.patched}
    key = Key(
        schema_version=SCHEMA_VERSION,
        study=token(salt, seed, "study"),
        artifact_hash=artifact_hash,
        title=title,
        salt=salt,
        seed=seed,
        items=dict(sorted(items.items())),
    )
    return key, dict(sorted(sources.items()))


def _write_page(path, key, sources):
    """Fill the template; {image id: sha256 of its pixels}. One image at a time is in memory."""
    template = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    pairs = [{"item": item, "prompt": pair.prompt, "images": pair.images} for item, pair in key.items.items()]
    study = json.dumps({"study": key.study, "title": key.title, "pairs": pairs})
    values = {
        "POLICY": _policy(template),
        "TITLE": html.escape(key.title),
        # In a script no entity is read, but `</script>` ends it and `<!--` changes how it ends.
        "STUDY": study.replace("<", "\\u003c"),
    }
    # Split first and fill once: a prompt or title that looks like a placeholder stays what it is.
    head, tail = (re.sub("@@([A-Z]+)@@", lambda match: values[match[1]], part) for part in template.split("@@IMAGES@@"))
    pixels = {}
    with (
        path.open("w", encoding="utf-8", newline="\n") as file,
        progress_bar("page", len(sources), "images") as advance,
    ):
        file.write(head)
        for image, source in sources.items():
            png, pixels[image] = _encoded(source)
            data = base64.b64encode(png).decode("ascii")
            file.write(f'<script type="text/plain" id="{image}">data:image/png;base64,{data}</script>\n')
            advance(1)
        file.write(tail)
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
def _opened(path):
    """The PIL image of a file, its header read and no more; InputError for whatever is wrong with it."""
    try:
        with open_image(path) as image:
            if image.mode != "RGB":
                raise InputError(f"{path} has mode {image.mode}, not RGB; save it as RGB, as pipelines draw images")
            yield image
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"the image {path} cannot be read: {reason}; draw it again") from error


def choose_pairs(folder, count, seed=0):
    """(Pairs, artifact hash) of a validation folder: `count` of its pairs, at most one of each prompt.

    Raises InputError where the folder holds no validation, its files are damaged, or it has no pair.
    """
    folder = Path(folder)
    table, scores = folder / "pairs.csv", folder / SCORES
    if count < 1:
        raise InputError(f"--pairs must be at least 1, not {count}")
    if not table.is_file() or not scores.is_file():
        raise InputError(f"{folder} holds no finished validation (pairs.csv, {SCORES}); run `surgery validate` first")
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(table), newline="")))
        pairs = [Pair(row["prompt"], int(row["seed"]), folder / row["base"], folder / row["patched"]) for row in rows]
        artifact_hash = read_json(scores)["artifact_hash"]
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise InputError(f"{table} or {scores} is damaged ({error}); run `surgery validate` again") from error
    chance = random.Random(seed)
    chance.shuffle(pairs)
    return list({pair.prompt: pair for pair in pairs}.values())[:count], artifact_hash
