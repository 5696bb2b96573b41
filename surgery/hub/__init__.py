"""The base model as a listing of files with sizes and hashes, on disk or on the Hub; nothing is fetched until asked."""

from .listing import FileEntry, select_files
from .local import LocalBase, sha256_of, sha256_of_all
from .opening import open_base, open_weight_file
from .repository import HubBase

__all__ = [
    "FileEntry",
    "HubBase",
    "LocalBase",
    "open_base",
    "open_weight_file",
    "select_files",
    "sha256_of",
    "sha256_of_all",
]
