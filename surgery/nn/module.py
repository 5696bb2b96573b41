"""What every patched attention module is: a diffusers module whose class was changed, with float32 buffers added.

It is made from a live module by changing the class of that very object and registering buffers. So nothing that holds
the module loses it: parents, LoRA layers, quantised Linears, IP-Adapter processors, offload and forward hooks, compiled
blocks. Taking the buffers away and setting the class back is the exact inverse.
"""

from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from .additions import Teller, attend_with_additions
from .compat import KeepsFloat32, is_context_parallel
from .functional import fitting
from .history import History
from .hooks import change_class
from .kernels.fused import IMPLEMENTATIONS, Implementation, attention_by
from .kernels.reference import of_one_dtype
from .operators import (
    ADDITIONS,
    HYPERPARAMETERS,
    LARGEST,
    OPERATORS,
    AdditionName,
    OperatorName,
    Unit,
    setting_problems,
    unknown_name,
    whole_setting,
)
from .schedule import schedule_problems, stored_schedule

_BUFFERS_OF = {operator: tuple(f"pladis_{name}" for name in own.defaults) for operator, own in OPERATORS.items()}
SELF_ATTENTION = "self-attention"  # an operation's `replace`, where that is what it replaces
BUFFERS = tuple(f"pladis_{name}" for name in HYPERPARAMETERS)  # "scale" alone would clash with Attention.scale


class PladisModule(KeepsFloat32, nn.Module if TYPE_CHECKING else object):
    """The part that all patched modules share; it stands before the diffusers class among a class's bases.

    Buffers `pladis_alpha`, `pladis_temperature` and those that the operator has besides (`pladis_scale`, the papers'
    lambda, and so on): float32 scalars that stay float32 under .half(), .to(dtype) and
    from_pretrained(torch_dtype=...). Change them in place (`fill_`, `surgery.tune`): a compiled graph need not be
    compiled again. `pladis_schedule`: how they change over the denoising steps (schedule.py), or None.
    `pladis_additions`: {name of one of ADDITIONS: its schedule or None}, whose hyperparameters are buffers likewise.

    A class has: `stock`, the diffusers class that it is made from; `kind`, "cross" or "joint"; `processors`, the names
    of the processors whose computation its forward() replaces; `own_refusal(module)`; `takes_self_attention`, that it
    computes self-attention too, as an experiment that has to be asked for; and forward().
    """

    stock: Any = None
    kind = "cross"
    processors: tuple[str, ...] = ()
    takes_self_attention = False
    float32_buffers = BUFFERS
    heads: int  # as the diffusers classes have them
    processor: Any
    pladis_operator: OperatorName
    pladis_unit: Unit
    pladis_schedule: dict[str, list] | None
    pladis_replace: str | None
    pladis_implementation: Implementation
    pladis_history: History | None
    pladis_additions: dict[AdditionName, dict[str, list] | None]
    pladis_teller: Teller  # its model's, where it has additions

    @classmethod
    def own_refusal(cls, module: nn.Module) -> str | None:
        """Why a module of the stock class and with one of the processors cannot be converted; None if it can."""
        return None

    @classmethod
    def refusal(cls, module: nn.Module, self_attention: bool = False) -> str | None:
        """Why `module` cannot be converted, as one sentence; None if it can.

        self_attention: that it is asked for as the experiment of PLADIS, Fig. 3, which destroys images.
        """
        if type(module) is not cls.stock:
            return f"{type(module).__name__} is not diffusers' {cls.stock.__name__} class"
        if self_attention:
            reason = cls.self_attention_refusal(module)
        else:
            reason = cls.own_refusal(module) or (split_sequence(module) if cls.kind == "joint" else None)
        if reason:
            return reason
        processor = type(module.processor).__name__
        if processor not in cls.processors:
            return (
                f"its processor {processor} computes attention in its own way, which PLADIS would replace; "
                "go back to the model's default processor first"
            )
        return None

    @classmethod
    def self_attention_refusal(cls, module: nn.Module) -> str | None:
        """Why a module of the stock class cannot be converted as self-attention; None if it can."""
        if cls.kind == "joint":
            return "its self-attention is one softmax with that to the text, of which image to image stays dense"
        if not cls.takes_self_attention:
            return f"{cls.__name__} does not compute self-attention, whose queries and keys turn by their place"
        return "it is no self-attention" if module.is_cross_attention else None

    @classmethod
    def convert(
        cls,
        module: nn.Module,
        operator: OperatorName = "pladis",
        *,
        unit: Unit = "head",
        schedule: dict[str, list] | None = None,
        replace: str | None = None,
        implementation: Implementation = "auto",
        device: torch.device | None = None,
        **hyperparameters: float,
    ) -> Self:
        """Turn a live module of the stock class into this class in place and return it; parameters are not touched.

        hyperparameters: the operator's own; what is left out takes its default. replace: "self-attention" for that
        experiment. device: of the buffers; that of the parameters unless given.
        Raises ValueError for a module that `refusal` names a reason against, an unknown operator, unit, hyperparameter
        or implementation.
        """
        reason = cls.refusal(module, replace == SELF_ATTENTION)
        if reason:
            raise ValueError(reason)
        setting = {"operator": operator, **hyperparameters, **({} if unit == "head" else {"unit": unit})}
        for problem in (*setting_problems(setting), unknown_name("implementation", implementation, IMPLEMENTATIONS)):
            if problem:
                raise ValueError(problem)
        if schedule is not None:
            for key, message in schedule_problems(schedule, operator):
                raise ValueError(f"schedule{f'.{key}' if key else ''} {message}")
        if device is None:
            device = next((p.device for p in module.parameters() if p.device.type != "meta"), torch.device("cpu"))
        change_class(module, cls)
        assert isinstance(module, cls)
        module.pladis_operator, module.pladis_unit = operator, unit
        module.pladis_schedule = None if schedule is None else stored_schedule(schedule)
        module.pladis_implementation, module.pladis_replace = implementation, replace
        module.pladis_history = History() if OPERATORS[operator].keeps else None
        module.pladis_additions, module.pladis_teller = {}, Teller()
        module._register_numbers(whole_setting(setting), device)
        return module

    def _register_numbers(self, setting, device):
        for name in (key for key in setting if key not in ("operator", "unit")):
            # No device given on the meta device's behalf: diffusers builds models there and loads the buffers after.
            self.register_buffer(f"pladis_{name}", torch.tensor(setting[name], dtype=torch.float32, device=device))

    def add(self, name: AdditionName, schedule: dict[str, list] | None = None, **hyperparameters: float) -> None:
        """Give this module one of ADDITIONS, which fits it (configs.py, addition_problems).

        hyperparameters, schedule: its own, as in `convert`; raises ValueError as that.
        """
        setting = {"operator": name, **hyperparameters}
        for problem in setting_problems(setting):
            raise ValueError(problem)
        for key, message in () if schedule is None else schedule_problems(schedule, name):
            raise ValueError(f"schedule{f'.{key}' if key else ''} {message}")
        self.pladis_additions[name] = None if schedule is None else stored_schedule(schedule)
        self._register_numbers(whole_setting(setting), self.pladis_alpha.device)

    def revert(self) -> nn.Module:
        """Turn this very object back into what it was, and return it."""
        for name in self._number_names():
            del self._buffers[f"pladis_{name}"]
        for name in ("operator", "unit", "schedule", "implementation", "replace", "history", "additions", "teller"):
            delattr(self, f"pladis_{name}")
        change_class(self, self.stock)
        return self

    def hyperparameters(self) -> dict[str, float]:
        """{name: float} of all hyperparameters, the additions' too, each the shortest float for its float32 value."""
        return {name: shortest_float(self.number(name)) for name in self._number_names()}

    def _number_names(self):
        own = (OPERATORS[self.pladis_operator], *(ADDITIONS[name] for name in self.pladis_additions))
        return [name for part in own for name in part.defaults]

    def set_hyperparameters(self, values: dict[str, float]) -> None:
        """Write hyperparameters, {name: float}, into the buffers in place."""
        for name, value in values.items():
            self.number(name).fill_(min(float(value), LARGEST))

    def setting(self) -> dict[str, Any]:
        """All that the operator is, as a config says it: with its unit, and self-attention and a schedule if any."""
        setting = self._setting_of(self.pladis_operator, OPERATORS[self.pladis_operator])
        if OPERATORS[self.pladis_operator].projects:
            setting["unit"] = self.pladis_unit
        if self.pladis_replace is not None:
            setting["replace"] = self.pladis_replace
        return setting if self.pladis_schedule is None else {**setting, "schedule": self.pladis_schedule}

    def addition_settings(self) -> list[dict[str, Any]]:
        """All that its additions are, as a config says them."""
        return [
            {**self._setting_of(name, ADDITIONS[name]), **({} if schedule is None else {"schedule": schedule})}
            for name, schedule in self.pladis_additions.items()
        ]

    def _setting_of(self, name, own):
        return {"operator": name, **{key: shortest_float(self.number(key)) for key in own.defaults}}

    def extra_repr(self) -> str:
        """As print(model) shows it: the operator, what its hyperparameters are now, its unit and schedule."""
        parts = [super().extra_repr(), self.pladis_operator]
        for name in self._number_names():
            buffer = self.number(name)
            held = type(buffer) is torch.Tensor and not buffer.is_meta  # not where a compiler stands in for its value
            parts.append(f"{name}={shortest_float(buffer) if held else '?'}")
        more = {"unit": self.pladis_unit if OPERATORS[self.pladis_operator].projects else None}
        more |= {"replace": self.pladis_replace, "schedule": self.pladis_schedule}
        more |= {"additions": self.pladis_additions or None}
        parts += [f"{name}={value!r}" for name, value in more.items() if value is not None]
        return ", ".join(filter(None, parts))

    def set_processor(self, processor: object) -> None:
        """As the stock class's, but a processor with an attention of its own is refused, not ignored."""
        self.check_processor(processor)
        super().set_processor(processor)

    def check_processor(self, processor: object) -> None:
        """Raises ValueError for a processor with an attention of its own, which forward() would not run."""
        name = type(processor).__name__
        if name not in self.processors:
            raise ValueError(
                f"{type(self).__name__} computes attention itself and cannot run {name}; call surgery.unpatch(pipe) "
                "first"
            )

    def fuse_projections(self, *args: object, **kwargs: object) -> None:
        """Nothing: a fused projection goes stale when it is unfused, and forward() reads the separate ones."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, qk_scale: float | None = None
    ) -> Tensor:
        """`attention` by this module's operator. query: (batch, heads, queries, head_dim); the others as there."""
        query, key, value = of_one_dtype(query, key, value)
        key, value = fitting(query, key, value, mask)
        factor = query.shape[3] ** -0.5 if qk_scale is None else qk_scale
        if self.pladis_additions:
            return attend_with_additions(self, query, key, value, mask, factor)
        output, _ = attention_by(
            self.pladis_implementation,
            query,
            key,
            value,
            mask,
            self.hyperparameter_tensors(),
            self.pladis_operator,
            self.pladis_unit,
            factor,
            False,
        )
        return self.accelerated(query, output)

    def accelerated(self, query: Tensor, output: Tensor) -> Tensor:
        """An attention's output, by the history of an operator that keeps one; else as it is. Shapes as `attend`."""
        if self.pladis_history is None:
            return output
        return self.pladis_history.accelerated(query, output, self.number("scale"), self.pladis_unit)

    def number(self, name: str) -> Tensor:
        """A hyperparameter's buffer, a scalar in float32."""
        buffer = self._buffers[f"pladis_{name}"]
        assert buffer is not None
        return buffer

    def _split_heads(self, projected):
        return projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (batch, heads, length, head_dim)

    def _merge_heads(self, output, like):
        """(batch, heads, length, head_dim) as (batch, length, channels), in the dtype of `like`."""
        output = output.transpose(1, 2).flatten(2)
        return output if output.dtype == like.dtype else output.to(like.dtype)

    def _mask_per_head(self, attention_mask, text):
        """An additive mask (batch, 1 or queries, keys) as (batch, 1 or heads, 1 or queries, keys); None as it is."""
        if attention_mask is None:
            return None
        batch, keys, _ = text.shape
        if attention_mask.ndim == 3 and attention_mask.shape[0] == batch and attention_mask.shape[2] == keys:
            return attention_mask.unsqueeze(1)
        attention_mask = self.prepare_attention_mask(attention_mask, keys, batch)  # one of each head, as diffusers does
        return attention_mask.view(batch, self.heads, -1, attention_mask.shape[-1])

    def hyperparameter_tensors(self) -> list[Tensor]:
        """The operator's hyperparameters, the buffers themselves, in the order of OPERATORS."""
        buffers: Any = self._buffers
        return [buffers[name] for name in _BUFFERS_OF[self.pladis_operator]]


def is_pladis(module: nn.Module) -> bool:
    """Whether `module` is a patched attention module, of this file or of any other copy of it.

    By its buffers: diffusers runs a shipped file anew at every load, and each time makes classes of the same name.
    """
    return "pladis_alpha" in module._buffers and "pladis_temperature" in module._buffers


def split_sequence(module: nn.Module) -> str | None:
    """Why joint attention cannot run under context parallelism, where that is switched on; else None."""
    if not is_context_parallel(module.processor):
        return None
    return "context parallelism splits its sequence over devices, and the operator needs all of the text; switch it off"


def warn_of_unknown(keywords: dict[str, Any]) -> None:
    """Log that keyword arguments of a call (cross_attention_kwargs, joint_attention_kwargs) mean nothing here."""
    if keywords:
        from diffusers.utils import logging  # here, as the operators alone do without diffusers

        names = ", ".join(sorted(keywords))
        logging.get_logger(__name__).warning(f"attention arguments {names} mean nothing here; ignored")


def shortest_float(tensor: Tensor) -> float:
    """The float32 scalar as the Python float of fewest digits that rounds to it: 1.3, not 1.2999999523162842."""
    value = tensor.float()
    for digits in range(1, 10):
        candidate = float(f"{value.item():.{digits}g}")
        if torch.tensor(candidate, dtype=torch.float32) == value.cpu():
            return candidate
    return value.item()
