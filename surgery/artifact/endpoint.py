"""What a published artifact has for Hugging Face Inference Endpoints: handler.py, which draws, and what that needs."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

HANDLER = "handler.py"
REQUIREMENTS = "requirements.txt"
# The least torch that the joined code of an artifact was run with, by its frozen and shapes artifacts.
LEAST_TORCH = "2.8"
_PINNED = ("diffusers", "transformers")
_REQUIREMENT = re.compile(r"^(accelerate|diffusers|safetensors|torch|torchvision|transformers)([<>=][=<>0-9.,a-z]*)?$")

# version -> sha256 of the handler.py that it publishes; a line is added with one of RELEASES in verify.py, by the same
# script.
HANDLERS: dict[str, str] = {}


def handler_text() -> str:
    """The text of handler.py: the file of this folder, as it is."""
    return (Path(__file__).parent / HANDLER).read_text(encoding="utf-8")


def requirements_text(versions: Mapping[str, str]) -> str:
    """The text of requirements.txt, from a manifest's `versions`.

    diffusers and transformers are those that it was made with, torch goes from the least that was tried to the release
    that it was made with; torchvision, which Hugging Face's containers have, is named so that it changes with torch.
    """
    made = {name: version.partition("+")[0] for name, version in versions.items()}
    major, minor = made["torch"].split(".")[:2]
    lines = [
        "# For handler.py; what pladis-surgery made this model with.",
        "accelerate>=1.10,<2",
        *(f"{name}=={made[name]}" for name in _PINNED),
        f"safetensors>={made['safetensors']}",
        f"torch>={LEAST_TORCH},<{major}.{int(minor) + 1}",
        "torchvision",
    ]
    return "\n".join(lines) + "\n"


def requirements_problem(text: str) -> str | None:
    """What in the text of a requirements.txt is no bound of a package that a handler needs, or None."""
    lines = [line.strip() for line in text.splitlines()]
    return next((line for line in lines if line and line[0] != "#" and not _REQUIREMENT.match(line)), None)


def handler_release(sha256: str) -> str | None:
    """The version whose handler.py has this sha256, this installation's included, or None."""
    from surgery.machine import versions

    if sha256 == hashlib.sha256(handler_text().encode("utf-8")).hexdigest():
        return f"{versions()['pladis-surgery']}, as installed here"
    return next((version for version, known in HANDLERS.items() if known == sha256), None)
