"""The same prompt and seed drawn dense, sparse and by the model's own operator, with a map per word of each."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from surgery.console import operation_text, settings_text
from surgery.errors import InputError
from surgery.guidance.attaching import driver_of
from surgery.models.anatomy import attention_sites
from surgery.models.patching import denoisers, operations_of, selected_paths, switching
from surgery.nn.operators import DENSE, OPERATORS
from surgery.nn.schedule import WINDOWS
from surgery.runtime.draw import generate
from surgery.runtime.sheet import evenly, film_strip
from surgery.runtime.video import Video

from ..observing import refuse_compiled, surely_patched
from .recording import Recording
from .text import text_keys
from .tokens import words_of
from .words import Column

if TYPE_CHECKING:
    from PIL.Image import Image


_MOST_ROWS = 8  # of a sheet by steps or blocks, neighbours being averaged
_MOST_FRAMES = 4  # of a video, below each other


@dataclass(frozen=True)
class MapRow:
    """A mode of attention, the image that it drew, and where in it each word was attended to.

    Of a video the image is a strip of its frames, and the maps are of the latents' frames that belong to them.
    """

    mode: str  # "dense", "sparse", "pladis"; "steps 1 to 3"
    setting: str  # "softmax", "alpha 1.5, scale 2, temperature 1"
    image: "Image"
    maps: np.ndarray  # float32 (columns, height, width): mean weights; negative ones are possible
    figures: dict[
        str, dict[str, float | None]
    ]  # {column's label: {"mass", "zeros", "negatives", "entropy", "lowest", "highest"}}; none of a part of the calls


@dataclass(frozen=True)
class Comparison:
    """The rows over the same columns, what they were drawn from, and what they were averaged over."""

    prompt: str
    seed: int
    columns: tuple[Column, ...]
    rows: tuple[MapRow, ...]
    cut_off: tuple[str, ...]  # words beyond the text encoder's length
    modules: tuple[str, ...]  # the paths of the recorded modules
    by: Literal["mode", "step", "block"] = "mode"
    calls: Mapping[str, np.ndarray] = field(default_factory=dict)  # {mode: `Recording.arrays`}, where asked for


def compare_attention(
    pipeline: Any,
    prompt: str,
    *,
    words: Sequence[str] | None = None,
    special: bool = False,
    layers: str | list[str] = "all",
    seed: int = 0,
    sampling: Mapping[str, Any] | None = None,
    by: Literal["mode", "step", "block"] = "mode",
    each_call: bool = False,
    on_step: Callable[[], object] | None = None,
) -> Comparison:
    """The Comparison of dense, sparse and the pipeline's own attention for a prompt (PLADIS, Fig. 10).

    Dense is the base, of joint attention at scale 0, which is the base but for rounding; sparse each operation's
    alpha-entmax map alone, with its alpha, temperature and the windows of its schedule; then the operators as they are
    (weights.py). Each row is a run of the pipeline of its own from the same seed. A pipeline without a patch gets the
    paper's PLADIS for the last two. The pipeline is afterwards what it was. Where joint attention puts text and image
    into one softmax, a word's weights are those of image queries, and all words' together are the share of text.

    words, special: as in `words_of`. layers: which of the patched modules are recorded, as in `surgery.tune`.
    sampling: as in `generate`, but sampled with CFG alone: a weakened model's maps would be among those of another
    guidance. by: rows of the pipeline's own operators alone, in place of the modes by denoising "step" or by "block".
    each_call: keep the map of each step and module in `calls` too. on_step: as in `generate`; what it raises ends it.
    Figures of a word: "mass", the mean weight of its tokens together; "zeros" and
    "negatives", the shares of their weights exactly 0 and below 0; "entropy" of its map over the pixels, 1 where it is
    even and 0 where it is one pixel, negative values taken as 0, None where nothing is above 0; "lowest" and "highest"
    value of the map.
    Raises InputError for words, layers or settings that do not fit and for a compiled pipeline; UnsupportedModelError
    for models without surgery and for pipelines or modules whose words or maps cannot be told.
    """
    refuse_compiled(pipeline)
    if driver_of(pipeline) is not None:
        raise InputError("the pipeline is guided, so the weakened model would be seen too; surgery.unguide it first")
    if hasattr(pipeline, "maybe_convert_prompt"):  # a textual inversion of several vectors becomes several tokens
        prompt = pipeline.maybe_convert_prompt(prompt, pipeline.tokenizer)
    rows, calls, sampling = [], {}, {**(sampling or {}), "guidance": None}
    with surely_patched(pipeline):
        sites = [site for site in attention_sites(denoisers(pipeline)) if site.operation]
        paths = selected_paths(sites, layers)
        text = text_keys(pipeline, prompt, sampling)
        found = words_of(text.encoded, text.length, prompt, words, special)
        operations = [one for one in operations_of(pipeline) if one["operator"] in OPERATORS]
        modes = _modes(operations, any(site.kind == "joint" for site in sites))
        with switching(pipeline) as switch:
            for mode, setting, operations in modes if by == "mode" else modes[-1:]:
                switch(operations)
                recording = Recording(
                    pipeline,
                    paths,
                    found.columns,
                    text.length,
                    each_call=each_call or by != "mode",
                    entry=text.entry,
                )
                with recording:
                    image = generate(pipeline, [prompt], [seed], sampling, mode, on_step=on_step)[prompt, seed]
                if each_call:
                    calls[mode] = recording.arrays()
                if by == "mode":
                    rows.append(_row(mode, setting, image, recording, found.columns))
                else:
                    rows += _rows_by(by, setting, image, recording)
    return Comparison(prompt, seed, found.columns, tuple(rows), found.cut_off, tuple(paths), by, calls)


def _modes(operations, is_joint):
    """[(name, settings in words, operations or None for dense)]; no sparse row where the model is just that."""
    dense = [{**DENSE, "layers": each["layers"]} for each in operations]
    modes: list[tuple[str, str, list[dict[str, Any]] | None]] = [("dense", "softmax", dense if is_joint else None)]
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


def _row(mode, setting, drawn, recording, columns):
    image, maps = _shown(drawn, recording)
    figures = {}
    for column, map_, (mass, zeros, negatives) in zip(columns, maps, recording.shares(), strict=True):
        figures[column.label] = {
            "mass": mass,
            "zeros": zeros,
            "negatives": negatives,
            "entropy": _entropy(map_),
            "lowest": float(map_.min()),
            "highest": float(map_.max()),
        }
    return MapRow(mode, setting, image, maps.numpy(), figures)


def _rows_by(by, setting, drawn, recording) -> Iterator[MapRow]:
    """A row for each step or block, or for a run of them where there are many."""
    if by == "step":
        names = [str(step + 1) for step in range(recording.steps)]
        place_of = {(path, step): step for path in recording.paths for step in range(recording.steps)}
    else:
        names = list(dict.fromkeys(path.rpartition(".")[0] for path in recording.paths))
        places = {path: names.index(path.rpartition(".")[0]) for path in recording.paths}
        place_of = {(path, step): places[path] for path in recording.paths for step in range(recording.steps)}
    rows = min(_MOST_ROWS, len(names))
    for row in range(rows):
        first, behind = (round(edge * len(names) / rows) for edge in (row, row + 1))
        alone = behind == first + 1
        name = f"{by} {names[first]}" if alone else f"{by}s {names[first]} to {names[behind - 1]}"
        image, maps = _shown(
            drawn, recording, lambda call, first=first, behind=behind: first <= place_of[call] < behind
        )
        yield MapRow(name, setting, image, maps.numpy(), {})


def _shown(drawn, recording, chosen=None):
    """(image, its maps); a video's as strips of some of its frames."""
    if not isinstance(drawn, Video):
        return drawn, recording.maps((drawn.height, drawn.width), chosen)[:, 0]
    width, height = drawn.size
    maps = recording.maps((height, width), chosen)
    places = evenly(len(drawn.frames), _MOST_FRAMES)
    last = max(1, len(drawn.frames) - 1)
    of_latents = [round(place * (maps.shape[1] - 1) / last) for place in places]
    return film_strip(drawn.frames, _MOST_FRAMES), maps[:, of_latents].flatten(1, 2)


def _entropy(map_):
    """Shannon entropy of a map over its pixels, over its largest possible value; None where nothing is above 0."""
    import torch

    weights = map_.double().clamp_min(0).flatten()
    if not weights.sum() > 0:
        return None
    share = weights / weights.sum()
    return float(torch.special.entr(share).sum()) / math.log(len(share))
