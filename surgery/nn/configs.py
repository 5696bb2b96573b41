"""What a patched model's config says of its operations: checked, and held to the buffers that were loaded."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .module import BUFFERS, SELF_ATTENTION
from .operators import ADDITIONS, OPERATIONS, OPERATORS, later_defaults, setting_problems
from .schedule import schedule_problems
from .text_stream import has_text_apart


def check_operations(operations: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """The config's list of operations, or ValueError saying what is wrong with it."""
    if operations and not (isinstance(operations, (list, tuple)) and all(isinstance(o, dict) for o in operations)):
        raise ValueError("the config's `pladis` must be a list of operations")
    if not operations:
        raise ValueError("the config's `pladis` names no layer; an unpatched model is one of diffusers' own class")
    seen = {}
    for index, operation in enumerate(operations):
        operator: Any = operation.get("operator")
        names = (*OPERATIONS[operator].settings, "layers") if operator in tuple(OPERATIONS) else ()
        missing = [key for key in names if key not in {**operation, **later_defaults(operator)}]
        if missing:
            raise ValueError(f"the config's pladis[{index}] lacks {', '.join(missing)}")
        setting = {key: value for key, value in operation.items() if key not in ("layers", "schedule", "replace")}
        for problem in setting_problems(setting):
            raise ValueError(f"the config's pladis[{index}]: {problem}")
        if operation.get("replace", SELF_ATTENTION) != SELF_ATTENTION:
            raise ValueError(f"the config's pladis[{index}].replace must be {SELF_ATTENTION!r} or left out")
        if "schedule" in operation:
            for key, message in schedule_problems(operation["schedule"], operator):
                raise ValueError(f"the config's pladis[{index}].schedule{f'.{key}' if key else ''} {message}")
        of_role = seen.setdefault(OPERATIONS[operator].role, set())
        twice = of_role.intersection(operation["layers"])
        if twice:
            raise ValueError(f"the config's pladis[{index}] names {sorted(twice)[0]} a second time")
        of_role.update(operation["layers"])
    operated = seen.get(None, set())
    for index, operation in enumerate(operations):
        if bare := sorted(set(operation["layers"]) - operated):
            raise ValueError(f"the config's pladis[{index}] names {bare[0]}, which has no operator that it adds to")
    return operations


def addition_problems(
    model_class: Any, operations: list[dict[str, Any]], kinds: Mapping[str, str]
) -> list[tuple[int, str]]:
    """What is wrong with the additions among operations for a model: [(index of the operation, a sentence)].

    model_class: the patched class. kinds: {path: "cross" or "joint"} of every module that attends to the text.
    """
    problems, everywhere = [], {}
    operators = {path: one for one in operations if one["operator"] in OPERATORS for path in one["layers"]}
    for index, operation in enumerate(operations):
        name, layers = operation["operator"], operation["layers"]
        if name not in ADDITIONS:
            continue
        role, of_kind = ADDITIONS[name].role, {kinds.get(path) for path in layers}
        below = [operators[path] for path in layers if path in operators]
        message = None
        if any("replace" in one for one in below):
            message = f"{name} is for attention to text, and the module is self-attention"
        elif keeping := [one["operator"] for one in below if OPERATORS[one["operator"]].keeps]:
            message = f"{name} does not go with {keeping[0]}, which keeps one output of each step"
        elif name == "taca" and of_kind != {"joint"}:
            message = "taca is for joint attention; where all scores are the text's, temperature divides them"
        elif role in ("origin", "gain") and of_kind != {"joint"}:
            message = f"{name} is for joint attention; in cross-attention every block reads the same text"
        elif role in ("origin", "gain") and (
            whole := [path for path in layers if not has_text_apart(model_class.backbone, path)]
        ):
            message = f"{name}: the block of {whole[0]} is given text and image in one stream, with no text apart"
        elif name == "shares" and "joint" in of_kind:
            message = "shares is for cross-attention; in joint attention the text's share is held as it is"
        elif name == "regions" and (heard := [path for path in layers if path.rpartition(".")[2].startswith("audio")]):
            message = f"regions are of the picture, and {heard[0]} is of the sound; choose layers: ['*.attn2']"
        elif role == "text" and "joint" in of_kind:
            everywhere.setdefault(index, set()).update(layers)
        if message:
            problems.append((index, message))
    negative = set().union(*everywhere.values())
    if missing := [path for path, kind in kinds.items() if kind == "joint" and path not in negative]:
        problems += [
            (
                index,
                f"a negative prompt's tokens go through every block of joint attention, so {missing[0]} needs it too",
            )
            for index in everywhere
        ]
    return problems


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module of `model` at a dotted path; ValueError naming the path where there is none."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"this model has no module {path}") from None


def compare_buffers_with_config(model, info, source):
    missing, unnamed = (
        sorted(key for key in info[kind] if key.rpartition(".")[2] in BUFFERS)
        for kind in ("missing_keys", "unexpected_keys")
    )
    # An older config, whose weights have no buffer of it either, says nothing of what was not there yet.
    unsaid = {
        f"{path}.pladis_{name}": value
        for operation in model.config.pladis
        for name, value in later_defaults(operation["operator"]).items()
        if name not in operation
        for path in operation["layers"]
    }
    for key in unsaid.keys() & set(missing):
        path, _, buffer = key.rpartition(".")
        module: Any = module_at(model, path)
        where = module.pladis_alpha.device
        module._buffers[buffer] = torch.tensor(unsaid[key], dtype=torch.float32, device=where)
    missing = [key for key in missing if key not in unsaid]
    if unnamed:
        raise ValueError(
            f"{source}: the weights hold {unnamed[0]}, but the config names no operation there that has it; the config "
            "was edited: fetch or build the model again"
        )
    if missing:
        raise ValueError(
            f"{source}: {len(missing)} PLADIS buffers are not in the weights, the first {missing[0]}; the shard that "
            "holds them, or its index, is missing or damaged: fetch or build the model again"
        )
    for index, operation in enumerate(model.config.pladis):
        for path in operation["layers"]:
            for name in OPERATIONS[operation["operator"]].defaults:
                buffer = f"pladis_{name}"
                found = module_at(model, path).get_buffer(buffer)
                said = {**later_defaults(operation["operator"]), **operation}[name]
                wanted = torch.tensor(float(said), dtype=torch.float32)
                if found.device.type != "meta" and not torch.equal(found.detach().cpu(), wanted):
                    raise ValueError(
                        f"{source}: the config says {name} {said} (pladis[{index}]) but {path}.{buffer} "
                        f"holds {found.item()}; one of the two was edited: fetch or build the model again"
                    )
