"""Patch a live pipeline in place, change its hyperparameters, take the patch out again."""

import gc
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

from surgery.compat import without_compile
from surgery.errors import InputError, UnsupportedModelError
from surgery.nn.backbones import backbone_of
from surgery.nn.operators import (
    ADDITIONS,
    HYPERPARAMETERS,
    LARGEST,
    AdditionName,
    OperatorName,
    Unit,
    setting_problems,
    standing,
    unknown_name,
    value_problem,
    whole_setting,
)

from .anatomy import AttentionSite, attention_sites, refusal_of_class
from .denoisers import DENOISERS, further_of, joined_operations, own_operations, path_in_pipeline
from .modular import is_modular, tell_class
from .selection import DESTROYS, REPLACED, REPLACES, STREAMS, kinds_of, select_sites, sites_in

if TYPE_CHECKING:
    import torch

ENGINE = "pladis_engine"  # the attribute of a model that an engine runs


def patch(
    pipeline: Any,
    *,
    operator: OperatorName | AdditionName = "pladis",
    layers: str | list[str] = "all",
    blocks: Literal["all", "double", "single"] = "all",
    replace: Literal["cross-attention", "joint-attention", "self-attention"] = "cross-attention",
    unit: Unit = "head",
    schedule: dict[str, Any] | None = None,
    implementation: str = "auto",
    **hyperparameters: float,
) -> Any:
    """Replace attention to text in a live pipeline (or bare denoiser) by its PLADIS form, in place; returns it.

    Parameters stay the very tensors that they were. Of a pipeline with two denoisers both are patched.
    operator: "pladis", "sparse", "gag" or one of the andersons, or what modules may have besides: "nag" or "vsf", a
        negative prompt (surgery.negative), "taca", "words" or "shares". These may be added to a pipeline that is
        patched; modules that have no operator keep dense attention, which is written as pladis of scale 0.
        hyperparameters: its own (alpha, scale, temperature, ...), the papers' defaults where left out;
        surgery/nn/operators.py lists them.
    unit: "head", "token" or "image", over what gag projects or an anderson solves for its weights. schedule: how
        hyperparameters change over the denoising steps (surgery/nn/schedule.py); `pipeline.unet.scheduled(pipeline)`
        carries it out.
    layers: "all", a block group (down, mid, up of a UNet; double, single of joint attention), "transformer_2" (of a
        second denoiser, the paths in which begin so), a glob pattern over module paths, or a list of those. blocks: of
        the selected modules with joint attention those in "double" or "single" blocks only.
    replace: "joint-attention" insists on that; "self-attention" is the experiment of PLADIS's Fig. 3, which destroys
        images and is warned of.
    implementation: as in `surgery.nn.attention`; "auto" picks by device and shape.
    Raises InputError for an unknown operator or hyperparameter, numbers out of range, a selector that hits no module,
    or a pipeline that is patched already; UnsupportedModelError for a model without surgery.
    """
    from surgery.nn.kernels.fused import IMPLEMENTATIONS
    from surgery.nn.schedule import schedule_problems

    setting = {"operator": operator, **_as_floats(hyperparameters), **({} if unit == "head" else {"unit": unit})}
    for problem in (*setting_problems(setting), unknown_name("implementation", implementation, IMPLEMENTATIONS)):
        if problem:
            raise InputError(problem)
    setting = whole_setting(setting)
    if schedule is not None:
        for key, message in schedule_problems(schedule, operator):
            raise InputError(f"schedule{f'.{key}' if key else ''} {message}")
        setting["schedule"] = schedule
    models = denoisers(pipeline)
    if operator in ADDITIONS and patched_modules(pipeline):
        return _add(pipeline, setting, layers, blocks, replace)
    if patched_modules(pipeline):
        raise InputError("this pipeline is patched already; surgery.tune changes its settings, unpatch takes it out")
    for model in models.values():
        if reason := refusal_of_class(type(model).__name__, type(pipeline).__name__):
            raise UnsupportedModelError(f"{type(model).__name__}: {reason}")
    if blocks not in ("all", *STREAMS):
        raise InputError(f'blocks must be "all", "double" or "single", not {blocks!r}')
    if problem := unknown_name("replace", replace, REPLACES):
        raise InputError(problem)
    is_experiment = replace == "self-attention"
    sites, problem = sites_in(attention_sites(models, is_experiment), blocks, replace)
    if problem:
        raise InputError(f"{'blocks' if blocks != 'all' else 'replace'}: {problem}")
    paths = selected_paths(sites, layers, kinds_of(replace))
    if is_experiment:
        setting["replace"] = replace
        warnings.warn(DESTROYS, stacklevel=2)
    try:
        operate(pipeline, standing([{**setting, "layers": paths}]), implementation)
    except ValueError as error:
        raise InputError(str(error)) from error
    return pipeline


def _add(pipeline, setting, layers, blocks, replace):
    """`patch` of a patched pipeline by an addition."""
    sites, problem = sites_in(attention_sites(denoisers(pipeline)), blocks, replace)
    if problem or replace == "self-attention":
        raise InputError(problem or f"{setting['operator']} is for attention to text")
    operations = [*operations_of(pipeline), {**setting, "layers": selected_paths(sites, layers)}]
    implementation = next(iter(patched_modules(pipeline).values())).pladis_implementation
    try:
        operate(pipeline, standing(operations), implementation)
    except ValueError as error:
        raise InputError(str(error)) from error
    return pipeline


def tune(pipeline: Any, *, layers: str | list[str] = "all", **hyperparameters: float) -> Any:
    """Change hyperparameters of a patched pipeline in place; returns it. Compiled graphs need not be compiled again.

    hyperparameters: any that the selected modules have. layers: as in `patch`, among the patched modules. Raises
    InputError for numbers out of range, a hyperparameter that a selected module lacks, a selector that hits no patched
    module, or a pipeline that is not patched.
    """
    unknown = sorted(set(hyperparameters) - set(HYPERPARAMETERS))
    if unknown:
        raise InputError(f"there is no hyperparameter {unknown[0]}; there are {', '.join(HYPERPARAMETERS)}")
    given = check_numbers({name: value for name, value in hyperparameters.items() if value is not None})
    if not given:
        raise InputError(f"nothing to change: give one of {', '.join(HYPERPARAMETERS)}")
    modules = patched_modules(pipeline)
    if not modules:
        raise InputError("this pipeline is not patched; surgery.patch does that")
    _check_not_offloaded(pipeline)
    sites = attention_sites(denoisers(pipeline))
    chosen = selected_paths([site for site in sites if site.operation], layers, (*REPLACED, "self"))
    for path in chosen:
        lacking = sorted(set(given) - set(modules[path].hyperparameters()))
        if lacking:
            raise InputError(f"{path} runs {modules[path].pladis_operator}, which has no {lacking[0]}")
    _write(modules, dict.fromkeys(chosen, given))
    update_config(pipeline)
    return pipeline


def unpatch(pipeline: Any) -> Any:
    """Take the patch out of a pipeline in place; its output is bit for bit what it was before. Returns it."""
    patched = {name: model for name, model in denoisers(pipeline).items() if hasattr(model, "pladis_operations")}
    if not patched_modules(pipeline) or not patched:
        raise InputError("this is not a patched pipeline or denoiser")
    for model in patched.values():
        _revert(pipeline, model)
    return pipeline


def _revert(pipeline, model):
    detach(model)  # an engine computes what was patched
    model.revert()
    _register(pipeline, model)


def operate(pipeline: Any, operations: list[dict] | None, implementation: str = "auto") -> None:
    """Give a pipeline exactly these operations, as `operations_of` writes them; None takes any patch out.

    For going to and fro between base and patched: nothing is done where a denoiser has its own of them already.
    implementation: of all modules that are patched. ValueError for operations that do not fit; all is as before then.
    """
    changed = []
    try:
        for component, model in denoisers(pipeline).items():
            before = model.pladis_operations() if patched_modules(model) else []
            wanted = own_operations(operations or (), component)
            if before == wanted:
                continue
            switches = {path: module.pladis_implementation for path, module in patched_modules(model).items()}
            changed.append((model, before, switches))
            _replace_operations(pipeline, model, wanted, implementation)
    except ValueError:
        for model, before, switches in changed:
            _replace_operations(pipeline, model, before)
            for path, module in patched_modules(model).items():
                module.pladis_implementation = switches[path]
        raise


def _replace_operations(pipeline, model, operations, implementation="auto"):
    if patched_modules(model):
        _revert(pipeline, model)
    if operations:
        backbone_of(type(model).__name__).patched.convert(model, operations, implementation)
        _register(pipeline, model)


def operations_of(pipeline: Any) -> list[dict[str, Any]]:
    """The operations of a pipeline or bare denoiser, with the layers of all its denoisers; [] of an unpatched one."""
    models = denoisers(pipeline)
    return joined_operations(
        {name: model.pladis_operations() for name, model in models.items() if patched_modules(model)}
    )


def update_config(pipeline: Any) -> None:
    """Write the live buffers' values of a patched pipeline into the config of each denoiser."""
    for model in denoisers(pipeline).values():
        if patched_modules(model):
            model.update_config()


@contextmanager
def switching(pipeline: Any) -> Iterator[Callable[[list[dict] | None], None]]:
    """Yields `switch(operations)`, which puts these, or None, in place of a pipeline's own until the block is left."""
    before = operations_of(pipeline)
    implementations = {path: module.pladis_implementation for path, module in patched_modules(pipeline).items()}

    def switch(operations):
        operate(pipeline, operations)
        for path, module in patched_modules(pipeline).items():
            module.pladis_implementation = implementations.get(path, "auto")

    try:
        yield switch
    finally:
        switch(before)


def attachment(model: "torch.nn.Module") -> Any:
    """The `engines.running.Attachment` of a model, or None; not typed, as that room is above this one."""
    return model.__dict__.get(ENGINE)


def detach(model: "torch.nn.Module") -> None:
    """Take a model's engine away, if it has one: it is eager again."""
    if made := attachment(model):
        made.undo()
        delattr(model, ENGINE)


def denoisers(pipeline: Any) -> dict[str, Any]:  # patched ones have methods beside those of nn.Module
    """{component: model} of a pipeline, {"": model} of a model itself, without wrappers of torch.compile and peft."""
    import torch

    if isinstance(pipeline, torch.nn.Module):
        return {"": _unwrapped(pipeline)}
    found = {name: model for name in DENOISERS if (model := getattr(pipeline, name, None)) is not None}
    if not found:
        raise UnsupportedModelError(f"{type(pipeline).__name__} has neither a unet nor a transformer")
    return {name: _unwrapped(model) for name, model in found.items()}


def denoiser(pipeline: Any) -> Any:
    """The first of `denoisers`."""
    return next(iter(denoisers(pipeline).values()))


def module_of(pipeline: Any, path: str) -> Any:
    """The module of a pipeline's denoisers, or of a model, at a path in the pipeline."""
    models, further = denoisers(pipeline), further_of(path)
    model = models[further] if further in models else next(iter(models.values()))
    return model.get_submodule(path.removeprefix(f"{further}."))


def patched_modules(pipeline: Any) -> dict[str, Any]:
    """{path: module} of the PladisAttention modules of a model, or of all denoisers of a pipeline."""
    from surgery.nn import is_pladis

    return {
        path_in_pipeline(component, path): module
        for component, model in denoisers(pipeline).items()
        for path, module in model.named_modules()
        if is_pladis(module)
    }


def read_hyperparameters(pipeline: Any) -> dict[str, dict[str, float]]:
    """{path: {name: float}} of the patched modules; InputError where their buffers are offloaded and hold nothing."""
    _check_not_offloaded(pipeline)
    return {path: module.hyperparameters() for path, module in patched_modules(pipeline).items()}


def write_hyperparameters(pipeline: Any, values: Mapping[str, Mapping[str, float]]) -> None:
    """Write {path: {name: float}} into the buffers of patched modules; InputError where that would be lost.

    The config is not told, as `tune` does.
    """
    _check_not_offloaded(pipeline)
    _write(patched_modules(pipeline), values)


def _write(modules, values):
    for path, given in values.items():
        modules[path].set_hyperparameters(given)


def _check_not_offloaded(pipeline):
    from surgery.nn.hooks import offloaded_to

    for model in denoisers(pipeline).values():
        if where := offloaded_to(model, patched_modules(model).values()):
            raise InputError(f"the buffers are offloaded {where}, so writes would be lost; tune first, offload after")


def selected_paths(sites: list[AttentionSite], layers: str | list[str], kinds: Sequence[str] = REPLACED) -> list[str]:
    """The paths that `layers` selects among sites of these kinds; InputError with every selector that hits nothing."""
    selectors = [layers] if isinstance(layers, str) else layers
    if not isinstance(selectors, (list, tuple)) or not all(isinstance(selector, str) for selector in selectors):
        raise InputError(f'layers must be "all", a block group or pattern, or a list of those, not {layers!r}')
    paths, complaints = select_sites(sites, selectors, kinds)
    if complaints or not paths:
        reasons = [f"{message}; {hint}" if hint else message for _, message, hint in complaints]
        raise InputError("layers: " + ("\n  ".join(reasons) or "nothing is selected; name at least one module"))
    return paths


def check_numbers(numbers: Mapping[str, Any]) -> dict[str, float]:
    """The numbers as floats; InputError for one that the operator is not defined for."""
    numbers = _as_floats(numbers)
    for name, value in numbers.items():
        if problem := value_problem(name, value):
            raise InputError(f"{name} {problem}")
    return {name: min(value, LARGEST) for name, value in numbers.items()}


def _as_floats(numbers):
    """NumPy and torch scalars as the shortest float, for they may be float32: 1.3, not 1.2999999523162842."""
    return {
        name: value
        if isinstance(value, (int, float)) or not (isinstance(value, Real) or hasattr(value, "item"))
        else float(f"{float(value):.7g}")
        for name, value in numbers.items()
    }


def _unwrapped(model):
    """A model without the wrappers of torch.compile and peft."""
    inner: Any = without_compile(model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    return model if inner is model else _unwrapped(inner)


def _register(pipeline, model):
    """Tell each pipeline that holds the denoiser what class that now is: it goes into its index."""
    from diffusers import DiffusionPipeline, ModularPipeline

    from .negative import listen

    listen(pipeline)
    components = [part for name in DENOISERS if (part := getattr(pipeline, name, None)) is not None]
    # One model may be in several pipelines (`from_pipe`), and none of them tells it so.
    found = gc.get_referrers(model, *components)
    # Each search looks at every object there is. Most models have one pipeline, whose __dict__ needs no second one.
    wanted = {id(part) for part in (model, *components)}
    own = getattr(pipeline, "__dict__", None)
    others = [
        holder
        for holder in found
        if type(holder) is dict and holder is not own and any(id(holder.get(name)) in wanted for name in DENOISERS)
    ]
    found += gc.get_referrers(*others) if others else []  # the pipelines of which these are the __dict__
    holders = {id(holder): holder for holder in found if issubclass(type(holder), (DiffusionPipeline, ModularPipeline))}
    for holder in (pipeline, *holders.values()):
        for name in DENOISERS:
            component = getattr(holder, name, None)
            if component is None or _unwrapped(component) is not model:
                continue
            if is_modular(holder):
                tell_class(holder, name, model)
            else:
                holder.register_modules(**{name: component})
