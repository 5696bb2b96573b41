"""The artifact on disk: its manifest, how it is written, how it is checked."""

from .manifest import Manifest, read_manifest, verify_artifact

__all__ = ["Manifest", "read_manifest", "verify_artifact"]
