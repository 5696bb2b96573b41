"""Operations are put on a model of ComfyUI's, one node after another."""

from typing import Any

from .hook import KEY, Hook
from .layouts import layout_of, sites_of
from .maps import Maps
from .operations import Operation, is_negative, missed, selects
from .operators import OPERATORS


def add(model: Any, operations: list[Operation], maps: Maps | None = None) -> tuple[Any, str]:
    """(a clone of a ModelPatcher with these operations behind those that it has, what will be done in words).

    Where a chain has several operators, a layer and step has that of the last node which holds there; of additions the
    last of each kind. maps: that are to be recorded from here on. Raises ValueError for what does not go together.
    """
    options = model.model_options.get("transformer_options", {})
    before: Hook | None = options.get(KEY)
    chain = [*(before.operations if before else ()), *operations]
    _check(chain)
    below = before.below if before else options.get("optimized_attention_override")
    model, hook = model.clone(), Hook(chain, below)
    hook.maps = maps or (before.maps if before else None)
    options = model.model_options.setdefault("transformer_options", {})
    options[KEY] = hook
    network = model.model.diffusion_model
    if overrides():
        options["optimized_attention_override"] = hook.override
    elif hasattr(network, "input_blocks"):
        _replace_attn2(model, hook, network)
    else:
        return model, "NOTHING WILL CHANGE: this ComfyUI has no optimized_attention_override; update it"
    for kind, wrapper in (("apply_model", hook.apply), ("outer_sample", hook.sample)):
        if hasattr(model, "add_wrapper_with_key"):
            model.remove_wrappers_with_key(kind, KEY)
            model.add_wrapper_with_key(kind, KEY, wrapper)
    return model, _plan(network, chain)


def report_of(model: Any) -> str:
    """What became of the attention calls of a model's last run."""
    hook = model.model_options.get("transformer_options", {}).get(KEY)
    return str(hook.report) if hook else "this model has none of this pack's nodes before it"


def maps_of(model: Any) -> Maps:
    """The attention maps of a model's last run. ValueError where it records none."""
    hook = model.model_options.get("transformer_options", {}).get(KEY)
    if hook is None or hook.maps is None:
        raise ValueError("this model records no attention: put Record attention before it")
    return hook.maps


def overrides() -> bool:
    """Whether this ComfyUI asks `optimized_attention_override`."""
    from comfy.ldm.modules import attention  # pyright: ignore[reportMissingImports]  # ComfyUI's own

    return hasattr(attention, "wrap_attn")


def _replace_attn2(model, hook, network):
    """The hook at a UNet's modules by name, in versions from before the override."""
    from comfy.ldm.modules.attention import CrossAttention  # pyright: ignore[reportMissingImports]  # ComfyUI's own

    layout = layout_of(network)
    by_module = {site.module: site for site in hook.sites(network, layout)} if layout else {}
    for path, module in network.named_modules():
        parts = path.split(".")
        if isinstance(module, CrossAttention) and module in by_module:  # input_blocks.4.1.transformer_blocks.0.attn2
            block = {"input_blocks": "input", "middle_block": "middle", "output_blocks": "output"}[parts[0]]
            number = 0 if block == "middle" else int(parts[1])
            patch = hook.replaced(by_module[module])
            model.set_model_attn2_replace(patch, block, number, int(parts[parts.index("transformer_blocks") + 1]))


def _check(chain):
    keeping = [one.operator for one in chain if one.operator in OPERATORS and OPERATORS[one.operator].keeps]
    negative = [one.operator for one in chain if is_negative(one.operator)]
    if keeping and negative:
        raise ValueError(f"{negative[0]} does not go with {keeping[0]}, which keeps one output of each step")


def _plan(network, chain):
    """What a chain will do to a diffusion model, a line for each operation."""
    name, layout = type(network).__name__, layout_of(network)
    if layout is None:
        return f"NOTHING WILL CHANGE: this pack does not know where ComfyUI's {name} has its text"
    sites = [site for site in sites_of(network, layout) if site.path]
    lines = []
    for one in chain:
        hit = sum(selects(one.layers, site) for site in sites)
        lines.append(f"{one}: {hit} of {len(sites)} {sites[0].stack.kind}-attentions of {name}" if sites else "")
        lines += [f"  {sentence}" for sentence in missed(one.layers, sites)]
        if not hit:
            lines[-1:] = [f"NOTHING WILL CHANGE by it. {lines[-1].strip()}"]
    return "\n".join(lines) if sites else f"NOTHING WILL CHANGE: this {name} has no attention to a text"
