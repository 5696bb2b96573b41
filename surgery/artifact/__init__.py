"""The artifact on disk: its manifest, how it is written, how it is checked."""

from .check import verify_artifact
from .manifest import Manifest, read_manifest
from .write import Artifact, write_artifact

__all__ = ["Artifact", "Manifest", "read_manifest", "verify_artifact", "write_artifact"]
