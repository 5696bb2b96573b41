"""What the verbs show: settings in words, progress bars on standard error, libraries kept quiet."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from surgery.nn.operators import LARGEST, OPERATIONS, later_defaults

_NOT_SETTINGS = ("operator", "layers", "schedule", "additions")


def operation_text(operation: Mapping) -> str:
    """ "gag (alpha 1.5, scale 10, ..., unit head)" for {operator, hyperparameters, ...}; its schedule after that."""
    schedule = operation.get("schedule")
    acts = f" on schedule {schedule_text(schedule)}" if schedule else ""
    more = "".join(f" and {operation_text(one)}" for one in operation.get("additions", ()))
    return f"{operation['operator']} ({settings_text(operation)}){acts}{more}"


def settings_text(operation: Mapping) -> str:
    """ "alpha 1.5, scale 10, temperature 1, zeta 0, eta 15, unit head": what an operation sets, in its own order.

    What an older one could not say is left out where it does nothing.
    """
    later = later_defaults(operation["operator"]) if operation.get("operator") in OPERATIONS else {}
    settings = {key: value for key, value in operation.items() if key not in _NOT_SETTINGS}
    settings = {key: value for key, value in settings.items() if key not in later or value != later[key]}
    return ", ".join(f"{name} {_value_text(name, value)}" for name, value in settings.items())


def schedule_text(schedule: Mapping) -> str:
    """ "steps [5, 20], scale [0, 1, 2]": a schedule as a recipe writes it, long lists cut short."""
    return ", ".join(f"{key} {_list_text(key, values)}" for key, values in schedule.items())


def schedule_usage(component: str) -> str:
    """One line on how a loaded pipeline's schedule is carried out, for the component that is patched."""
    return (
        f"its schedule takes effect in `with pipe.{component}.scheduled(pipe, steps=N) as callback: pipe(..., "
        "num_inference_steps=N, callback_on_step_end=callback)`; without that the operator acts at every step with the "
        "values above"
    )


def sampling_text(sampling: Mapping) -> str:
    """ "steps 25, guidance_scale 4, guidance seg (scale 3, ...)": sampling settings as a manifest has them."""
    return ", ".join(f"{key} {_sampling_value(key, value)}" for key, value in sampling.items())


def _sampling_value(key, value):
    if key == "guidance_scale" and isinstance(value, dict):
        return f"from {value['uniform'][0]:g} to {value['uniform'][1]:g}, drawn for each image"
    return guidance_text(value) if isinstance(value, dict) else value


def guidance_text(guidance: Mapping) -> str:
    """ "seg (scale 3, blur infinite, layers mid)": a guidance method and its settings."""
    settings = {key: value for key, value in guidance.items() if key != "method"}
    texts = [f"{name} {_guidance_value(name, value)}" for name, value in settings.items()]
    return guidance.get("method", "") + (f" ({', '.join(texts)})" if texts else "")


def _guidance_value(name, value):
    if isinstance(value, dict):  # of AutoGuidance, another checkpoint
        return "@".join([value["pipeline"], *([value["revision"][:12]] if value.get("revision") else [])])
    if isinstance(value, list):
        return ", ".join(map(str, value)) if name == "layers" else _list_text(name, value)
    if isinstance(value, bool):
        return str(value).lower()
    return (value or "none") if isinstance(value, str) else _value_text(name, value)


def _list_text(key, values):
    shown = [_value_text(key, value) for value in values]
    if len(shown) > 6:
        return f"[{', '.join(shown[:3])}, ... {shown[-1]}] ({len(shown)} values)"
    return f"[{', '.join(shown)}]"


def _value_text(name, value):
    if value is None:
        return "null"
    if isinstance(value, str):
        return value
    return "infinite" if name in ("eta", "sigma", "blur") and value >= LARGEST else f"{value:g}"


@contextmanager
def progress_bar(description: str, total: int, unit: str = "bytes") -> Iterator[Callable[[int], None]]:
    """Yield `advance(count)` for a bar over `total` bytes (or other units); the bar goes away when it is done."""
    if not sys.stderr.isatty() or not total:
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    count = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(description, total=total)
        yield lambda amount: progress.advance(task, amount)


def quiet_notices() -> None:
    """Silence what the libraries tell at import of optional parts that are not used here; imports nothing."""
    import logging
    import os

    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    for name in ("torchao", "torch.utils._pytree", "torch.onnx._internal.exporter._registration"):
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet_bars() -> None:
    """Switch off the libraries' own loading bars: the verbs have their own."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
