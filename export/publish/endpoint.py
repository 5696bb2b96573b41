"""handler.py and requirements.txt of a publication: with them it runs on Hugging Face Inference Endpoints."""

from surgery.artifact.endpoint import HANDLER, REQUIREMENTS, handler_text, requirements_text
from surgery.artifact.manifest import Manifest
from surgery.nn.operators import ADDITIONS, TOLD_ROLES

from .card import pipeline_tag


def endpoint_texts(manifest: Manifest) -> dict[str, str]:
    """{path: text} of both files; empty for an artifact that diffusers alone cannot draw as its recipe says."""
    if why_no_handler(manifest):
        return {}
    return {HANDLER: handler_text(), REQUIREMENTS: requirements_text(manifest.versions)}


def why_no_handler(manifest: Manifest) -> str | None:
    """Why an artifact gets no handler.py, or None where it does."""
    if manifest.weights == "thin":
        return "it is published without weights, which this package alone puts in their place"
    if manifest.index is not None:
        return "it is a modular pipeline"
    if pipeline_tag(manifest.base.get("pipeline_class") or "") != "text-to-image":
        return f"{manifest.base.get('pipeline_class')} does not draw an image from a text alone"
    if "guidance" in manifest.sampling:
        return f"its recipe is guided by {manifest.sampling['guidance']['method']}, which this package carries out"
    told = [
        o.operator for o in manifest.operations if o.operator in ADDITIONS and ADDITIONS[o.operator].role in TOLD_ROLES
    ]
    if told or manifest.sampling.get("regions"):
        return f"this package tells {told[0] if told else 'regions'} of a run's prompts"
    return None
