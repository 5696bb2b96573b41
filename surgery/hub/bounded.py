"""Files that somebody else wrote, read within bounds: plain files alone, no larger and no deeper than they may be.

Everything raises ValueError or OSError, in words; who knows what the file is for names it and says what to do. A
device or a pipe under a file's name would otherwise never end, and a kilobyte of brackets takes a parser seconds.
"""

import io
import json
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import yaml
    from PIL import Image

TEXT = 1 << 24  # bytes of a manifest, a config, a list of prompts
IMAGE = 1 << 28
VIDEO = 1 << 32
PIXELS = 1 << 27  # of a grid of images: 11,585 squared
DEEPEST = 50  # levels of lists and mappings
_ORIENTATION = 0x0112  # the tag of EXIF
_MOST_FILES = 100_000  # of a folder; a pipeline has some dozens
_DEEPEST_FOLDER = 8


def open_file(path: str | os.PathLike) -> BinaryIO:
    """A binary file object of a plain file."""
    # Opening a pipe waits for somebody to write into it, unless it is told not to.
    file = os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError("it is a device or a pipe, no file")
    return file


def read_bytes(path: str | os.PathLike, largest: int = TEXT) -> bytes:
    """The content of a plain file of at most `largest` bytes."""
    with open_file(path) as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise ValueError(f"it is larger than {largest} bytes")
    return data


def read_text(path: str | os.PathLike, largest: int = TEXT) -> str:
    """The text of a plain file in UTF-8, with or without a byte order mark."""
    return read_bytes(path, largest).decode("utf-8-sig")


def read_json(path: str | os.PathLike, largest: int = TEXT) -> dict:
    """The mapping in a JSON file."""
    data = parse_json(read_text(path, largest))
    if not isinstance(data, dict):
        raise ValueError("it holds no mapping of keys")
    return data


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text; what is nested too deeply or holds half a character is refused."""
    try:
        data = json.loads(text)
        if _depth(data) <= DEEPEST:
            json.dumps(data, ensure_ascii=False).encode("utf-8")
            return data
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"it holds half a character (a lone surrogate, {half!r}); write it whole") from None
    except RecursionError:
        pass
    raise ValueError(f"it has more than {DEEPEST} levels of brackets")


def _depth(data):
    level, depth = [data] if isinstance(data, (dict, list)) else [], 0
    while level and depth <= DEEPEST:
        level = [part for one in level for part in (one.values() if isinstance(one, dict) else one)]
        level, depth = [part for part in level if isinstance(part, (dict, list))], depth + 1
    return depth


def compose_yaml(text: str) -> "yaml.Node | None":
    """The node of a YAML text, None of an empty one; also raises yaml.YAMLError. Aliases are refused.

    They let a small file grow without bound.
    """
    import yaml
    from yaml.composer import ComposerError

    def refuse(what, mark):
        raise ComposerError(None, None, what, mark)

    class Loader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent, index):
            mark = self.peek_event().start_mark
            if self.check_event(yaml.AliasEvent):
                refuse("aliases (*name) are not allowed; write the value out", mark)
            self.depth += 1
            if self.depth > DEEPEST:
                refuse(f"more than {DEEPEST} levels of nesting", mark)
            node = super().compose_node(parent, index)
            if isinstance(node, yaml.ScalarNode):
                node.value.encode("utf-8")  # half a character can be written by its number
            self.depth -= 1
            return node

    return Loader(text).get_single_node()


def parse_yaml(text: str) -> Any:
    """The value of a YAML text; raises ValueError and yaml.YAMLError."""
    import yaml

    node = compose_yaml(text)
    return None if node is None else yaml.constructor.SafeConstructor().construct_document(node)


@contextmanager
def open_image(path: str | os.PathLike, largest: int = IMAGE) -> Iterator["Image.Image"]:
    """The PIL image in a plain file, its head read and no pixel yet; none with more of them than fit in memory.

    What Pillow raises while the pixels are read within the block becomes ValueError too.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(read_bytes(path, largest))) as image:
            if image.width * image.height > PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are too many")
            yield image
    except Image.UnidentifiedImageError as error:
        raise ValueError("it is no image") from error
    except pillow_errors() as error:
        raise ValueError(str(error)) from error


def pillow_errors() -> tuple[type[Exception], ...]:
    """What Pillow raises beside OSError and ValueError for a file that is damaged."""
    from PIL import Image

    return (SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def upright(image: "Image.Image") -> "Image.Image":
    """A PIL image turned as its EXIF data say; they are not written anew, at which Pillow fails where they are damaged.

    Raises what Pillow does where the image cannot be read.
    """
    from PIL.Image import Transpose

    image.load()
    turns = (
        Transpose.FLIP_LEFT_RIGHT,
        Transpose.ROTATE_180,
        Transpose.FLIP_TOP_BOTTOM,
        Transpose.TRANSPOSE,
        Transpose.ROTATE_270,
        Transpose.TRANSVERSE,
        Transpose.ROTATE_90,
    )
    turn = dict(enumerate(turns, 2)).get(image.getexif().get(_ORIENTATION, 1))
    return image if turn is None else image.transpose(turn)


def files_below(folder: str | os.PathLike) -> dict[str, os.stat_result]:
    """{path with slashes: os.stat_result} of the plain files in a folder and those in it, also through links.

    Without what lies in hidden folders, where git and the Hub's client keep what is theirs.
    """
    found, places = {}, [("", 0)]
    while places:
        below, depth = places.pop()
        with os.scandir(os.path.join(folder, below)) as entries:
            for entry in entries:
                path = f"{below}{entry.name}"
                try:
                    if entry.is_dir():
                        if depth < _DEEPEST_FOLDER and not entry.name.startswith("."):
                            places.append((f"{path}/", depth + 1))
                    elif entry.is_file():
                        found[path] = entry.stat()
                except OSError:  # a link that leads round in a circle
                    continue
                if len(found) + len(places) > _MOST_FILES:
                    raise ValueError(f"{folder} holds more than {_MOST_FILES} files, so it is no model's folder")
    return dict(sorted(found.items()))
