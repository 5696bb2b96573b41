"""From what a recipe or a command names to the base that holds it."""

import os
import re
from pathlib import Path

from surgery.errors import BaseNotFoundError, InputError, nearest

from .local import LocalBase
from .repository import HubBase

_REPOSITORY = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")


def is_local(name):
    """Whether a name is written as a folder on this machine: ./x, ../x, ~/x or /x."""
    return name in (".", "..") or name.startswith(("./", "../", "~", "/"))


def local_folder(name):
    """The folder on this machine that `name` is, or None where it is a repository's; InputError where there is none."""
    try:
        folder = Path(name).expanduser()
        if folder.is_dir():
            return folder
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, ~nobody, a zero byte
        raise InputError(f"{str(name)[:100]!r} is no folder: {getattr(error, 'strerror', None) or error}") from error
    if is_local(str(name)):
        raise InputError(f"there is no folder {str(folder)[:200]}")
    return None


def open_base(name, revision=None, folder=Path(), local_files_only=False):
    """The LocalBase or HubBase that `name` means; a relative folder starts at `folder`.

    Raises InputError for what is neither a folder nor OWNER/NAME, BaseError where it cannot be listed.
    """
    if is_local(name):
        if revision:
            raise InputError(f"{name} is a local folder and has no revision; leave base.revision out")
        return LocalBase(Path(folder) / _expanded(name), name)
    if not _REPOSITORY.match(name):
        raise InputError(f"{name!r} is neither a Hub repository (OWNER/NAME) nor a folder (written ./folder)")
    return HubBase(name, revision, local_files_only)


def _expanded(name):
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise InputError(f"{name[:100]!r} is no folder: {error}") from error


def open_weight_file(repo, file, revision=None, folder=Path()):
    """(base, file name) of one weight file: of a Hub repository, or on disk beside the recipe where `repo` is None."""
    if repo is None:
        if revision:
            raise InputError(f"{file} is a local file and has no revision; leave it out, or give its repo")
        path = Path(folder) / _expanded(file)
        if not os.path.isfile(path):
            what = f"the weight file {str(path)[:200]}"
            raise BaseNotFoundError(f"{what} is not there; give `repo` if it lies on the Hub")
        return SingleFile(path, file), path.name
    base = open_base(repo, revision, folder)
    if file not in base.files:
        near = nearest(file, base.files)
        hint = f'; did you mean "{near}"?' if near else ""
        raise BaseNotFoundError(f"{repo} has no file {file}{hint}")
    return base, file


class SingleFile(LocalBase):
    """A base of one file, so that a weight file beside the recipe is listed like one of a repository."""

    license = license_link = None

    def __init__(self, path, name):
        from .listing import FileEntry

        self.folder, self.name = path.parent, name
        self.files = {path.name: FileEntry(path.stat().st_size)}
