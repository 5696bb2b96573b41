"""The attention operators: one table, without torch, that recipes, configs, live patches, cards and kernels read.

With z the scores over the temperature, T_d = softmax(z) V is dense attention and T_s = entmax_alpha(z / T) V the sparse
one, T its own `sparse_temperature`. GAG's base is T_s, so at zeta = 1 and eta = infinity it is PLADIS with a scale one
larger. `unit` is over what an operator projects or solves for its weights; the paper does not say: "head" (each head's
own channels, for each query), "token" (the channels of all heads together, for each query) or "image" (all of an image
of the batch: heads, channels and queries), as the code of APG has it, from which GAG takes the projection.

Anderson acceleration (GAG, eq. 6 and Appendix F) weighs iterates F(x_i) by the simplex weights w that minimise
|sum w_i (F(x_i) - x_i)|. F is the attention and x its query, as in Theorem 1: "x acts as the query and (K, V) as stored
memories". Appendix F has no history inside one layer and takes T_s, T_low and T_d of one query in its place: since the
weights sum to 1 their combination is the point of that triangle which is nearest to the query. "anderson_least_squares"
is that; with alpha_low 1, where T_low is T_d, two terms are left: m = 1. "anderson_history" has the true history of
section 3.5: the module keeps x and T_s(x) of the step before. "anderson" are the same three outputs with weights of
one's own.

A new operator is one entry here and its arithmetic: in kernels/reference.py, which defines it, and in the kernels, or,
where it is a combination of whole outputs (no `code`), in kernels/combined.py alone.

ADDITIONS are what a module may have besides its operator, at most one of each `role` (additions.py has their arithmetic
and their order): a negative prompt's keys and values, and what is done to the text's. Their hyperparameters have names
of their own, so that all of a module's are one flat table.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

OperatorName = Literal["pladis", "sparse", "gag", "anderson", "anderson_least_squares", "anderson_history"]
AdditionName = Literal["nag", "vsf", "regions", "taca", "words", "shares", "reinject", "rebalance", "diversity"]
Role = Literal["text", "scores", "keys", "shares", "origin", "gain", "noise"]
TOLD_ROLES = ("text", "keys", "shares", "noise")  # whose modules are told of a run's prompts
Unit = Literal["head", "token", "image"]
UNITS: tuple[Unit, ...] = get_args(Unit)

LARGEST = 1e30  # what eta = infinity is stored as: JSON has no infinity, and no step is as long


@dataclass(frozen=True)
class Hyperparameter:
    """What a hyperparameter may be, low <= value <= high, which float32 holds; and what it is.

    must: the range in words, behind "must". positive: that its least value stands for "above 0". later: that configs
    and recipes from before there was it do not say it; they mean its default.
    """

    low: float
    high: float
    must: str
    meaning: str
    positive: bool = False
    later: bool = False


@dataclass(frozen=True)
class Operator:
    """An operator: its hyperparameters with their defaults, in the order in which the kernels take them.

    title: what a card calls it. formula: in Markdown. source: paper and equation. code: its number in the kernels; None
    for what combines whole outputs of theirs (kernels/combined.py). off: the hyperparameters at which it is dense
    attention, which a schedule sets outside its window. projects: that it has a `unit`. keeps: that a module keeps
    something from one step to the next (history.py).
    """

    title: str
    formula: str
    source: str
    code: int | None
    defaults: Mapping[str, float]
    off: Mapping[str, float] = field(default_factory=lambda: {"scale": 0.0})
    projects: bool = False
    keeps: bool = False
    role: Role | None = None  # of an addition

    @property
    def settings(self) -> tuple[str, ...]:
        """All that may be set of it: its hyperparameters, and the unit where it has one."""
        return (*self.defaults, *(["unit"] if self.projects else []))


_ALPHA = (1.0, 2.0, "lie in [1, 2] (1 is softmax, 2 is sparsemax)")
_FINITE = (-LARGEST, LARGEST, "be a finite number")
_SHARE = (0.0, 1.0, "lie in [0, 1]")
HYPERPARAMETERS = {
    "alpha": Hyperparameter(*_ALPHA, "of the sparse map"),
    "alpha_low": Hyperparameter(*_ALPHA, "of the second sparse map"),
    "scale": Hyperparameter(*_FINITE, "the papers' lambda; above 1 it extrapolates, and weights may be negative"),
    "scale_low": Hyperparameter(*_FINITE, "the share of the second sparse map"),
    "temperature": Hyperparameter(
        1e-30, LARGEST, "be above 0 (1e-30 to 1e30)", "divides the scores of every map (PLADIS, eq. 36)", positive=True
    ),
    "sparse_temperature": Hyperparameter(
        1e-4, 1e4, "lie in [0.0001, 10000]", "divides the scores of the sparse maps alone (PLADIS, Fig. 9)", later=True
    ),
    "zeta": Hyperparameter(*_FINITE, "the share of the step's part that is orthogonal to T_s"),
    "parallel": Hyperparameter(
        *_FINITE, "the share of the step's part along T_s; 0 with zeta 1 is the orthogonal part alone", later=True
    ),
    "eta": Hyperparameter(0.0, math.inf, "be 0 or above", "the step's largest length"),
    "phi": Hyperparameter(*_FINITE, "how far NAG goes from the negative prompt's output"),
    "tau": Hyperparameter(
        1e-30, LARGEST, "be above 0 (1e-30 to 1e30)", "NAG's largest L1 norm, in that of the prompt's", positive=True
    ),
    "blend": Hyperparameter(*_SHARE, "the share of NAG's output, the rest being the prompt's; the paper's alpha"),
    "flip": Hyperparameter(*_FINITE, "what a negative prompt's values are multiplied by, less their sign"),
    "offset": Hyperparameter(*_FINITE, "taken from the scores of a negative prompt's keys"),
    "base": Hyperparameter(*_SHARE, "the share of the prompt's output in a region, the rest being its own prompt's"),
    "gamma": Hyperparameter(
        1e-30, LARGEST, "be above 0 (1e-30 to 1e30)", "multiplies the image's scores with the text", positive=True
    ),
    "kept": Hyperparameter(*_SHARE, "what the weights of start, end and padding are multiplied by"),
    "weight": Hyperparameter(*_FINITE, "how much of the second block's text is brought back"),
    "gain": Hyperparameter(*_FINITE, "multiplies a block's text"),
    "strength": Hyperparameter(*_FINITE, "of the noise on the text, in its standard deviation"),
    "portion": Hyperparameter(*_SHARE, "of the text's numbers that get noise"),
    "held": Hyperparameter(*_SHARE, "how far softmax's shares of start, words and padding are held"),
}

_PLADIS = "PLADIS (Kim and Sim 2025, arXiv 2503.07677)"
_GAG = "GAG (Kim 2026, arXiv 2603.02531)"
_DENSE_MAPS = {"alpha": 1.0, "sparse_temperature": 1.0}  # at which T_s is T_d
OPERATORS: dict[OperatorName, Operator] = {
    "pladis": Operator(
        title=_PLADIS,
        formula="`T_d + scale (T_s - T_d)`",
        source="PLADIS, eq. 15",
        code=0,
        defaults={"alpha": 1.5, "scale": 2.0, "temperature": 1.0, "sparse_temperature": 1.0},
    ),
    "sparse": Operator(  # without a sparse_temperature: its map is the sparse one alone
        title=f"purely sparse attention, which is {_PLADIS} at scale 1",
        formula="`T_s`",
        source="PLADIS, eq. 15 at scale 1",
        code=1,
        defaults={"alpha": 1.5, "temperature": 1.0},
        off={"alpha": 1.0},
    ),
    "gag": Operator(
        title=f"{_GAG}, a refinement of {_PLADIS}",
        formula=(
            "`T_s + scale min(1, eta / |u|) u`, where `u = parallel r_par + zeta r_orth` and `r = T_s - T_d` is split "
            "along `T_s`"
        ),
        source="GAG, eq. 11-13",
        code=3,
        defaults={
            "alpha": 1.5,
            "scale": 10.0,
            "temperature": 1.0,
            "zeta": 0.0,
            "eta": 15.0,
            "sparse_temperature": 1.0,
            "parallel": 1.0,
        },
        off={"scale": 0.0, **_DENSE_MAPS},  # at scale 0 it is T_s, which has to be the dense map
        projects=True,
    ),
    "anderson": Operator(
        title=f"the Anderson surrogate of {_GAG} with given weights, an extension of {_PLADIS}",
        formula=("`scale T_s + scale_low T_low + (1 - scale - scale_low) T_d`, where `T_low = entmax_alpha_low(z) V`"),
        source="GAG, Appendix F, with given weights",
        code=2,
        defaults={
            "alpha": 1.5,
            "scale": 1.0,
            "temperature": 1.0,
            "alpha_low": 1.25,
            "scale_low": 1.0,
            "sparse_temperature": 1.0,
        },
        off={"scale": 0.0, "scale_low": 0.0},
    ),
    "anderson_least_squares": Operator(
        title=f"the Anderson surrogate of {_GAG}, an extension of {_PLADIS}",
        formula=(
            "`w_0 T_s + w_1 T_low + w_2 T_d`, where the `w` of 0 or above, with sum 1, minimise "
            "`|w_0 (T_s - q) + w_1 (T_low - q) + w_2 (T_d - q)|` for the query `q`"
        ),
        source="GAG, Appendix F",
        code=None,
        defaults={"alpha": 1.5, "temperature": 1.0, "alpha_low": 1.25, "sparse_temperature": 1.0},
        off={**_DENSE_MAPS, "alpha_low": 1.0},
        projects=True,
    ),
    "anderson_history": Operator(
        title=f"Anderson acceleration over the denoising steps, as {_GAG} describes it, of {_PLADIS}",
        formula=(
            "`T_s + scale w (T_s' - T_s)`, where `'` is the step before and `w` in [0, 1] minimises "
            "`|(1 - w) (T_s - q) + w (T_s' - q')|` for the queries `q`"
        ),
        source="GAG, eq. 6 with m = 1, and section 3.5",
        code=None,
        defaults={"alpha": 1.5, "scale": 1.0, "temperature": 1.0},
        off={"scale": 0.0, "alpha": 1.0},
        projects=True,
        keeps=True,
    ),
}
ADDITIONS: dict[AdditionName, Operator] = {
    "nag": Operator(
        title="NAG (Chen et al. 2025, arXiv 2505.21179), a negative prompt in attention,",
        formula=(
            "`blend Z + (1 - blend) Z+`, where `Z = u min(1, tau |Z+| / |u|)`, `u = Z+ + phi (Z+ - Z-)`, with the L1 "
            "norm over the heads of a token, and `Z+`, `Z-` are the outputs for the prompt and the negative prompt"
        ),
        source="NAG, its method section; the released code's `nag_scale` is phi + 1",
        code=None,
        defaults={"phi": 5.0, "tau": 2.5, "blend": 0.25},
        off={"blend": 0.0},
        role="text",
    ),
    "vsf": Operator(
        title="VSF (Guo and Du 2025, arXiv 2508.10931), a negative prompt in attention,",
        formula="over the keys `[K+, K-]` with the values `[V+, -flip V-]`, `offset` taken from the scores of `K-`",
        source="VSF, and its released code",
        code=None,
        defaults={"flip": 3.5, "offset": 0.1},
        off={"flip": 0.0, "offset": LARGEST},
        role="text",
    ),
    "regions": Operator(
        title="regional prompts, after Chen et al. 2024 (arXiv 2411.02395),",
        formula=(
            "`base Z + (1 - base) Z_r` for the queries in a region, `Z_r` being the output over the keys of its own "
            "prompt (of all that it lies in), and `Z`, everyone else's, over the prompt's"
        ),
        source="arXiv 2411.02395, and its released code's `base_ratio`",
        code=None,
        defaults={"base": 0.3},
        off={"base": 1.0},
        role="text",
    ),
    "taca": Operator(
        title="TACA (Lv et al. 2025, arXiv 2506.07986)",
        formula="over the scores of image queries with text keys times `gamma`, in the one softmax of joint attention",
        source="TACA, and its released code",
        code=None,
        defaults={"gamma": 1.2},
        off={"gamma": 1.0},
        role="scores",
    ),
    "words": Operator(
        title="weights of start, end and padding tokens reduced",
        formula="with the softmax weights of all keys but words times `kept` before they are normed (0 masks them)",
        source="ours",
        code=None,
        defaults={"kept": 0.0},
        off={"kept": 1.0},
        role="keys",
    ),
    "shares": Operator(
        title="softmax's shares of start, words and padding held",
        formula=(
            "`held sum_g m_g T_g + (1 - held) T`, `T_g` being the operator over the keys of group `g` alone and `m_g` "
            "their share of the softmax"
        ),
        source="ours",
        code=None,
        defaults={"held": 1.0},
        off={"held": 0.0},
        role="shares",
    ),
    "reinject": Operator(
        title="Prompt Reinjection (arXiv 2602.06886)",
        formula=(
            "with a block's text `x` as `z(z(x) + weight z(o)) s(x) + mean(x)`, `o` being the second block's and `z` "
            "less the mean over the standard deviation `s`, of a token"
        ),
        source="Prompt Reinjection, and its released code without rotations",
        code=None,
        defaults={"weight": 0.025},
        off={"weight": 0.0},
        role="origin",
    ),
    "rebalance": Operator(
        title="text weighted block by block (after arXiv 2601.02211)",
        formula="with a block's text times `gain`",
        source="arXiv 2601.02211",
        code=None,
        defaults={"gain": 1.1},
        off={"gain": 1.0},
        role="gain",
    ),
    "diversity": Operator(
        title="noise on the text for more difference between seeds",
        formula=(
            "with the text plus `strength` times its standard deviation times normal noise in a `portion` of its "
            "numbers, the same in every step of an image, by its seed"
        ),
        source="ours, after the seed variance nodes of ComfyUI",
        code=None,
        defaults={"strength": 0.5, "portion": 0.5},
        off={"strength": 0.0},
        role="noise",
    ),
}
OPERATIONS: dict[str, Operator] = {**OPERATORS, **ADDITIONS}  # all that a recipe's `operator` may name
DENSE = {"operator": "pladis", **OPERATORS["pladis"].defaults, "scale": 0.0}  # what an addition stands on by itself


def value_problem(name: str, value: object) -> str | None:
    """What is wrong with a hyperparameter's value, as "must ..., not ..."; None if its operator is defined for it."""
    limits = HYPERPARAMETERS[name]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and limits.low <= value <= limits.high:
        return None
    return f"must {limits.must}, not {value!r}"


def unknown_name(kind: str, name: object, known: Iterable[str]) -> str | None:
    """That `name` is none of the known ones, as a sentence; None if it is."""
    known = tuple(known)
    return None if name in known else f"unknown {kind} {name!r}; there are {', '.join(known)}"


def has_no(operator: str, name: str) -> str:
    """That an operator or addition has nothing of this name, as a sentence."""
    return f"{operator} has no {name}; it has {', '.join(OPERATIONS[operator].settings)}"


def setting_problems(setting: Mapping[str, object]) -> list[str]:
    """What is wrong with {"operator", hyperparameters, "unit"}, a sentence each; what is left out takes its default."""
    operator = setting.get("operator")
    if problem := unknown_name("operator", operator, OPERATIONS):
        return [problem]
    operator = str(operator)
    own, problems = OPERATIONS[operator], []
    if "unit" in setting:
        unit_problem = None if own.projects else has_no(operator, "unit")
        problems.append(unknown_name("unit", setting["unit"], UNITS) or unit_problem)
    given = {name: value for name, value in setting.items() if name not in ("operator", "unit")}
    problems += [has_no(operator, name) for name in sorted(given.keys() - own.defaults.keys())]
    for name in own.defaults:
        problem = value_problem(name, given[name]) if name in given else None
        problems.append(problem and f"{name} {problem}")
    return [problem for problem in problems if problem]


def whole_setting(setting: Mapping[str, Any]) -> dict[str, Any]:
    """A setting without problems, as a config holds it: what is left out by its default, in the operator's order."""
    own = OPERATIONS[setting["operator"]]
    numbers = {name: min(float(setting.get(name, default)), LARGEST) for name, default in own.defaults.items()}
    unit = {"unit": setting.get("unit", UNITS[0])} if own.projects else {}
    return {"operator": setting["operator"], **numbers, **unit}


def standing(operations: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Operations, as a config writes them, with dense attention beneath the additions that have no operator."""
    operations = [dict(one) for one in operations]
    operated = {path for one in operations if one["operator"] in OPERATORS for path in one["layers"]}
    bare = dict.fromkeys(path for one in operations for path in one["layers"] if path not in operated)
    return [*operations, *([{**DENSE, "layers": list(bare)}] if bare else [])]


def later_defaults(operator: str) -> dict[str, float]:
    """{name: value} of an operator's hyperparameters that a config from before there were them means unsaid."""
    return {name: value for name, value in OPERATIONS[operator].defaults.items() if HYPERPARAMETERS[name].later}


def operators_table() -> list[str]:
    """Markdown for a page of documentation: a table of the operators and one of their hyperparameters, line by line."""
    lines = ["| operator | attention | source | settings and defaults |", "|---|---|---|---|"]
    for name, own in OPERATIONS.items():
        settings = [f"{key} {value:g}" for key, value in own.defaults.items()]
        settings += [f"unit {UNITS[0]}"] if own.projects else []
        formula = own.formula.replace("|", r"\|")
        lines.append(f"| `{name}` | {formula} | {own.source} | {', '.join(settings)} |")
    lines += ["", "| hyperparameter | meaning | must |", "|---|---|---|"]
    lines += [f"| `{name}` | {limits.meaning} | {limits.must} |" for name, limits in HYPERPARAMETERS.items()]
    return [*lines, f"| `unit` | over what an operator projects or solves for weights | be one of {', '.join(UNITS)} |"]
