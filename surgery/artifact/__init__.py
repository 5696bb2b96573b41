"""The artifact on disk: its manifest, how it is written, how it is checked."""

from .check import verify_artifact
from .manifest import Manifest, read_manifest

__all__ = ["Manifest", "read_manifest", "verify_artifact"]
