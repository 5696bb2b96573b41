"""The one hook of this pack: what stands in a model's options, and computes the attention calls that operations change.

ComfyUI asks `optimized_attention_override` at each attention whose caller hands it transformer_options, but does not
say where. So around a call of the model (the wrapper of APPLY_MODEL) the modules that attend to the text (layouts.py)
carry forward hooks, which note where the model is and where its text stands. Nothing of it outlives that call, and a
model without the node has nothing of it.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import report as said
from .layouts import Layout, Site, layout_of, sites_of
from .maps import Maps
from .negative import Negative
from .operations import Operation, combined, is_negative, selects
from .operators import (
    ADDITIONS,
    DENSE,
    WINDOWS,
    PladisModule,
    Teller,
    attend_jointly,
    for_all_heads,
    is_inside,
    negative_role,
    step_values,
    with_bias,
)

KEY = "pladis_surgery"  # in a model's options
_NAMES = ("x", "t", "c_concat", "c_crossattn", "control", "transformer_options")  # of apply_model, by position


class _Call(nn.Module):
    """What stands for a module of diffusers: none of its projections, the attention between them alone."""

    processor = None
    heads = 1

    def forward(self) -> None:
        """Nothing: the hook calls `attend`."""


class CrossCall(PladisModule, _Call):
    """A cross-attention of ComfyUI's."""

    stock, kind, processors = _Call, "cross", ("NoneType",)


class JointCall(PladisModule, _Call):
    """A joint attention of ComfyUI's."""

    stock, kind, processors = _Call, "joint", ("NoneType",)


class _Place:
    """Where in the model a call is: with a module that changes it, or the reason why none does."""

    def __init__(self, module: Any, reason: str = "", name: str = "", text: int = 0, length: int = 0, skip: int = 0):
        self.module, self.reason, self.name = module, reason, name
        self.text, self.length, self.skip = text, length, skip
        self.asked = 0


class Hook:
    """Operations of a chain of nodes, at work. below: the override that was there before, which dense calls go to."""

    def __init__(self, operations: Sequence[Operation], below: Callable | None = None) -> None:
        self.operations, self.below = tuple(operations), below
        self.report = said.Report()
        self.teller = Teller()
        self.maps: Maps | None = None
        self._modules: dict[tuple, Any] = {}
        self._sites: tuple[Any, list[Site]] | None = None
        self._end_call()

    def __deepcopy__(self, memo: dict) -> "Hook":
        return self  # ComfyUI copies a model's options with each clone

    def sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """ComfyUI's wrapper of OUTER_SAMPLE: one run, whose report is logged."""
        self.report.clear()
        self._modules.clear()  # their histories are a run's
        if self.maps is not None:
            self.maps.clear()
        try:
            return executor(*args, **kwargs)
        finally:
            self.report.runs += 1
            level = logging.INFO if self.report.changed else logging.WARNING
            logging.log(level, "pladis-surgery: %s", self.report)

    def apply(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """ComfyUI's wrapper of APPLY_MODEL: one call of the model."""
        given = {**dict(zip(_NAMES, args, strict=False)), **kwargs}
        model = executor.class_obj.diffusion_model
        model = getattr(model, "_orig_mod", model)  # a compiled one
        layout = layout_of(model)
        self.report.model = type(model).__name__
        self.report.calls += 1
        if layout is None:
            self.report.note(f"this pack does not know where ComfyUI's {type(model).__name__} has its text")
            return executor(*args, **kwargs)
        handles = []
        try:
            given = self._begin_call(model, layout, given)
            for site in self.sites(model, layout):
                handles += self._watch(site, layout)
            first = [given.pop(name) for name in _NAMES[: len(args)]]
            return executor(*first, **given)
        finally:
            for handle in handles:
                handle.remove()
            self._end_call()

    def override(self, function: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """ComfyUI's optimized_attention_override: one attention."""
        place = self._places[-1] if self._places else None
        if place is not None:
            place.asked += 1
            output = self.attended(place, *args, **kwargs)
            if output is not None:
                return output
        return function(*args, **kwargs) if self.below is None else self.below(function, *args, **kwargs)

    def replaced(self, site: Site) -> Callable:
        """ComfyUI's attn2 replacement of a UNet's module, for versions without the override."""

        def attend(query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, Any]) -> Tensor:
            if not self._is_begun:
                self._set_time(options)
            place = self._place(site, 0, key.shape[1])
            output = self.attended(place, query, key, value, options["n_heads"])
            return _dense(query, key, value, options["n_heads"]) if output is None else output

        return attend

    def sites(self, model: Any, layout: Layout) -> list[Site]:
        """The model's sites; its modules are walked once."""
        if self._sites is None or self._sites[0] is not model:
            self._sites = model, sites_of(model, layout)
        return self._sites[1]

    def attended(
        self,
        place: _Place,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: Any = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **_: Any,
    ) -> Tensor | None:
        """An attention by a place's module, with the arguments that ComfyUI's have; None where it is to stay dense."""
        query, key, value = (states if skip_reshape else _split(states, q, heads) for states in (q, k, v))
        key, value = for_all_heads(key, heads), for_all_heads(value, heads)
        first = self._layout is None or self._layout.text_first
        if self.maps is not None and not self._other(place, query, key):
            self.maps.take(query, key, place.text, first, self._latents, self._conds)
        if reason := self._other(place, query, key) or place.reason:
            self.report.dense[reason] += 1
            return None
        module = self._on(place.module, query.device)
        mask = _four_dimensions(mask)
        if place.length:
            output = attend_jointly(module, query, key, value, place.text, first, mask)
        else:
            output = module.attend(query, key, value, self._without_repeats(mask, key))
        self.report.changed[place.name] += 1
        output = output.to(q.dtype)
        return output if skip_output_reshape else output.transpose(1, 2).flatten(2)

    def _other(self, place, query, key):
        """Why a call inside a place is none of the place's own; None if it is."""
        if place.length:
            lengths = query.shape[2], key.shape[2]
            return None if lengths == (place.length, place.length) else said.OTHER_KIND
        if place.skip and place.asked == 1:
            return said.OTHER_IMAGE
        return said.ONE_KEY if key.shape[2] == 1 else None

    # One call of the model

    def _begin_call(self, model, layout, given):
        self._layout, self._is_begun = layout, True
        options = given.get("transformer_options") or {}
        self._set_time({"sigmas": given["t"], **options})
        context = given.get("c_crossattn")
        joint = bool(layout.stacks) and layout.stacks[0].kind == "joint"
        self._repeats = None if joint else repeated(context, options.get("cond_or_uncond", ()))
        mask = given.get("attention_mask")
        self._is_uneven = layout.uneven and mask is not None and len(set(_kept(mask))) > 1
        self._conds, self._latents = list(options.get("cond_or_uncond") or ()), tuple(given["x"].shape)
        sites = self.sites(model, layout)
        self._negative = Negative.of(self, layout, sites, given, options)
        return given if self._negative is None or not joint else self._negative.behind(given)

    def _end_call(self):
        self._places: list[_Place | None] = []
        self._layout: Layout | None = None
        self._is_begun, self._is_uneven = False, False
        self._repeats: Tensor | None = None
        self._negative: Negative | None = None
        self._image, self._conds, self._latents = 0, [], ()
        self._time: tuple[int, int, float] = (0, 1, 0.0)
        self.held = [True] * len(self.operations)

    def _set_time(self, options):
        """Read the noise level from a call's options, and which operations hold there."""
        windowed = [one for one in self.operations if one.schedule]
        keeping = any(one.operator == "anderson_history" for one in self.operations)
        if not windowed and not keeping:
            return
        sigma = float(options["sigmas"].flatten()[0])
        levels = options.get("sample_sigmas")
        levels = [sigma, 0.0] if levels is None else [float(level) for level in levels]
        steps = max(len(levels) - 1, 1)
        # A call between two levels, of a sampler of second order, is of the step that began above it.
        step = min(max(sum(level >= sigma * (1 - 1e-5) for level in levels) - 1, 0), steps - 1)
        self._time = step, steps, sigma
        self.held = [one.schedule is None or is_inside(one.schedule, step, steps, sigma) for one in self.operations]

    def _watch(self, site, layout):
        """Forward hooks on a site's module, which are removed after this call of the model."""

        def enter(module, args, kwargs):
            place, changed = self._entered(site, layout, args, kwargs)
            self._places.append(place)
            return changed

        def leave(*_):
            place = self._places.pop()
            if place is not None and not place.asked:
                self.report.dense[said.UNASKED] += 1

        enters = site.module.register_forward_pre_hook(enter, with_kwargs=True)
        return [enters, site.module.register_forward_hook(leave, always_call=True)]

    def _entered(self, site, layout, args, kwargs):
        """(the place that a module's call is, None if it attends to no text; the call's arguments if they change)."""
        stack = site.stack
        if stack.image is not None:
            self._image = _given(stack.image, args, kwargs).shape[1]
        if site.path is None:
            return None, None
        if stack.kind == "cross":
            text = _given(stack.text, args, kwargs)
            if text is None or (args and text is args[0]):  # self-attention
                return None, None
            skip = 0 if stack.images is None else int(_given(stack.images, args, kwargs) or 0)
            place = self._place(site, 0, text.shape[1], skip)
            if self._negative is not None and place.module is not None and negative_role(place.module):
                return place, _with(stack.text, args, kwargs, self._negative.after(text))
            return place, None
        if stack.text is not None:
            text = _given(stack.text, args, kwargs).shape[1]
            return self._place(site, text, text + self._image), None
        length = _given(stack.sequence, args, kwargs).shape[1]
        return self._place(site, length - self._image if self._image else 0, length), None

    def _place(self, site, text, length, skip=0):
        joint = site.stack.kind == "joint"
        chosen = [selects(one.layers, site) and self._fits(one, joint) for one in self.operations]
        key = combined(self.operations, [a and b for a, b in zip(chosen, self.held, strict=True)])
        where = {"text": text, "length": length if joint else 0, "skip": skip}
        if joint and self._is_uneven:
            return _Place(None, said.UNEVEN)
        if joint and not 0 < text < length:
            return _Place(None, said.NO_PLACE)
        if key == (None, ()):
            return _Place(None, said.OUTSIDE if any(chosen) else said.UNSELECTED, **where)
        name = "; ".join(str(self.operations[index]) for index in (key[0], *key[1]) if index is not None)
        return _Place(self._module(site.path, joint, key), "", name, **where)

    def _fits(self, operation, joint):
        """Whether an addition has a meaning in this kind of attention, and in this call."""
        if operation.operator not in ADDITIONS:
            return True
        if is_negative(operation.operator):
            return self._negative is not None and self._negative.operation is operation
        role = ADDITIONS[operation.operator].role
        if role == "scores":
            if not joint:
                self.report.note(f"{operation.operator} is for joint attention, which this model has not everywhere")
            return joint
        reason = "regional prompts are ComfyUI's own, by conditioning" if role == "text" else "it acts between blocks"
        if role in ("keys", "shares"):
            reason = "ComfyUI does not tell which tokens are words"
        self.report.note(f"{operation.operator} is left out: {reason}")
        return False

    def _module(self, path, joint, key):
        """The module of a path with an operator and additions, by their places among the operations."""
        module = self._modules.get((path, key))
        operator, additions = key
        if module is None:
            form = JointCall if joint else CrossCall
            if operator is None:
                module = form.convert(_Call(), **DENSE)
            else:
                one = self.operations[operator]
                module = form.convert(_Call(), one.operator, unit=one.unit, **one.numbers)
            for index in additions:
                module.add(self.operations[index].operator, **self.operations[index].numbers)
            module.pladis_teller = self.teller
            self._modules[path, key] = module
        step, steps, sigma = self._time
        for index in (operator, *additions):
            one = None if index is None else self.operations[index]
            if one is not None and set(one.schedule or ()) - set(WINDOWS):
                module.set_hyperparameters(step_values(one.schedule, one.operator, step, steps, sigma))
        if module.pladis_history is not None:
            clock = module.pladis_history.clock
            clock.timestep, clock.call = torch.tensor(sigma), str(self._conds)
        return module

    @staticmethod
    def _on(module, device):
        return module if module.pladis_alpha.device == device else module.to(device)

    def _without_repeats(self, mask, key):
        """A mask that also leaves out what `repeated` found."""
        if self._repeats is None or self._repeats.shape[-1] > key.shape[2]:
            return mask
        keep = self._repeats.to(key.device)
        more = key.shape[2] - keep.shape[-1]  # tokens that nodes put behind the text's
        keep = torch.nn.functional.pad(keep, (0, more), value=True)[:, None, None]
        if mask is None:
            return keep
        return mask & keep if mask.dtype == torch.bool else with_bias(keep, mask)


def repeated(context: Tensor | None, conds: Sequence[int]) -> Tensor | None:
    """(batch, tokens) bool: which tokens of the text are no repetition; None where there is none.

    ComfyUI puts prompts of several lengths into one batch by repeating the shorter, up to four times, which softmax
    attention does not notice. Sparse attention does: it chooses among keys.
    """
    if context is None or len(conds) < 2 or context.ndim != 3:
        return None
    batch, tokens, _ = context.shape
    keep = torch.ones(batch, tokens, dtype=torch.bool, device=context.device)
    for times in (2, 3, 4):
        if tokens % times:
            continue
        parts = context.unflatten(1, (times, -1))
        same = (parts == parts[:, :1]).flatten(1).all(1)
        keep[:, tokens // times :] &= ~same[:, None]
    return None if bool(keep.all()) else keep


def _given(argument, args, kwargs) -> Any:
    """An argument of a module's forward(); None where it is left out."""
    name, place = argument
    return kwargs[name] if name in kwargs else args[place] if place < len(args) else None


def _with(argument, args, kwargs, value):
    """(args, kwargs) with another value of an argument."""
    name, place = argument
    if name in kwargs or place >= len(args):
        return args, {**kwargs, name: value}
    return (*args[:place], value, *args[place + 1 :]), kwargs


def _split(states, query, heads):
    """(batch, length, channels) as (batch, heads, length, head_dim), head_dim being the query's.

    SD 3 has its values split already, (batch, length, heads, head_dim), which ComfyUI's functions take too.
    """
    return states.reshape(*states.shape[:2], -1, query.shape[-1] // heads).transpose(1, 2)


def _four_dimensions(mask):
    """A mask as ComfyUI's attention functions take it, (queries, keys) or with a batch, as (batch, heads, ...)."""
    if mask is None or mask.ndim > 3:
        return mask
    return mask[None, None] if mask.ndim == 2 else mask[:, None]


def _kept(mask):
    """How many tokens each row of an attention mask keeps."""
    kept = mask > -1.0 if mask.is_floating_point() and bool((mask < 0).any()) else mask != 0
    return kept.flatten(1).sum(1).tolist()


def _dense(query, key, value, heads):
    query, key, value = (_split(states, query, heads) for states in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
