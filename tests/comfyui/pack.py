"""The node pack in comfyui/, loaded by its path, as ComfyUI does it."""

import importlib.util
import sys
from pathlib import Path

FOLDER = Path(__file__).parent.parent.parent / "comfyui"
NAME = "pladis_surgery_nodes"


def load():
    """The pack's package; its modules are `{NAME}.hook` and so on."""
    if NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            NAME, FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules[NAME] = module
        spec.loader.exec_module(module)
    return sys.modules[NAME]


def node(identifier):
    """run(model, **inputs) of a node by the end of its identifier; what is left out has the node's default."""
    load()
    found = next(one for one in sys.modules[f"{NAME}.nodes"].NODES if one.identifier == f"PladisSurgery{identifier}")
    defaults = {one.name: one.default for one in found.inputs if one.default is not None}

    def run(model, **inputs):
        return found.run(model=model, **{**defaults, **inputs})

    return run
