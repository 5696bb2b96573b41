"""AOTInductor: a package that computes with the tensors of the model it is attached to, or with weights of its own.

One with weights of its own takes the hyperparameters as inputs, so that all else is constant: on a CPU it is folded and
laid out as the kernels want it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from surgery.compat import compile_package

from .program import export_program, hyperparameter_buffers
from .recording import RecordedCall

SUFFIX = ".pt2"
HOLDS_WEIGHTS = False  # unless it is asked to


def needs() -> dict[str, str]:
    """{package: version} besides torch."""
    return {}


def settings_without_weights(max_autotune: bool = False) -> dict[str, Any]:
    """Settings of torch._inductor.config for a package that is shown its tensors."""
    return {
        # small buffers would become literals, and writing into them would do nothing
        "always_keep_tensor_constants": True,
        "aot_inductor.package_constants_in_so": False,
        # or what derives from a hyperparameter (alpha - 1) becomes a literal, and tune has no effect
        "joint_graph_constant_folding": False,
        # torch.export takes a range that begins at 1 for one that begins at 2; ranges are checked at each call
        "aot_inductor.check_lowerbound": False,
        "max_autotune": bool(max_autotune),
        "autotune_num_choices_displayed": 0,
    }


def build(
    module: torch.nn.Module, method: str, calls: Mapping[str, RecordedCall], path: Path, options: Mapping[str, Any]
) -> None:
    """Compile a module's method, ranged as its calls at the corners differ, into the package `path`.

    options: "weights" ("artifact" or "engine"), "operator" ("fused" or "decomposed"), "max_autotune". What the graph
    holds besides the module's tensors goes into a safetensors file beside the package.
    """
    holds_weights = options["weights"] == "engine"
    hyperparameters = hyperparameter_buffers(module) if holds_weights else {}
    program = export_program(module, method, calls, hyperparameters, options["operator"] == "decomposed")
    settings = {
        **settings_without_weights(options.get("max_autotune", False)),
        "aot_inductor.package_constants_in_so": holds_weights,
        "joint_graph_constant_folding": holds_weights,
        "freezing": holds_weights and next(module.parameters()).device.type == "cpu",
    }
    own = {f"module.{name}" for name in module.state_dict(keep_vars=True)}
    own |= {f"module.{name}" for name, _ in module.named_buffers()}
    further = {
        name: value.detach().contiguous().cpu()
        for name, value in program.constants.items()
        if isinstance(value, torch.Tensor) and name not in own
    }
    with torch.no_grad():  # without it nothing is folded
        compile_package(program, path, settings)
    if further and not holds_weights:
        save_file(further, path.with_suffix(".safetensors"))
