"""The nodes, each once: its inputs and what it does with them. schemas.py makes ComfyUI's two kinds of class of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .attach import add, maps_of, report_of
from .guidance import guide
from .maps import Maps, picture, places_of
from .operations import is_negative, operation, operations_of
from .operators import ADDITIONS, HYPERPARAMETERS, LARGEST, OPERATORS, UNITS, Operator

CATEGORY = "model_patches/pladis-surgery"
_EVERY_SIGMA = 1000.0  # and above: no end


class Input(NamedTuple):
    """An input: its name, ComfyUI's type of it, and what a widget needs. options: of a COMBO."""

    name: str
    type: str
    tooltip: str
    default: Any = None
    least: float | None = None
    most: float | None = None
    options: tuple[str, ...] = ()
    optional: bool = False


class Node(NamedTuple):
    """A node: what ComfyUI calls it and shows, and run(**inputs), which returns one value for each of `outputs`."""

    identifier: str
    title: str
    description: str
    inputs: tuple[Input, ...]
    outputs: tuple[tuple[str, str], ...]  # (type, name)
    run: Callable[..., tuple]
    is_output: bool = False


_MODEL = Input("model", "MODEL", "the model to change; the one that comes in stays as it is")
_LAYERS = Input(
    "layers",
    "STRING",
    "all, a group (down, mid, up; double, single), or patterns over diffusers' module paths, with commas between",
    "all",
)
_WINDOW = (
    Input("sigma_low", "FLOAT", "the noise level from which on it is at work", 0.0, 0.0, _EVERY_SIGMA),
    Input("sigma_high", "FLOAT", "and up to which; 1000 is no end", _EVERY_SIGMA, 0.0, _EVERY_SIGMA),
)
_PROMPT = Input("negative", "CONDITIONING", "the negative prompt, by the model's own text encoder")
_AFTER = Input("after", "LATENT", "of the sampler that has the model, so that this comes after it")
_CHANGED = (("MODEL", "model"), ("STRING", "what"))


def _numbers(operation: Operator) -> tuple[Input, ...]:
    """The hyperparameters of an operator or addition as inputs."""
    found = []
    for name, default in operation.defaults.items():
        limits = HYPERPARAMETERS[name]
        low, high = max(limits.low, -1000.0), min(limits.high, 1000.0)
        if limits.positive:
            low = 0.01
        found.append(Input(name, "FLOAT", f"{limits.meaning}; must {limits.must}", default, low, high))
    return tuple(found)


def _change(name):
    """run() of a node for one of OPERATORS or ADDITIONS."""

    def run(model, sigma_low, sigma_high, layers="all", unit="head", negative=None, **numbers):
        schedule = None
        if sigma_low > 0 or sigma_high < _EVERY_SIGMA:
            schedule = {"sigma": [sigma_low, sigma_high if sigma_high < _EVERY_SIGMA else LARGEST]}
        prompt = None if negative is None else tokens_of(negative)
        return add(model, [operation(name, numbers, layers, unit, schedule, prompt)])

    return run


def tokens_of(conditioning: list) -> Any:
    """The tokens of a CONDITIONING, (1, tokens, channels). ValueError where there are none or several."""
    if len(conditioning) != 1:
        raise ValueError(f"negative: it combines {len(conditioning)} prompts; give the one of a text encoder")
    return conditioning[0][0]


def _artifact(model, path, negative=None):
    operations, made_for = operations_of(path)
    prompt = None if negative is None else tokens_of(negative)
    operations = [one._replace(prompt=prompt) if is_negative(one.operator) else one for one in operations]
    model, what = add(model, operations)
    return model, f"{made_for}; that this checkpoint is that base is not checked\n{what}"


def _report(model, after):
    return after, report_of(model)


def _record(model):
    model, what = add(model, [], Maps())
    return model, what or "the run's softmax weights of the text are recorded"


def _maps(model, after, clip, text, words):
    maps, shown = maps_of(model).mean(), []
    tokenized, empty = clip.tokenize(text), clip.tokenize("")
    for word in (part.strip() for part in words.split(",") if part.strip()):
        places = places_of(tokenized, clip.tokenize(word), empty, maps.shape[0])
        if not places:
            raise ValueError(f"{word!r} is not among the tokens of the text {text!r}")
        shown.append(picture(maps[places].mean(0)))
    if not shown:
        raise ValueError("words: name one or more words of the text, with commas between")
    return after, torch.cat(shown)


def _operator_node(name, title, more=()):
    own = OPERATORS[name]
    unit = (Input("unit", "COMBO", "over what it projects or solves", UNITS[0], options=UNITS),) if own.projects else ()
    text = f"Where the image attends to the text: {own.formula} ({own.source})."
    inputs = (_MODEL, *_numbers(own), *unit, _LAYERS, *_WINDOW, *more)
    return Node(f"PladisSurgery{title.replace(' ', '')}", f"{title} attention", text, inputs, _CHANGED, _change(name))


def _addition_node(name, title):
    own = ADDITIONS[name]
    inputs = (_MODEL, *((_PROMPT,) if is_negative(name) else ()), *_numbers(own), *_WINDOW)
    text = f"{own.title}: {own.formula} ({own.source})."
    return Node(f"PladisSurgery{title}", f"{title} attention", text, inputs, _CHANGED, _change(name))


def _guidance_node(name, title, text, *settings):
    def run(model, sigma_low, sigma_high, **given):
        return guide(model, name, sigma_low, sigma_high if sigma_high < _EVERY_SIGMA else LARGEST, **given)

    identifier = f"PladisSurgery{title.replace('-', '').replace(' ', '')}Guidance"
    return Node(identifier, f"{title} guidance", text, (_MODEL, *settings, *_WINDOW), _CHANGED, run)


NODES: tuple[Node, ...] = (
    _operator_node("pladis", "PLADIS"),
    _operator_node("gag", "GAG"),
    _operator_node("sparse", "Sparse"),
    _operator_node("anderson_least_squares", "Anderson"),
    _operator_node("anderson_history", "Anderson History"),
    _addition_node("nag", "NAG"),
    _addition_node("vsf", "VSF"),
    _addition_node("taca", "TACA"),
    _guidance_node(
        "fdg",
        "FDG",
        "Frequency-decoupled guidance: the CFG scale for low frequencies, another for high ones (arXiv 2506.19713).",
        Input("high", "FLOAT", "the scale of high frequencies", 10.0, -1000.0, 1000.0),
    ),
    _guidance_node(
        "mambo-g",
        "MAMBO-G",
        "A CFG scale that falls where the outputs with and without the prompt are far apart (arXiv 2508.03442).",
        Input("alpha", "FLOAT", "how fast it falls", 8.0, 0.0, 1000.0),
    ),
    _guidance_node(
        "momentum",
        "Momentum",
        "Away from the average of the steps before, with CFG or without (arXiv 2602.20360).",
        Input("scale", "FLOAT", "how far", 0.5, -1000.0, 1000.0),
        Input("decay", "FLOAT", "how much of the average stays at each step", 0.6, 0.0, 0.99),
    ),
    _guidance_node(
        "smc-cfg",
        "SMC-CFG",
        "Sliding mode control: what CFG adds is driven to a surface on which it decays (arXiv 2603.03281).",
        Input("rate", "FLOAT", "lambda there", 5.0, -1000.0, 1000.0),
        Input("gain", "FLOAT", "K there", 0.2, -1000.0, 1000.0),
    ),
    Node(
        "PladisSurgeryLoadArtifact",
        "Load surgery artifact",
        "The settings of an artifact of pladis-surgery, onto a checkpoint that is loaded already.",
        (
            _MODEL,
            Input("path", "STRING", "an artifact's folder, or its surgery.json", ""),
            _PROMPT._replace(optional=True, tooltip="for an artifact with nag or vsf"),
        ),
        _CHANGED,
        _artifact,
    ),
    Node(
        "PladisSurgeryRecordAttention",
        "Record attention",
        "Keeps how much of its softmax weight each place of the image gives to each token of the text, over a run.",
        (_MODEL,),
        _CHANGED,
        _record,
    ),
    Node(
        "PladisSurgeryAttentionMaps",
        "Attention maps",
        "A picture for each word of the prompt: where the image attended to it in the last run.",
        (
            _MODEL,
            _AFTER,
            Input("clip", "CLIP", "whose tokens the prompt was made of"),
            Input("text", "STRING", "the prompt", ""),
            Input("words", "STRING", "words of it, with commas between", ""),
        ),
        (("LATENT", "latent"), ("IMAGE", "maps")),
        _maps,
    ),
    Node(
        "PladisSurgeryReport",
        "Surgery report",
        "How many attention calls of the last run were changed, and why each other one stayed dense.",
        (_MODEL, _AFTER),
        (("LATENT", "latent"), ("STRING", "report")),
        _report,
        True,
    ),
)
