"""The denoisers of a pipeline: most have one, Wan 2.2 A14B has two, each for a part of the noise levels.

In what is said of a whole pipeline (operations, sites, hyperparameters) a module of the first is named by its path in
it, blocks.0.attn2, and one of another by its component's name too, transformer_2.blocks.0.attn2.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from surgery.errors import UnsupportedModelError
from surgery.hub.listing import components_of

FIRST = ("unet", "transformer")
FURTHER = ("transformer_2",)
DENOISERS = (*FIRST, *FURTHER)  # in the order in which a pipeline is searched for them


def denoisers_of(model_index: Mapping) -> dict[str, str]:
    """{component: class name} of the denoisers in a model_index.json; UnsupportedModelError where there is none."""
    components = components_of(model_index)
    if found := {name: components[name][1] for name in DENOISERS if name in components}:
        return found
    raise UnsupportedModelError(
        f"{model_index.get('_class_name', 'this pipeline')} has neither a unet nor a transformer; nothing to operate on"
    )


def denoiser_of(model_index: Mapping) -> tuple[str, str]:
    """(component, class name) of the first denoiser in a model_index.json; raises as `denoisers_of`."""
    return next(iter(denoisers_of(model_index).items()))


def further_of(path: str) -> str | None:
    """The component whose module a path of a pipeline names, where that is not the first denoiser."""
    name, dot, _ = path.partition(".")
    return name if dot and name in FURTHER else None


def path_in_pipeline(component: str, path: str) -> str:
    """The path by which a pipeline's list names the module at `path` of a denoiser."""
    return f"{component}.{path}" if component in FURTHER else path


def own_operations(operations: Iterable[Mapping], component: str) -> list[dict[str, Any]]:
    """Of a pipeline's operations what one denoiser's config has of them: its own layers, by their paths in it."""
    whose = component if component in FURTHER else None
    start = f"{whose}." if whose else ""
    found = []
    for operation in operations:
        layers = [path.removeprefix(start) for path in operation["layers"] if further_of(path) == whose]
        if layers:
            found.append({**operation, "layers": layers})
    return found


def joined_operations(own: Mapping[str, Iterable[Mapping]]) -> list[dict[str, Any]]:
    """The operations of a pipeline from {component: those of its config}; what has one setting is one operation."""
    by_setting: dict[str, dict[str, Any]] = {}
    for component, operations in own.items():
        for operation in operations:
            layers = [path_in_pipeline(component, path) for path in operation["layers"]]
            setting = json.dumps({key: value for key, value in operation.items() if key != "layers"})
            if setting in by_setting:
                by_setting[setting]["layers"] += layers
            else:
                by_setting[setting] = {**operation, "layers": layers}
    return list(by_setting.values())
