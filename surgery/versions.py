"""The versions of the libraries whose behaviour an artifact depends on."""

from importlib import metadata

_PACKAGES = ("pladis-surgery", "torch", "diffusers", "transformers", "safetensors")


def versions():
    """{package: version} of what is installed."""
    return {package: metadata.version(package) for package in _PACKAGES}
