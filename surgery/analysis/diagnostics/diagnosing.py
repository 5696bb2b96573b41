"""A pipeline's attention while it draws, by module and step: the statistics of statistics.py, reduced as they come."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from surgery.console import progress_bar
from surgery.errors import InputError, UnsupportedModelError
from surgery.models.anatomy import attention_sites
from surgery.models.denoisers import further_of, path_in_pipeline
from surgery.models.patching import denoisers, operations_of, patched_modules, selected_paths, switching
from surgery.nn.operators import DENSE, OPERATORS
from surgery.runtime.draw import draw, number_of_steps

from ..attention_maps import Words, text_keys, words_of
from ..observing import AttentionCall, Observer, refuse_compiled, surely_patched
from .statistics import STATISTICS, Measured, Total, add, statistics_of

KINDS = ("start", "words", "end", "padding")  # of tokens; punctuation is among the words
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Diagnosis:
    """What was measured, over how many images. settings: {module: Measured's fields}, of the last step drawn.

    totals: {module: [{name: Total} of each step]}. Names are those of STATISTICS, and "dense KIND" and "sparse KIND".
    drawn: "the model's own settings", or "dense attention".
    """

    prompts: tuple[str, ...]
    sampling: Mapping[str, Any]
    drawn: str
    settings: Mapping[str, Mapping[str, Any]]
    blocks: Mapping[str, str]
    totals: Mapping[str, Sequence[Mapping[str, Total]]]

    @property
    def names(self) -> list[str]:
        """The statistics that there are, in STATISTICS' order, then the weights of kinds of tokens."""
        found = {name for steps in self.totals.values() for totals in steps for name in totals}
        return [*(name for name in STATISTICS if name in found), *sorted(found - STATISTICS.keys(), key=_place)]

    @property
    def steps(self) -> int:
        """The most steps that any module was seen at."""
        return max(map(len, self.totals.values()))

    def values(self, name: str) -> dict[str, list[float | None]]:
        """{module: [of each step]} of a statistic; None at a step where the module did not run."""
        return {path: [value_of(name, totals.get(name)) for totals in steps] for path, steps in self.totals.items()}

    def grouped(self, group_of: Callable[[str, int], str]) -> dict[str, dict[str, float | None]]:
        """{group: {name: value}} of the modules and steps that `group_of(module, step)` puts together; "all" last."""
        groups = {}
        for path, steps in self.totals.items():
            for step, totals in enumerate(steps):
                for group in (group_of(path, step), "all"):
                    add(groups.setdefault(group, {}), totals)
        groups["all"] = groups.pop("all")
        return {
            group: {name: value_of(name, totals.get(name)) for name in self.names} for group, totals in groups.items()
        }

    def by_block(self) -> dict[str, dict[str, float | None]]:
        """As `grouped`, by the model's blocks: down.1, mid, double ..."""
        return self.grouped(lambda path, step: self.blocks[path])

    def by_step(self) -> dict[str, dict[str, float | None]]:
        """As `grouped`, by denoising steps, counted from 1."""
        return self.grouped(lambda path, step: str(step + 1))

    def to_json(self) -> dict[str, Any]:
        """The result as plain data."""
        return {
            "schema_version": SCHEMA_VERSION,
            "prompts": list(self.prompts),
            "sampling": dict(self.sampling),
            "drawn": self.drawn,
            "settings": {path: dict(setting) for path, setting in self.settings.items()},
            "statistics": {name: _meaning(name) for name in self.names},
            "blocks": self.by_block(),
            "steps": self.by_step(),
            "modules": {name: self.values(name) for name in self.names},
        }


def diagnose(
    pipeline: Any,
    prompts: Iterable[str],
    *,
    sampling: Mapping[str, Any] | None = None,
    seed: int = 0,
    layers: str | list[str] = "all",
    base: bool = False,
    alpha: float | None = None,
    each_word: bool = False,
) -> Diagnosis:
    """The Diagnosis of a pipeline that draws an image of each prompt, seeds counting up from `seed`.

    Modules are measured with their hyperparameters at that step. GAG's zeta, eta and unit are its defaults where the
    operator is another; a pipeline without a patch is measured as the paper's PLADIS would have it. Of joint attention
    it is the block where image meets text. Where words can be told, the weight of kinds of tokens is measured too.
    sampling: as in `draw`. layers: which of the patched modules, as in `surgery.tune`. base: draw with dense attention
    and measure the operations' maps on it; so is a pipeline without a patch drawn. alpha: of the sparse map, in place
    of the operations' own. each_word: each word is a kind too, "word 1" and so on, for prompts of one form.
    The pipeline is afterwards what it was. Raises InputError for no prompts, layers or settings that do not fit and a
    compiled pipeline, UnsupportedModelError for models without surgery.
    """
    prompts, sampling = tuple(prompts), dict(sampling or {})
    if not prompts:
        raise InputError("there is no prompt to draw; give one at least")
    refuse_compiled(pipeline)
    base = base or not patched_modules(pipeline)
    totals = {}
    with surely_patched(pipeline):
        sites = [site for site in attention_sites(denoisers(pipeline)) if site.operation]
        paths = selected_paths(sites, layers)
        blocks = {site.path: _block_of(site) for site in sites}
        operations = [one for one in operations_of(pipeline) if one["operator"] in OPERATORS]
        own = {path: operation for operation in operations for path in operation["layers"]}
        recorder = _Recorder(own if base else {}, alpha, totals)
        with switching(pipeline) as switch, progress_bar("drawing", _total(prompts, sampling), "steps") as advance:
            if base:
                switch([_dense(operation) for operation in operations])
            for number, prompt in enumerate(prompts):
                recorder.words, recorder.kinds, entry = _kinds_of(pipeline, prompt, sampling, each_word)
                with Observer(pipeline, paths, recorder.add, entry):
                    draw(pipeline, [(prompt, seed + number)], sampling, lambda: advance(1))
    drawn = "dense attention" if base else "the model's own settings"
    settings = {path: asdict(measured) for path, measured in recorder.settings.items()}
    return Diagnosis(prompts, sampling, drawn, settings, blocks, totals)


class _Recorder:
    """Adds what an Observer shows up. own: {module: its operation} where the buffers have another, that draws."""

    def __init__(self, own, alpha, totals):
        self._own, self._alpha, self._totals = own, alpha, totals
        self.words: Words | None = None
        self.kinds: dict[str, list[int]] = {}
        self.settings: dict[str, Measured] = {}

    def add(self, call: AttentionCall) -> None:
        """One call."""
        setting = self._own.get(call.path) or call.module.setting()
        if self._alpha is not None:
            setting = {**setting, "alpha": self._alpha}
        known = {each.name for each in fields(Measured)}
        measured = self.settings[call.path] = Measured(**{key: setting[key] for key in known & setting.keys()})
        kinds = self.kinds if self.words is not None and self.words.length == call.key.shape[2] else {}
        steps = self._totals.setdefault(call.path, [])
        steps += [{} for _ in range(call.step + 1 - len(steps))]
        add(steps[call.step], statistics_of(call, measured, kinds))


def _kinds_of(pipeline, prompt, sampling, each_word):
    """(Words, {kind of token: its places}, the prompt's place in a batch); None, {}, None where not known."""
    try:
        text = text_keys(pipeline, prompt, sampling)
        found = words_of(text.encoded, text.length, prompt, special=True)
    except UnsupportedModelError:
        if each_word:
            raise
        return None, {}, None
    return found, places_of(found, each_word), text.entry


def places_of(found: Words, each_word: bool = False) -> dict[str, list[int]]:
    """{kind of token: its places among the keys}; each_word: every word is a kind too."""
    places = {kind: [] for kind in KINDS}
    for column in found.columns:
        kind = column.label.strip("<>")
        places[kind if kind in KINDS and column.label.startswith("<") else "words"] += column.positions
    if each_word:  # a label in angle brackets is of special tokens, or of punctuation
        words = [column for column in found.columns if not column.label.startswith("<")]
        places |= {f"word {number}": list(column.positions) for number, column in enumerate(words, start=1)}
    return {kind: sorted(set(found)) for kind, found in places.items() if found}


def _dense(operation):
    """An operation at which its modules are the base's, but seen."""
    return {**DENSE, "layers": operation["layers"]}


def _total(prompts, sampling):
    return number_of_steps(sampling) * len(prompts)


def value_of(name: str, total: Total | None) -> float | None:
    """A Total as a number, None where there is none."""
    if total is None or not total.count:
        return None
    ratio = total.value / total.count
    return ratio**0.5 if name in STATISTICS and STATISTICS[name].kind == "ratio" else ratio


def _block_of(site):
    """A module's block in short: down.1, mid; of joint attention double or single; else what its path begins with."""
    block = f"{site.block}.{site.path.split('.')[1]}" if site.block in ("down", "up") else site.block
    return path_in_pipeline(further_of(site.path) or "", block)


def _meaning(name):
    if name in STATISTICS:
        return STATISTICS[name].meaning
    way, _, kind = name.partition(" ")
    return f"weight of the {kind} in the {way} map"


def _place(name):
    way, _, kind = name.partition(" ")
    return KINDS.index(kind) if kind in KINDS else len(KINDS) + int(kind.split()[-1]), way
