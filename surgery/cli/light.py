"""`surgery plan`, `inspect` and `new` start without what diffusers imports for other work than theirs.

They build models on the meta device alone. With the class of a model diffusers imports torch's compiler, transformers,
peft, torchao and scipy too: most of what such a verb costs (benchmarks/starting.py). In a process that is the command's
own these are made to look absent, as they may be. What fails there, other than for what the recipe itself says, is
carried out again with all of them: no answer is told that depends on what was absent.
"""

import argparse
import gc
import importlib.metadata
import os
import sys
import types
from collections.abc import Callable

from surgery.errors import RecipeError

# What diffusers imports where it is installed with the class of any model, and uses for weights and forward passes.
ABSENT = (
    "accelerate",
    "bitsandbytes",
    "flash_attn",
    "flash_attn_3",
    "flashinfer",
    "gguf",
    "kernels",
    "optimum",
    "peft",
    "sageattention",
    "scipy",
    "torchao",
    "torchvision",
    "transformers",
    "xformers",
)
_VERBS = ("plan", "inspect", "new")
# Of a recipe: the keys of its base that it may have; those of its sampling for which a pipeline's class or a scheduler
# is looked at.
_BASE = {"pipeline", "revision", "variant", "components", "vae"}
_SAMPLING = {"num_frames", "fps", "timesteps"}
_WHOLE = "SURGERY_START_WHOLE"  # in the environment: nothing is hidden


class _NoCompiler(types.ModuleType):
    """In the place of torch._dynamo: its decorators, which diffusers and operators on the meta device have."""

    @staticmethod
    def allow_in_graph(function: Callable) -> Callable:
        """The function itself."""
        return function

    @staticmethod
    def disable(function: Callable | None = None, *_settings: object, **_named: object) -> Callable:
        """The function itself, or what gives it back."""
        return function or _NoCompiler.allow_in_graph


def begin(arguments: argparse.Namespace) -> None:
    """Hide what a verb has no use for, in a new process of the command's own.

    Raises what reading its recipe does.
    """
    is_new = not {"torch", "diffusers"} & set(sys.modules) and os.name == "posix" and sys.executable
    if os.environ.pop(_WHOLE, None) is None and is_new and is_enough_for(arguments):
        hide()


def is_enough_for(arguments: argparse.Namespace) -> bool:
    """Whether a verb, with its recipe, needs models on the meta device alone: no scheduler, pipeline or LoRA."""
    if arguments.verb != "plan":
        return arguments.verb in _VERBS
    from surgery.recipe.document import read_document
    from surgery.recipe.reading import find_recipe

    data = read_document(find_recipe(arguments.recipe), arguments.overrides).data
    base, sampling, guidance = (data.get(key) or {} for key in ("base", "sampling", "guidance"))
    if not isinstance(base, dict) or not isinstance(sampling, dict):
        return False
    is_weak = isinstance(guidance, dict) and "weak" in guidance
    return set(base) <= _BASE and not _SAMPLING & set(sampling) and not is_weak


def hide() -> None:
    """Make ABSENT and torch's compiler look absent, for as long as this process lasts; before torch is imported."""
    sys.modules |= dict.fromkeys(ABSENT)  # find_spec finds None then, and an import raises ModuleNotFoundError
    sys.modules["torch._dynamo"] = _NoCompiler("torch._dynamo")
    importlib.metadata.packages_distributions = dict  # diffusers lists all files of all packages by it
    gc.disable()  # there is little garbage in what such a verb does


def again(error: Exception) -> None:
    """Carry the command out again with nothing hidden, where that may have caused an error; else return."""
    hidden = isinstance(sys.modules.get("torch._dynamo"), _NoCompiler) and "torch" in sys.modules
    if not hidden or isinstance(error, (RecipeError, OSError)):
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.environ[_WHOLE] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
