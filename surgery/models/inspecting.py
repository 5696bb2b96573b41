"""What attention a model has and whether surgery fits it, from its config files alone."""

import os
from typing import Any

from surgery.hub import open_base
from surgery.hub.base import read_index
from surgery.hub.listing import components_of

from .anatomy import attention_sites, build_on_meta, denoiser_of, refusal_of_class
from .selection import REPLACED


def inspect_model(model: str, revision: str | None = None) -> dict[str, Any]:
    """A dict on a pipeline folder or Hub id: its denoiser, attention sites, and why surgery does not fit, if so."""
    name = f"./{model}" if os.path.isdir(model) and not str(model).startswith((".", "/", "~")) else str(model)
    base = open_base(name, revision)
    model_index = read_index(base)
    component, class_name = denoiser_of(model_index)
    sites = attention_sites(build_on_meta(class_name, base.read_json(f"{component}/config.json")))
    replaceable = [site for site in sites if site.kind in REPLACED and not site.refusal and not site.operation]
    refusal = refusal_of_class(class_name, model_index.get("_class_name"), components_of(model_index))
    if refusal is None and not replaceable:
        refusal = "it has no attention to text that can be replaced"
    return {
        "schema_version": 1,
        "model": str(model),
        "revision": base.commit,
        "pipeline_class": model_index.get("_class_name"),
        "component": component,
        "model_class": class_name,
        "fits": refusal is None,
        "refusal": refusal,
        "replaceable": len(replaceable) if refusal is None else 0,
        "sites": sites,
    }
