"""A base in a folder on this machine."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from surgery.console import progress_bar
from surgery.errors import BaseError, BaseNotFoundError

from .bounded import files_below, open_file, parse_yaml, read_json, read_text
from .listing import FileEntry, license_of


class LocalBase:
    """A diffusers folder. `files` maps relative paths to sizes; hashes are computed when an artifact is written."""

    kind = "local"
    commit = license = license_link = None

    def __init__(self, folder, name=None):
        self.folder = Path(folder)
        self.name = name or str(folder)
        if not os.path.isdir(self.folder):
            raise BaseNotFoundError(
                f"the base folder {str(self.folder)[:200]} is not there; check the name (base.pipeline in a recipe)"
            )
        try:
            found = files_below(self.folder)
        except (OSError, ValueError) as error:
            raise BaseError(f"the base folder {self.folder} cannot be listed: {error}; check base.pipeline") from error
        self.files = {
            path: FileEntry(entry.st_size) for path, entry in found.items() if not Path(path).name.startswith(".")
        }
        card = _front_matter(self.folder / "README.md")  # a clone of a Hub repository brings its card
        self.license, self.license_link = license_of(card)

    def path(self, name):
        """Where the file lies."""
        if name not in self.files:
            raise BaseNotFoundError(f"{self.folder} has no file {name}")
        return self.folder / name

    def read_json(self, name):
        """The content of a JSON file; BaseError where it is missing or damaged."""
        return read_json_file(self.path(name))


def _front_matter(path):
    """The YAML mapping at the head of a model card, or {} where there is none."""
    import yaml

    try:
        text = read_text(path)
        data = parse_yaml(text.split("---", 2)[1]) if text.startswith("---\n") else {}
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return {}
    return data if isinstance(data, dict) else {}


def read_json_file(path):
    """The content of a JSON file on disk; BaseError naming the file where it cannot be read as such."""
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise BaseError(f"{path} cannot be read as JSON: {error}; fetch the base again") from error


def git_blob_id(data):
    """The id (sha1 as hex) that git gives a content, by which the Hub lists what is not in large file storage."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256_of(path, progress=None):
    """The sha256 of a file as hex; `progress(bytes)` is called as it goes."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            if progress:
                progress(len(chunk))
    return digest.hexdigest()


def sha256_of_all(folder, paths, label):
    """{path: sha256 as hex} of files below a folder, several at a time, under a progress bar with that label."""
    folder = Path(folder)
    total = sum((folder / path).stat().st_size for path in paths)
    with progress_bar(label, total) as advance, ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return dict(zip(paths, pool.map(lambda path: sha256_of(folder / path, advance), paths), strict=True))
