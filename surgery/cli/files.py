"""The pictures that verbs write: where to, whole or not at all, and with how they were drawn inside."""

import json
from pathlib import Path
from typing import Any

from surgery.artifact.staging import write_file
from surgery.errors import InputError


def file_path(given: str | None, usual: str, force: bool = False, suffixes: tuple[str, ...] = (".png",)) -> Path:
    """The path of the file to write: the one given, or the usual one, numbered where that is there.

    Raises InputError for one of another kind, a folder, and a given one that is there unless force.
    """
    out = Path(given or usual)
    if out.suffix.lower() not in suffixes:
        raise InputError(f"--out must name a {' or '.join(suffixes)} file, not {out}")
    if out.is_dir():
        raise InputError(f"--out {out} is a folder; name a {suffixes[0]} file in it")
    if given and out.exists() and not force:
        raise InputError(f"--out {out} is there already; name another, or replace it with --force")
    number, free = 1, out
    while not (given or force) and free.exists():
        number += 1
        free = out.with_stem(f"{out.stem}-{number}")
    return free


def save_png(image: Any, out: Path, record: dict[str, Any]) -> None:
    """Write a PNG that carries how it was drawn, so that a model card can show it with its prompts and its artifact."""
    from PIL.PngImagePlugin import PngInfo

    from surgery.runtime.sheet import png_of

    text = PngInfo()
    text.add_itxt("surgery", json.dumps(record, ensure_ascii=False))
    write(out, png_of(image, text))


def write(out: Path, data: bytes) -> None:
    """Write a file whole; InputError or SurgeryError where that cannot be."""
    write_file(out, data, "what was written before it is kept")
