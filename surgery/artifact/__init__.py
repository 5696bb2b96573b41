"""The artifact on disk: its manifest, how it is written, how it is checked."""

import importlib
from typing import Any

from .check import verify_artifact
from .manifest import Manifest, read_manifest

__all__ = ["Artifact", "Manifest", "read_manifest", "verify_artifact", "write_artifact"]


def __getattr__(name: str) -> Any:
    # Writing brings torch with it, which publishing and checking do without.
    if name in ("Artifact", "write_artifact"):
        return getattr(importlib.import_module("surgery.artifact.write"), name)
    raise AttributeError(f"module 'surgery.artifact' has no attribute {name!r}")
