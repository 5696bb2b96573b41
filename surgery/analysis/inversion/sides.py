"""What each side of an inversion runs: dense attention, and operators as a pipeline has them or by their defaults."""

from collections.abc import Iterable
from typing import Any

from surgery.errors import InputError, nearest
from surgery.models.patching import attachment, denoisers, operations_of
from surgery.nn.operators import OPERATORS, whole_setting

from ..observing import surely_patched

DENSE = "dense"
_SHARED = ("alpha", "temperature")  # what the sides have in common with the pipeline's own operation


def sides_of(pipeline: Any, operators: Iterable[str]) -> dict[str, list[dict[str, Any]] | None]:
    """{name: its operations, None for dense} of "dense", which comes first, named or not, and the operators named.

    Where an operation of the pipeline has the operator, the side keeps it as it is; else the side has the operator's
    defaults with that operation's alpha, temperature and layers. A pipeline without a patch has it on all layers.
    Raises InputError for an unknown or repeated operator and for operations with a schedule or a compiled engine.
    """
    operators, known = tuple(operators), (DENSE, *OPERATORS)
    for name in operators:
        if name not in known:
            near = nearest(name, known)
            hint = f"; did you mean {near}?" if near else ""
            raise InputError(f"there is no operator {name!r}{hint} There are: {', '.join(known)}")
    if len(set(operators)) != len(operators):
        raise InputError(f"an operator is named twice: {', '.join(operators)}")
    own = _operations(pipeline)
    if any("schedule" in operation for operation in own):
        raise InputError(
            "the model's operations have a schedule, which is for the way from noise alone: apply its recipe without "
            "one and invert that"
        )
    if any(map(attachment, denoisers(pipeline).values())):
        raise InputError("the model runs a compiled engine, which computes one operator alone; load it without engine")
    others = [name for name in operators if name != DENSE]
    return {DENSE: None} | {name: [_by(name, operation) for operation in own] for name in others}


def _operations(pipeline):
    """The pipeline's own operations; those of `surgery.patch` where it has none."""
    with surely_patched(pipeline):
        return [one for one in operations_of(pipeline) if one["operator"] in OPERATORS]  # additions are left out


def _by(operator, operation):
    if operation["operator"] == operator:
        return operation
    shared = {name: operation[name] for name in _SHARED}
    return {**whole_setting({"operator": operator, **shared}), "layers": operation["layers"]}
