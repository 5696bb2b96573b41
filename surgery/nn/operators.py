"""The attention operators: one table, without torch, that recipes, configs, live patches, cards and kernels read.

With z the scores over the temperature, T_d = softmax(z) V is dense attention and T_s = entmax_alpha(z) V the sparse
one. GAG's base is T_s, so at zeta = 1 and eta = infinity it is PLADIS with a scale one larger. Its paper does not say
over which dimensions it projects: `unit` is "head" (each head's own channels) or "token" (the channels of all heads
together). It does not give the weights of the Anderson surrogate either: ours share PLADIS's scale of 2 evenly.

A new operator is one entry here and its arithmetic: in kernels/reference.py, which defines it, and in the kernels.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

OperatorName = Literal["pladis", "sparse", "gag", "anderson"]
Unit = Literal["head", "token"]
UNITS: tuple[Unit, ...] = get_args(Unit)

LARGEST = 1e30  # what eta = infinity is stored as: JSON has no infinity, and no step is as long


@dataclass(frozen=True)
class Hyperparameter:
    """What a hyperparameter may be, low <= value <= high, which float32 holds; and what it is.

    must: the range in words, behind "must". positive: that its least value stands for "above 0".
    """

    low: float
    high: float
    must: str
    meaning: str
    positive: bool = False


@dataclass(frozen=True)
class Operator:
    """An operator: its hyperparameters with their defaults, in the order in which the kernels take them.

    title: what a card calls it. formula: in Markdown. source: paper and equation. code: its number in the kernels.
    off: the hyperparameters at which it is dense attention, which a schedule sets outside its window. projects: that it
    has a `unit`.
    """

    title: str
    formula: str
    source: str
    code: int
    defaults: Mapping[str, float]
    off: Mapping[str, float] = field(default_factory=lambda: {"scale": 0.0})
    projects: bool = False

    @property
    def settings(self) -> tuple[str, ...]:
        """All that may be set of it: its hyperparameters, and the unit where it has one."""
        return (*self.defaults, *(["unit"] if self.projects else []))


_ALPHA = (1.0, 2.0, "lie in [1, 2] (1 is softmax, 2 is sparsemax)")
_FINITE = (-LARGEST, LARGEST, "be a finite number")
HYPERPARAMETERS = {
    "alpha": Hyperparameter(*_ALPHA, "of the sparse map"),
    "alpha_low": Hyperparameter(*_ALPHA, "of the second sparse map"),
    "scale": Hyperparameter(*_FINITE, "the papers' lambda; above 1 it extrapolates, and weights may be negative"),
    "scale_low": Hyperparameter(*_FINITE, "the share of the second sparse map"),
    "temperature": Hyperparameter(
        1e-30, LARGEST, "be above 0 (1e-30 to 1e30)", "divides the scores of every map (PLADIS, eq. 36)", positive=True
    ),
    "zeta": Hyperparameter(*_FINITE, "the share of the step's part that is orthogonal to T_s"),
    "eta": Hyperparameter(0.0, math.inf, "be 0 or above", "the step's largest length"),
}

_PLADIS = "PLADIS (Kim and Sim 2025, arXiv 2503.07677)"
_GAG = "GAG (Kim 2026, arXiv 2603.02531)"
OPERATORS: dict[OperatorName, Operator] = {
    "pladis": Operator(
        title=_PLADIS,
        formula="`T_d + scale (T_s - T_d)`",
        source="PLADIS, eq. 15",
        code=0,
        defaults={"alpha": 1.5, "scale": 2.0, "temperature": 1.0},
    ),
    "sparse": Operator(
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
            "`T_s + scale min(1, eta / |u|) u`, where `u = r_par + zeta r_orth` and `r = T_s - T_d` is split along "
            "`T_s`"
        ),
        source="GAG, eq. 11-13",
        code=3,
        defaults={"alpha": 1.5, "scale": 10.0, "temperature": 1.0, "zeta": 0.0, "eta": 15.0},
        off={"scale": 0.0, "alpha": 1.0},  # at scale 0 it is T_s: alpha has to make that the dense map
        projects=True,
    ),
    "anderson": Operator(
        title=f"the Anderson surrogate of {_GAG}, an extension of {_PLADIS}",
        formula=("`scale T_s + scale_low T_low + (1 - scale - scale_low) T_d`, where `T_low = entmax_alpha_low(z) V`"),
        source="GAG, Appendix F",
        code=2,
        defaults={"alpha": 1.5, "scale": 1.0, "temperature": 1.0, "alpha_low": 1.25, "scale_low": 1.0},
        off={"scale": 0.0, "scale_low": 0.0},
    ),
}


def value_problem(name: str, value: object) -> str | None:
    """What is wrong with a hyperparameter's value, as "must ..., not ..."; None if its operator is defined for it."""
    limits = HYPERPARAMETERS[name]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return None if is_number and limits.low <= value <= limits.high else f"must {limits.must}, not {value!r}"


def unknown_name(kind: str, name: object, known: Iterable[str]) -> str | None:
    """That `name` is none of the known ones, as a sentence; None if it is."""
    known = tuple(known)
    return None if name in known else f"unknown {kind} {name!r}; there are {', '.join(known)}"


def has_no(operator: OperatorName, name: str) -> str:
    """That an operator has nothing of this name, as a sentence."""
    return f"{operator} has no {name}; it has {', '.join(OPERATORS[operator].settings)}"


def setting_problems(setting: Mapping[str, object]) -> list[str]:
    """What is wrong with {"operator", hyperparameters, "unit"}, a sentence each; what is left out takes its default."""
    operator = setting.get("operator")
    if problem := unknown_name("operator", operator, OPERATORS):
        return [problem]
    own, problems = OPERATORS[operator], []
    if "unit" in setting:
        unit_problem = None if own.projects else f"unit is gag's; {operator} projects nothing"
        problems.append(unknown_name("unit", setting["unit"], UNITS) or unit_problem)
    given = {name: value for name, value in setting.items() if name not in ("operator", "unit")}
    problems += [has_no(operator, name) for name in sorted(given.keys() - own.defaults.keys())]
    for name in own.defaults:
        problem = value_problem(name, given[name]) if name in given else None
        problems.append(problem and f"{name} {problem}")
    return [problem for problem in problems if problem]


def whole_setting(setting: Mapping[str, object]) -> dict[str, object]:
    """A setting without problems, as a config holds it: what is left out by its default, in the operator's order."""
    own = OPERATORS[setting["operator"]]
    numbers = {name: min(float(setting.get(name, default)), LARGEST) for name, default in own.defaults.items()}
    unit = {"unit": setting.get("unit", UNITS[0])} if own.projects else {}
    return {"operator": setting["operator"], **numbers, **unit}
