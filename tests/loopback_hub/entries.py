"""The files of a repository: where their bytes are, and the hashes under which the Hub lists them.

Hashes of files on disk are computed when first asked for, and remembered: a sparse file of many gigabytes can be
listed without being read, if its sha256 was declared.
"""

import hashlib
import threading
from dataclasses import dataclass
from pathlib import Path

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".png", ".jpg", ".model", ".gz")
LFS_SIZE = 10 * 1024 * 1024
POINTER_SIZE = 135
CHUNK = 1 << 20

_remembered = {}
_remembering = threading.Lock()


def kept_as_lfs(path, size):
    """Whether the Hub keeps a file of this name and size in its large file storage; empty files never are."""
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > LFS_SIZE)


def git_blob_oid(data):
    """The hash under which git stores `data`."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def pointer(sha256, size):
    """The text that git holds in the place of a large file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def xet_hash(sha256):
    """A stable stand-in for the hash of a file in the Xet storage."""
    return hashlib.sha256(b"xet " + sha256.encode()).hexdigest()


def file_sha256(path):
    """The sha256 of a file, computed once for each (path, size, time of modification)."""
    stat = Path(path).stat()
    key = (str(path), stat.st_size, stat.st_mtime_ns)
    with _remembering:
        if key not in _remembered:
            digest = hashlib.sha256()
            with open(path, "rb") as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
            _remembered[key] = digest.hexdigest()
        return _remembered[key]


@dataclass(frozen=True)
class Entry:
    """One file of a commit. Its bytes are `data`, or in the file `location`, or nowhere (then `sha` is given)."""

    size: int
    is_lfs: bool
    data: bytes | None = None
    location: Path | None = None
    sha: str | None = None
    xet: bool = True
    stored: str | None = None  # the hash in the Xet storage, of what a client put there

    @classmethod
    def of_bytes(cls, path, data, xet=True):
        """The entry that a commit of `data` at `path` makes."""
        return cls(len(data), kept_as_lfs(path, len(data)), data=data, xet=xet)

    @property
    def has_bytes(self):
        """Whether the server can send the file."""
        return self.data is not None or self.location is not None

    @property
    def sha256(self):
        """The sha256 of the bytes, 64 hexadecimal digits."""
        if self.sha is not None:
            return self.sha
        return hashlib.sha256(self.data).hexdigest() if self.data is not None else file_sha256(self.location)

    @property
    def oid(self):
        """The git oid: of the bytes, or of the pointer for a file in the large file storage."""
        return git_blob_oid(pointer(self.sha256, self.size) if self.is_lfs else self.read())

    @property
    def xet_hash(self):
        """The hash in the Xet storage; None for regular files and for repositories that do not use it."""
        return (self.stored or xet_hash(self.sha256)) if self.is_lfs and self.xet else None

    def read(self):
        """All bytes at once."""
        return self.data if self.data is not None else Path(self.location).read_bytes()

    def chunks(self, start, length):
        """The bytes from `start`, `length` of them, never much of the file at a time."""
        if self.data is not None:
            yield self.data[start : start + length]
            return
        with open(self.location, "rb") as file:
            file.seek(start)
            while length and (chunk := file.read(min(CHUNK, length))):
                length -= len(chunk)
                yield chunk


def folder_signature(folder):
    """What changes when a file in `folder` is added, removed or written."""
    stats = ((path, path.stat()) for path in sorted(Path(folder).rglob("*")) if path.is_file())
    return [(path.relative_to(folder).as_posix(), stat.st_size, stat.st_mtime_ns) for path, stat in stats]


def folder_tree(signature, folder, declared, xet):
    """The tree {path: Entry} of a folder; `declared` gives sha256 sums of absolute paths that need not be read."""
    tree = {}
    for name, size, _ in signature:
        path = Path(folder, name).absolute()
        tree[name] = Entry(size, kept_as_lfs(name, size), location=path, sha=declared.get(str(path)), xet=xet)
    return tree
