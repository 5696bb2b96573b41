"""torch.compile on a loaded model: the whole of it, or its repeated blocks."""

import statistics
import time
from typing import Any

from torch import nn

from surgery.compat import call_of, repeated_block_names, set_call
from surgery.errors import InputError
from surgery.nn.module import is_pladis


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """{path: module} of the classes that diffusers names for it, or of the blocks in lists that hold patched attention.

    Several of diffusers' transformers (SD3, PixArt, SANA, Mochi) name none. Raises InputError where there are none.
    """
    names = repeated_block_names(model)
    if not names:
        lists = [child for child in model.children() if isinstance(child, nn.ModuleList)]
        names = {type(block).__name__ for blocks in lists for block in blocks if any(map(is_pladis, block.modules()))}
    blocks = {path: module for path, module in model.named_modules() if type(module).__name__ in names}
    if not blocks:
        raise InputError(f"{type(model).__name__} has no repeated blocks to compile once; compile it whole")
    return blocks


MODES = ("regional", "full", "max-autotune")
_ATTRIBUTE = "pladis_compiled"
_TIMED = 50  # calls; the later ones are not held up


def compile_model(model: nn.Module, mode: str) -> "CallTimes":
    """Have a model compiled at its first call; returns the CallTimes that tell how long calls take.

    mode: "regional", each class of repeated block once, which takes a tenth of the time; "full", one graph;
    "max-autotune", one graph whose kernels are chosen by measuring. Changing a hyperparameter compiles nothing again.
    Raises InputError for a mode that there is not, or a model without repeated blocks.
    """
    if mode not in MODES:
        raise InputError(f"compile={mode!r}: there are {', '.join(MODES)}")
    if mode == "regional":
        for block in repeated_blocks(model).values():
            block.compile(fullgraph=True)
    else:
        # cudagraphs would hold the hyperparameters' addresses and the outputs of the last call
        kind = {"mode": "max-autotune-no-cudagraphs"} if mode == "max-autotune" else {}
        model.compile(fullgraph=True, **kind)
    times = CallTimes(mode, model)
    # Around the compiled call, where nn.Module.__call__ looks first: a hook would be compiled with a full graph.
    set_call(model, times)
    setattr(model, _ATTRIBUTE, times)
    return times


def call_times(model: nn.Module) -> "CallTimes | None":
    """The CallTimes of a model that compile_model was given, or None."""
    return model.__dict__.get(_ATTRIBUTE)


class CallTimes:
    """A compiled model's call, and the seconds of the first ones; each of those begins and ends at rest."""

    def __init__(self, mode: str, model: nn.Module) -> None:
        self.mode, self.seconds = mode, []
        self._call, self._device = call_of(model), lambda: model.device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        if len(self.seconds) >= _TIMED:
            return self._call(*args, **kwargs)
        _wait(self._device())
        started = time.perf_counter()
        result = self._call(*args, **kwargs)
        _wait(self._device())
        self.seconds.append(time.perf_counter() - started)
        return result

    def report(self) -> dict[str, Any]:
        """{"mode", "calls", "first_call_seconds", "steady_seconds"}: with the compilation, and without (a median).

        A call that compiled anew, for a new shape, is among the slow ones that a median passes over.
        """
        later = self.seconds[1:]
        return {
            "mode": self.mode,
            "calls": len(self.seconds),
            "first_call_seconds": self.seconds[0] if self.seconds else None,
            "steady_seconds": statistics.median(later) if later else None,
        }


def _wait(device):
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
