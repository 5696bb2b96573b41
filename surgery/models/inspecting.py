"""What attention a model has and whether surgery fits it, from its config files alone."""

import os
from typing import Any

from surgery.hub import open_base
from surgery.hub.base import read_index

from .anatomy import attention_sites, build_on_meta, refusal_of_class
from .denoisers import denoisers_of
from .selection import REPLACED


def inspect_model(model: str, revision: str | None = None) -> dict[str, Any]:
    """A dict on a pipeline folder or Hub id: its denoisers, attention sites, and why surgery does not fit, if so."""
    name = f"./{model}" if os.path.isdir(model) and not str(model).startswith((".", "/", "~")) else str(model)
    base = open_base(name, revision)
    model_index = read_index(base)
    found = denoisers_of(model_index)
    sites = attention_sites(
        {name: build_on_meta(kind, base.read_json(f"{name}/config.json")) for name, kind in found.items()}
    )
    replaceable = [site for site in sites if site.kind in REPLACED and not site.refusal and not site.operation]
    refusals = (refusal_of_class(kind, model_index.get("_class_name")) for kind in found.values())
    refusal = next(filter(None, refusals), None)
    if refusal is None and not replaceable:
        refusal = "it has no attention to text that can be replaced"
    return {
        "schema_version": 1,
        "model": str(model),
        "revision": base.commit,
        "pipeline_class": model_index.get("_class_name"),
        "component": next(iter(found)),
        "model_class": next(iter(found.values())),
        "denoisers": found,
        "fits": refusal is None,
        "refusal": refusal,
        "replaceable": len(replaceable) if refusal is None else 0,
        "sites": sites,
    }
