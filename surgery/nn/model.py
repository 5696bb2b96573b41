"""What every patched model class is: the diffusers class whose config says which of its modules are patched.

The classes exist so that a patched model is saved, loaded and shared as such: a folder whose model_index.json names one
either loads patched or is refused. Config and buffers say the same thing twice on purpose; loading compares them.
"""

import contextlib
import inspect
import json
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self, cast

from diffusers.utils import is_accelerate_available
from torch import nn

from .compat import keep_in_float32, rounding_all, set_config, share_lora_scales
from .configs import addition_problems, check_operations, compare_buffers_with_config, module_at
from .further_text import TakesFurtherText
from .history import Clock
from .hooks import change_class, execution_device, forget_buffers, misses_new_buffers, offloaded_to
from .kernels.fused import Implementation
from .module import BUFFERS, SELF_ATTENTION, PladisModule, is_pladis
from .operators import ADDITIONS
from .prompts import Prompts, put_hooks
from .schedule import StepSchedule
from .shipped import module_name, shipped_source

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin

# Behind the value of one key of a saved config, so that the stock class, which ignores keys it does not know and would
# run the model unpatched, stops at that key, and a reader finds these words.
STOCK_CLASS_REFUSAL = " patched with PLADIS: load with surgery.load or trust_remote_code=True"
# Behind another key in memory: what builds its own kind of model of this one (AnimateDiff, ControlNet) stops there
# instead of at the buffers.
_COPY_REFUSAL = " of a model patched with PLADIS, which cannot be copied: surgery.unpatch(pipe), copy, patch again;"


class _EqualsStock(type):
    """A class that equals the diffusers class it stands for: from_pipe() passes on only what equals a type hint."""

    def __eq__(cls, other):
        return other is not None and (other is cls or other is cls.stock)

    __hash__ = type.__hash__


class PladisModel(TakesFurtherText, ModelMixin if TYPE_CHECKING else object, metaclass=_EqualsStock):
    """The part that all patched model classes share; it stands before the diffusers class among a class's bases.

    Config key `pladis`: a list of operations, each {"operator", its hyperparameters, "layers": [module paths]}, with a
    "unit" where the operator has one, where wanted with a "schedule" (schedule.py), and with "replace" where that is
    self-attention. What a config from before there was it does not say means its default. Raises ValueError where the
    config names no layer, an unknown operator or a module that is not there, and where a checkpoint's buffers are
    missing or disagree with the config.

    A class has: `stock`, the diffusers class; `forms`, the classes that its attention modules may become; `marked_key`,
    the key of its config that the stock class cannot read once it is marked; `copied_key`, one that only copying reads;
    `timestep`, what forward() calls it; `timestep_rises`, whether it does while noise falls.
    """

    stock: Any = None
    forms: tuple[type[PladisModule], ...] = ()
    marked_key = "num_layers"
    copied_key: str | None = None
    timestep = "timestep"
    timestep_rises = False

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.__dict__.get("stock") is None:
            return
        share_lora_scales(cls.stock.__name__, cls.__name__)

        def __init__(self, *args, pladis=None, **kwargs):  # noqa: N807  each class has its own signature
            cls._build(self, args, kwargs, pladis)

        # ConfigMixin reads the constructor's signature to know which config keys are its own.
        parameters = dict(inspect.signature(cls.stock.__init__).parameters)
        parameters["pladis"] = inspect.Parameter("pladis", inspect.Parameter.KEYWORD_ONLY, default=None)
        __init__.__signature__ = inspect.Signature(list(parameters.values()))
        cls.__init__ = __init__
        if hasattr(cls.stock, "cache_context"):
            cls.cache_context = _cache_context
        # model_index.json names a component by its class's module: the shipped file, wherever this code came from.
        # Under that name pickle and diffusers find the class.
        sys.modules.setdefault(module_name(cls.__name__), sys.modules[cls.__module__])
        cls.__module__ = module_name(cls.__name__)
        cls.register_for_auto_class("AutoModel")  # a saved config gets `auto_map`

    def _build(self, args, kwargs, pladis):
        self.stock.__init__(self, *args, **self._without_marks(kwargs))
        self._convert_modules(check_operations(pladis), "auto")
        self._write_config(pladis)

    @classmethod
    def form_of(cls, module: nn.Module, self_attention: bool = False) -> type[PladisModule] | None:
        """The class that an attention module of this model may become, or None for a class that is none of `stock`s.

        Where several are made of one diffusers class, the one that knows the module's processor, else the first.
        """
        fitting = [form for form in cls.forms if type(module) is form.stock]
        known = [form for form in fitting if form.refusal(module, self_attention) is None]
        return next(iter(known or fitting), None)

    @classmethod
    def refusal_of(cls, module: nn.Module, path: str, self_attention: bool = False) -> str | None:
        """Why the attention module of this model at `path` cannot be patched, as one sentence; None if it can.

        self_attention: that this is asked for as the experiment that it is.
        """
        form = cls.form_of(module, self_attention)
        if form is None:
            return f"{type(module).__name__} has no PLADIS form in a {cls.stock.__name__}"
        return form.refusal(module, self_attention)

    @classmethod
    def convert(
        cls, model: nn.Module, operations: list[dict[str, Any]], implementation: Implementation = "auto"
    ) -> Self:
        """Turn a live model of the stock class into this class in place, and its named modules into patched ones."""
        operations = check_operations(operations)
        modules = {path: module_at(model, path) for operation in operations for path in operation["layers"]}
        for operation in operations:  # all or none
            for path in operation["layers"] if operation["operator"] not in ADDITIONS else ():
                reason = cls.refusal_of(modules[path], path, operation.get("replace") == SELF_ATTENTION)
                if reason:
                    raise ValueError(reason)
        for _, problem in addition_problems(cls, operations, cls.text_sites(model)):
            raise ValueError(problem)
        if misses_new_buffers(model, modules.values()):
            raise ValueError("it is offloaded in a way that cannot take new buffers; patch first, offload after")
        change_class(model, cls)
        assert isinstance(model, cls)
        model._convert_modules(operations, implementation)
        model.update_config()
        return model

    def _convert_modules(self, operations, implementation):
        device = execution_device(self)
        additions = [operation for operation in operations if operation["operator"] in ADDITIONS]
        for _, problem in addition_problems(type(self), operations, self.text_sites(self)) if additions else ():
            raise ValueError(problem)
        converted = []
        for operation in operations:
            if operation in additions:
                continue
            setting = {key: value for key, value in operation.items() if key != "layers"}
            for path in operation["layers"]:
                module = module_at(self, path)
                self_attention = operation.get("replace") == SELF_ATTENTION
                reason = self.refusal_of(module, path, self_attention)
                if reason:
                    raise ValueError(f"{path}: {reason}")
                where = device and (execution_device(module) or device)
                form = self.form_of(module, self_attention)
                assert form is not None  # or there was a reason
                converted.append(form.convert(module, **setting, implementation=implementation, device=where))
        keeping = [module for module in converted if module.pladis_history is not None]
        if keeping:
            name, names = self.timestep, list(inspect.signature(self.stock.forward).parameters)[1:]
            self._pladis_clock = Clock(names.index(name), name, self.timestep_rises)
            self._pladis_told = self.register_forward_pre_hook(self._pladis_clock, with_kwargs=True)
            for module in keeping:
                module.pladis_history.clock = self._pladis_clock
        for operation in additions:
            setting = {key: value for key, value in operation.items() if key not in ("layers", "operator")}
            for path in operation["layers"]:
                module: Any = module_at(self, path)
                module.add(operation["operator"], **setting)
        if additions:
            self._pladis_hooks = put_hooks(self, any(ADDITIONS[one["operator"]].role == "text" for one in additions))
            self.tell(None)

    @classmethod
    def text_sites(cls, model: nn.Module) -> dict[str, str]:
        """{path: "cross" or "joint"} of the modules of a model, patched or not, that attend to the text."""
        found = {}
        for path, module in model.named_modules():
            if is_pladis(module):
                found[path] = getattr(module, "kind", "cross")
            elif (form := cls.form_of(module)) and cls.refusal_of(module, path) is None:
                found[path] = form.kind
        return found

    def tell(self, prompts: Prompts | None) -> None:
        """What the additions are told of the text in the calls that follow; None for no negative prompt."""
        object.__setattr__(self, "_pladis_prompts", prompts)

    def revert(self) -> nn.Module:
        """Turn this very object back into the stock class's model that it was, and return it."""
        for module in self.modules():
            if is_pladis(module):
                module.revert()
        if "_pladis_told" in self.__dict__:
            self._pladis_told.remove()
            del self._pladis_told, self._pladis_clock
        for hook in self.__dict__.pop("_pladis_hooks", ()):
            hook.remove()
        self.__dict__.pop("_pladis_prompts", None)
        forget_buffers(self, BUFFERS)
        config = self._without_marks(self.config)
        del config["pladis"]
        change_class(self, self.stock)
        set_config(self, config)
        return self

    def update_config(self) -> None:
        """Write the live buffers' values into the config."""
        self._write_config(self.pladis_operations())

    def _write_config(self, operations):
        config = self.refused_by_stock_class({**self.config, "pladis": operations})
        if self.copied_key:
            config[self.copied_key] += _COPY_REFUSAL
        set_config(self, config)
        self._unmark_attribute()

    def register_to_config(self, **kwargs: Any) -> None:
        """As ConfigMixin's."""
        super().register_to_config(**kwargs)
        self._unmark_attribute()

    def _unmark_attribute(self):
        # Who builds another model of this config reads its items, and is refused; pipelines read its attributes.
        setattr(self.config, self.marked_key, _unmarked(self.config.get(self.marked_key)))

    def pladis_operations(self) -> list[dict[str, Any]]:
        """The operations as the live buffers have them, for the config: one per setting, layers in model order."""
        modules = {path: module for path, module in self.named_modules() if is_pladis(module)}
        if offloaded_to(self, modules.values()):
            return self.config["pladis"]  # as it was before; the buffers hold nothing now
        by_setting = {}
        for path, module in modules.items():
            for setting in (module.setting(), *module.addition_settings()):
                by_setting.setdefault(json.dumps(setting), (setting, []))[1].append(path)
        return [{**setting, "layers": layers} for setting, layers in by_setting.values()]

    def scheduled(
        self,
        pipeline: "DiffusionPipeline",
        steps: int | None = None,
        then: Callable | None = None,
        timesteps: list | None = None,
    ) -> StepSchedule:
        """A StepSchedule that carries out the operations' schedules in one run of `pipeline`, those of all denoisers.

        with pipe.unet.scheduled(pipe, steps=25) as callback:
            pipe(prompt, num_inference_steps=25, callback_on_step_end=callback)
        """
        parts = getattr(pipeline, "components", {}).values()
        others = [part for part in parts if part is not self and hasattr(part, "pladis_operations")]
        return StepSchedule(pipeline, [self, *others], steps, then, timesteps)

    def set_attn_processor(self, processor: object | dict[str, object]) -> None:
        """As the stock class's; raises ValueError, and sets none, where a patched module or a name does not fit."""
        if isinstance(processor, dict) and (lacking := sorted(self.attn_processors.keys() - processor.keys())):
            raise ValueError(f"no processor is given for {lacking[0]}; give one for each of model.attn_processors")
        for path, module in self.named_modules():
            if is_pladis(module):
                module.check_processor(processor[f"{path}.processor"] if isinstance(processor, dict) else processor)
        super().set_attn_processor(processor)

    def save_config(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Also writes the code of this class beside the config, so that what is saved can be loaded."""
        # Hooked here because a save_pretrained(*args, **kwargs) of ours would hide variant= and max_shard_size= from
        # the pipeline, which looks for them in its signature.
        manifest = os.path.join(os.path.dirname(os.path.abspath(save_directory)), "surgery.json")
        if os.path.exists(manifest):
            raise ValueError(f"{manifest} describes an artifact, which saving into it would break; save elsewhere")
        self.update_config()
        super().save_config(save_directory, *args, **kwargs)
        name = type(self).__name__
        with open(os.path.join(save_directory, module_name(name) + ".py"), "w", encoding="utf-8") as file:
            file.write(shipped_source(name))

    def to_json_string(self) -> str:
        """The config as it is saved: marked so that the stock class refuses it."""
        return json.dumps(self.refused_by_stock_class(json.loads(super().to_json_string())), indent=2) + "\n"

    @classmethod
    def refused_by_stock_class(cls, config: dict[str, Any]) -> dict[str, Any]:
        """A config that the stock class cannot load; this class reads it as before."""
        default = inspect.signature(cls.stock.__init__).parameters[cls.marked_key].default
        config = cls._without_marks(config)
        value = config.get(cls.marked_key, default)
        return {**config, cls.marked_key: f"{'' if value is None else value}{STOCK_CLASS_REFUSAL}"}

    @classmethod
    def auto_map(cls) -> dict[str, str]:
        """Where diffusers' AutoModel finds this class in a folder of it, for a config or an index."""
        return {"AutoModel": f"{cls.__module__}.{cls.__name__}"}

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """As ConfigMixin's, without a warning of `auto_map`, which is for AutoModel alone."""
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    @classmethod
    def _without_marks(cls, config):
        keys = config.keys() & {cls.marked_key, cls.copied_key}
        return {**config, **{key: _unmarked(config[key]) for key in keys}}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self:
        """As diffusers' from_pretrained; raises ValueError where buffers are missing or disagree with the config."""
        with_info = kwargs.pop("output_loading_info", False)
        low_memory = kwargs.get("low_cpu_mem_usage", True) and is_accelerate_available()
        if low_memory:
            loaded: Any = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
            model, info = loaded
        else:
            # diffusers keeps nothing in float32 on this path, so load in the file's own precision and cast after: .to()
            # leaves the buffers float32.
            dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
            kwargs.pop("torch_dtype", None)
            load = super(PladisModel, rounding_all(cls)).from_pretrained  # pyright: ignore[reportArgumentType] made of cls
            model, info = load(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
            model.__class__ = cls
            model = model if dtype is None else model.to(dtype)
        compare_buffers_with_config(model, info, pretrained_model_name_or_path)
        return cast("Self", (model, info) if with_info else model)


keep_in_float32(PladisModel, BUFFERS)


@contextlib.contextmanager
def _cache_context(self, name, **more):
    """As the stock class's; also tells what keeps a history, and a negative prompt, in which call of a step it is."""
    clock = self.__dict__.get("_pladis_clock")
    before, before_context = None if clock is None else clock.call, self.__dict__.get("_pladis_context")
    with super(PladisModel, self).cache_context(name, **more):
        self.__dict__["_pladis_context"] = name
        if clock is not None:
            clock.call = name
        try:
            yield
        finally:
            self.__dict__["_pladis_context"] = before_context
            if clock is not None:
                clock.call = before


def _unmarked(value):
    """The value of a config's marked key without the mark."""
    if not isinstance(value, str):
        return value
    value = value.removesuffix(STOCK_CLASS_REFUSAL).removesuffix(_COPY_REFUSAL)
    return int(value) if value.isdecimal() else value or None
