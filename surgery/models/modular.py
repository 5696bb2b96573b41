"""What a modular pipeline of diffusers says of its components in its config, which is saved as its index."""

from typing import Any


def is_modular(pipeline: Any) -> bool:
    """Whether a pipeline is one of diffusers' modular ones."""
    from diffusers import ModularPipeline

    return isinstance(pipeline, ModularPipeline)


def tell_class(pipeline: Any, name: str, component: Any) -> None:
    """Tell a modular pipeline what class its component is, for its index.

    A patched one has no class there that diffusers could import: AutoModel finds it, by the component's own config.
    """
    from surgery.nn import PATCHED

    if name not in pipeline.config:
        return
    kind = type(component)
    library = kind.__module__.partition(".")[0]
    hint = (None, None) if kind.__name__ in PATCHED else (library, kind.__name__)
    spec = {**pipeline.config[name][2], "type_hint": hint}
    pipeline.register_to_config(**{name: (library, kind.__name__, spec)})
