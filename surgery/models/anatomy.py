"""What attention a backbone has, found on the meta device from its config alone: no weights are read."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from surgery.errors import BaseError, UnsupportedModelError
from surgery.hub.foreign import reading, size_problem
from surgery.nn.backbones import BACKBONES, GUIDED_ALONE, PATCHED, REFUSED, backbone_of
from surgery.nn.backbones.record import SINGLE_KEY, Backbone

from .denoisers import path_in_pipeline

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class AttentionSite:
    """One attention module of a model."""

    path: str  # "down_blocks.1.attentions.0.transformer_blocks.0.attn2"
    kind: str  # "self", "cross" or "joint"
    heads: int
    head_dim: int
    block: str  # "down", "mid", "up"; of joint attention "double" or "single"; or the first part of the path
    module_class: str  # "Attention"
    refusal: str | None  # why it cannot become a PladisAttention
    operation: dict | None = None  # its operator and hyperparameters, if it is a PladisAttention already


def attention_sites(
    model: "torch.nn.Module | Mapping[str, torch.nn.Module]", self_attention: bool = False
) -> list[AttentionSite]:
    """The AttentionSite of every attention module of a live or meta model, in model order.

    model: or {component: model}, whose sites have paths in the pipeline. self_attention: that the refusals of
    self-attention are those of the experiment that replaces it.
    """
    sites = []
    for component, part in model.items() if isinstance(model, Mapping) else (("", model),):
        backbone = record_of(part)
        found = [(path, module) for path, module in part.named_modules() if _is_attention(module)]
        own = [_site(path, module, backbone, self_attention) for path, module in found]
        sites += [replace(site, path=path_in_pipeline(component, site.path)) for site in own]
    return sites


def record_of(model: "torch.nn.Module") -> Backbone | None:
    """The record of a live or meta model's class, patched or not; None for a class that there is none of."""
    name = type(model).__name__
    return backbone_of(name) if name in {**BACKBONES, **PATCHED, **GUIDED_ALONE} else None


def build_on_meta(class_name: str, config: dict) -> "torch.nn.Module":
    """The model of a diffusers class and config on the meta device: every module, no memory.

    Raises UnsupportedModelError for a class that diffusers does not have, BaseError for a config it does not take.
    """
    import diffusers
    import torch

    own = backbone_of(class_name).patched if class_name in PATCHED else None
    model_class = own or getattr(diffusers, class_name, None)
    if model_class is None or not hasattr(model_class, "from_config"):
        raise UnsupportedModelError(f"diffusers {diffusers.__version__} has no model class {class_name}")
    if problem := size_problem(config):
        raise BaseError(f"the config of {class_name} cannot be right: {problem}; fetch the base again")
    with reading(f"diffusers cannot build {class_name} from its config", kind=BaseError), torch.device("meta"):
        return model_class.from_config(config)


def refusal_of_class(class_name: str, pipeline_class: str | None = None) -> str | None:
    """Why a model class cannot be patched in a pipeline class, or None."""
    if class_name in GUIDED_ALONE:
        return SINGLE_KEY
    if class_name in BACKBONES:
        return backbone_of(class_name).refused_pipelines.get(str(pipeline_class))  # a damaged index may have anything
    if class_name in PATCHED:
        return "it is patched already: start from its base, or tune it with surgery.tune"
    if class_name in REFUSED:
        return f"there is no surgery for it: {REFUSED[class_name]}"
    return f"there is no surgery for {class_name}; there is for {', '.join(BACKBONES)}"


def _is_attention(module):
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention

    has_projections = hasattr(module, "heads") and (hasattr(module, "to_q") or hasattr(module, "to_qkv_mlp_proj"))
    return isinstance(module, (Attention, AttentionModuleMixin)) or has_projections


def _site(path, module, backbone, self_attention):
    from surgery.nn import is_pladis

    patched = backbone and backbone.patched
    operation, refusal = None, None
    if is_pladis(module):
        more = module.addition_settings() if hasattr(module, "addition_settings") else []  # nor copies of older code
        operation = {**module.setting(), **({"additions": more} if more else {})}
        kind = getattr(module, "kind", "cross")  # copies of older code have no kind
        kind = "self" if "replace" in operation else kind
    else:
        refusal = patched.refusal_of(module, path) if patched else "there is no surgery for its model"
        kind = _kind(path, module, backbone) if refusal else patched.form_of(module).kind
        if patched and self_attention and kind == "self":
            refusal = patched.refusal_of(module, path, True)
    block = path.split(".")[0].removesuffix("_blocks").removesuffix("_block")
    if kind == "joint":
        one_stream = path.startswith("single_") or (backbone and backbone.one_stream)
        block = "single" if one_stream else "double"
    return AttentionSite(
        path=path,
        kind=kind,
        heads=_heads(module),
        head_dim=_head_dim(module),
        block=block,
        module_class=type(module).__name__,
        refusal=refusal,
        operation=operation,
    )


def _kind(path, module, backbone):
    if backbone and backbone.patched and path.endswith(f".{backbone.attention}") and backbone.block_of(path):
        form = backbone.patched.form_of(module)
        if form and form.own_refusal(module) is None:  # it is refused for its processor, or in this place alone
            return form.kind
    # Image-to-video models add image keys to a cross-attention: those hang on attn2, joint attention on attn.
    # Single-stream blocks concatenate text and image before the module, which then looks like self-attention.
    added = getattr(module, "added_kv_proj_dim", None) is not None and not path.endswith("attn2")
    if added or path.startswith("single_"):
        return "joint"
    is_cross = getattr(module, "is_cross_attention", None)
    return "cross" if (path.endswith("attn2") if is_cross is None else is_cross) else "self"


def _heads(module):
    return module.heads if hasattr(module, "heads") else module.num_heads


def _head_dim(module):
    for name in ("head_dim", "dim_head", "attention_head_dim"):
        if isinstance(getattr(module, name, None), int):
            return getattr(module, name)
    projection = getattr(module, "to_q", None) or getattr(module, "to_query", None)
    return (module.inner_dim if projection is None else projection.out_features) // _heads(module)
