"""The base model as a listing of files with sizes and hashes, on disk or on the Hub; nothing is fetched until asked."""

from .base import HubBase, LocalBase, open_base, open_weight_file, sha256_of, sha256_of_all
from .listing import FileEntry, select_files

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
