"""The same prompt and seed drawn dense, sparse and by the model's own operator, with a map per word of each."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.console import operation_text, settings_text
from surgery.errors import InputError, UnsupportedModelError
from surgery.guidance.attaching import driver_of
from surgery.models.anatomy import attention_sites
from surgery.models.patching import denoiser, selected_paths, switching
from surgery.nn.operators import OPERATORS
from surgery.nn.schedule import WINDOWS
from surgery.runtime.draw import generate

from ..observing import refuse_compiled, surely_patched
from .recording import Recording
from .words import Column, words_of_prompt

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class MapRow:
    """A mode of attention, the image that it drew, and where in it each word was attended to."""

    mode: str  # "dense", "sparse", "pladis"
    setting: str  # "softmax", "alpha 1.5, scale 2, temperature 1"
    image: "Image"
    maps: np.ndarray  # float32 (columns, height, width): mean weights; negative ones are possible
    figures: dict[
        str, dict[str, float | None]
    ]  # {column's label: {"mass", "zeros", "negatives", "entropy", "lowest", "highest"}}


@dataclass(frozen=True)
class Comparison:
    """The rows over the same columns, what they were drawn from, and what they were averaged over."""

    prompt: str
    seed: int
    columns: tuple[Column, ...]
    rows: tuple[MapRow, ...]
    cut_off: tuple[str, ...]  # words beyond the text encoder's length
    modules: tuple[str, ...]  # the paths of the recorded modules


def compare_attention(
    pipeline: Any,
    prompt: str,
    *,
    words: Sequence[str] | None = None,
    special: bool = False,
    layers: str | list[str] = "all",
    seed: int = 0,
    sampling: Mapping[str, Any] | None = None,
) -> Comparison:
    """The Comparison of dense, sparse and the pipeline's own attention for a prompt (PLADIS, Fig. 10).

    Dense is the base, unpatched; sparse each operation's alpha-entmax map alone, with its alpha, temperature and the
    windows of its schedule; then the operators as they are (weights.py). Each row is a run of the
    pipeline of its own from the same seed. A pipeline without a patch gets the paper's PLADIS for the last two. The
    pipeline is afterwards what it was.

    words, special: as in `words_of_prompt`. layers: which of the patched modules are recorded, as in `surgery.tune`.
    sampling: as in `generate`, but sampled with CFG alone: a weakened model's maps would be among those of another
    guidance. Figures of a word: "mass", the mean weight of its tokens together; "zeros" and
    "negatives", the shares of their weights exactly 0 and below 0; "entropy" of its map over the pixels, 1 where it is
    even and 0 where it is one pixel, negative values taken as 0, None where nothing is above 0; "lowest" and "highest"
    value of the map.
    Raises InputError for words, layers or settings that do not fit and for a compiled pipeline; UnsupportedModelError
    for models without surgery and for tokenizers or modules whose maps cannot be told.
    """
    model: Any = denoiser(pipeline)
    refuse_compiled(pipeline, model)
    if driver_of(pipeline) is not None:
        raise InputError("the pipeline is guided, so the weakened model would be seen too; surgery.unguide it first")
    if not hasattr(model, "mid_block"):
        raise UnsupportedModelError(f"attention maps are drawn for UNets, and {type(model).__name__} is none")
    if getattr(pipeline, "tokenizer", None) is None:
        raise UnsupportedModelError(f"{type(pipeline).__name__} has no tokenizer, so words have no tokens to show")
    if hasattr(pipeline, "maybe_convert_prompt"):  # a textual inversion of several vectors becomes several tokens
        prompt = pipeline.maybe_convert_prompt(prompt, pipeline.tokenizer)
    found = words_of_prompt(pipeline.tokenizer, prompt, words, special)
    rows, sampling = [], {**(sampling or {}), "guidance": None}
    with surely_patched(pipeline):
        paths = selected_paths([site for site in attention_sites(model) if site.operation], layers)
        with switching(pipeline) as switch:
            for mode, setting, operations in _modes(
                [one for one in model.pladis_operations() if one["operator"] in OPERATORS]
            ):
                switch(operations)
                with Recording(pipeline, model, paths, found.length) as recording:
                    image = generate(pipeline, [prompt], [seed], sampling, mode)[prompt, seed]
                rows.append(_row(mode, setting, image, recording, found.columns))
    return Comparison(prompt, seed, found.columns, tuple(rows), found.cut_off, tuple(paths))


def _modes(operations):
    """[(name, settings in words, operations or None for dense)]; no sparse row where the model is just that."""
    modes: list[tuple[str, str, list[dict[str, Any]] | None]] = [("dense", "softmax", None)]
    if any(operation["operator"] != "sparse" for operation in operations):
        sparse = [_sparse(operation) for operation in operations]
        settings = dict.fromkeys(settings_text(operation) for operation in sparse)
        modes.append(("sparse", "; ".join(settings), sparse))
    operators = dict.fromkeys(operation["operator"] for operation in operations)
    if len(operations) == 1:
        text = operation_text(operations[0]).removeprefix(operations[0]["operator"]).strip()
        text = text.removeprefix("(").replace(")", "", 1)
    else:
        text = "; ".join(dict.fromkeys(operation_text(operation) for operation in operations))
    return [*modes, (" + ".join(operators), text, operations)]


def _sparse(operation):
    """T_s alone for an operation, in the windows in which it acts."""
    sparse = {"operator": "sparse"}
    sparse |= {key: operation[key] for key in ("alpha", "temperature", "layers")}
    sparse["temperature"] *= operation.get("sparse_temperature", 1.0)
    kept = {*WINDOWS, "alpha", "temperature"}
    schedule = {key: values for key, values in operation.get("schedule", {}).items() if key in kept}
    return {**sparse, "schedule": schedule} if schedule else sparse


def _row(mode, setting, image, recording, columns):
    maps = recording.maps(columns, (image.height, image.width))
    figures = {}
    for column, map_, (mass, zeros, negatives) in zip(columns, maps, recording.shares(columns), strict=True):
        figures[column.label] = {
            "mass": mass,
            "zeros": zeros,
            "negatives": negatives,
            "entropy": _entropy(map_),
            "lowest": float(map_.min()),
            "highest": float(map_.max()),
        }
    return MapRow(mode, setting, image, maps.numpy(), figures)


def _entropy(map_):
    """Shannon entropy of a map over its pixels, over its largest possible value; None where nothing is above 0."""
    import torch

    weights = map_.double().clamp_min(0).flatten()
    if not weights.sum() > 0:
        return None
    share = weights / weights.sum()
    return float(torch.special.entr(share).sum()) / math.log(len(share))
