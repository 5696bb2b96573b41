"""multipart/form-data, as clients send images: read in memory, whose size the caller has bounded."""

import io
import re
from dataclasses import dataclass
from email.parser import HeaderParser
from typing import Any

from surgery.hub.bounded import pillow_errors, upright

from .refusal import Refusal, wrong

_BOUNDARY = re.compile(r'boundary="?([^";,\s]{1,200})"?', re.IGNORECASE)
_FORMATS = ("PNG", "JPEG", "WEBP")
_OTHERS = {  # by how files of what cameras and drawing programs save begin; told, and never read
    "TIFF": re.compile(rb"II\*\0|MM\0\*"),
    "GIF": re.compile(rb"GIF8"),
    "BMP": re.compile(rb"BM"),
    "HEIC": re.compile(rb".{4}ftyp(hei|hev|mif1|msf1)", re.DOTALL),
    "AVIF": re.compile(rb".{4}ftypavi", re.DOTALL),
    "SVG": re.compile(rb"\s*<(\?xml|svg)"),
}


@dataclass(frozen=True)
class Form:
    """The fields of a form, by name: those of text, and files as bytes. A name that came twice is refused."""

    fields: dict[str, Any]
    files: dict[str, bytes]


def read_form(body: bytes, content_type: str) -> Form:
    """The Form in a multipart/form-data body; Refusal where it is none. `image[]` is read as `image`."""
    found = _BOUNDARY.search(content_type)
    if not found:
        raise Refusal(400, "the Content-Type of a form must name its boundary", "invalid_form")
    line = b"\r\n--" + found[1].encode("latin-1", "replace")
    first, *parts = (b"\r\n" + body).split(line)
    if first.strip() or not parts or not parts[-1].startswith(b"--"):
        raise Refusal(400, "the form is cut short, or its parts are not divided by its boundary", "invalid_form")
    form = Form({}, {})
    for part in parts[:-1]:
        head, divided, content = part.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        headers = HeaderParser().parsestr(head.decode("utf-8", "replace"))
        name = headers.get_param("name", header="content-disposition")
        if not divided or not isinstance(name, str):
            raise Refusal(400, "a part of the form has no name", "invalid_form")
        name, _, key = name.removesuffix("[]").removesuffix("]").partition("[")
        before = form.files.get(name, form.fields.get(name))
        if before is not None and not (key and isinstance(before, dict)):
            raise wrong(name[:60], "is given twice; one is taken here")
        if key:  # pladis[scale], as clients write an object
            form.fields.setdefault(name, {})[key] = content.decode("utf-8", "replace")
            continue
        if headers.get_param("filename", header="content-disposition") is not None:
            form.files[name] = content
        else:
            form.fields[name] = content.decode("utf-8", "replace")
    return form


def image_size(content: bytes, name: str, largest: int) -> tuple[int, int]:
    """(width, height) of an uploaded PNG, JPEG or WebP file, all of which can be read; Refusal by `name` otherwise.

    largest: pixels that it may have.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            size = image.size
            if size[0] * size[1] > largest:
                raise wrong(name, f"must have at most {largest} pixels, not {size[0]}x{size[1]}")
            if name == "mask" and "A" not in image.getbands() and "transparency" not in image.info:
                raise wrong("mask", "must have an alpha channel: what is transparent is drawn anew")
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format != "MPO":  # a camera's JPEG, with previews of itself
                raise wrong(name, f"must be one image; it is animated, with {frames} frames")
            size = upright(image).size
    except Image.UnidentifiedImageError as error:
        found = next((kind for kind, begin in _OTHERS.items() if begin.match(content)), None)
        what = f", not {found}: convert it" if found else ""
        raise wrong(name, f"must be a {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]} file{what}") from error
    except (OSError, ValueError, *pillow_errors()) as error:
        raise wrong(name, f"cannot be read: {str(error)[:200]}") from error
    return size
