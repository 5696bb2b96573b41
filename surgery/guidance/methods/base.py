"""What the methods of guidance share: their interface, their windows, and modules swapped for one evaluation."""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from ..families import Grid


def placed(model, path):
    """(parent, name) of the module at a dotted path."""
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name


@contextmanager
def swapped(replacements):
    """While it lasts, modules are in others' place. replacements: [(parent, name, module)]."""
    before = []
    try:
        for parent, name, module in replacements:
            before.append((parent, name, parent._modules[name]))
            parent._modules[name] = module
        yield
    finally:
        for parent, name, module in reversed(before):
            parent._modules[name] = module


@dataclass(frozen=True)
class Moment:
    """One call of the model. step: from 0, of the steps asked for (surgery/nn/schedule.py).

    level: its timestep as a part of the training's, 0 to 1.
    """

    step: int
    steps: int
    level: float
    grid: Grid | None  # where the image's tokens are


class Method:
    """A guidance method on one model. settings: its part of a recipe (surgery/recipe/guidance.py).

    A method is made anew by `guide`; what it keeps from call to call it forgets in `begin`.
    """

    needs_pair = False  # needs the outputs with and without the prompt at once
    needs_grid = False
    changes_modules = True  # an engine, which is compiled, cannot follow
    replacements = ()  # of submodules, [(parent, name, module)]: what stands in their place in the weakened model

    def __init__(self, settings, model, pipeline):
        self.settings, self.model, self.pipeline = settings, model, pipeline

    def begin(self):
        """A run of the pipeline begins."""

    def around(self, call, moment):
        """A context for the ordinary call."""
        return nullcontext()

    def weakened(self, moment):
        """A context in which the model is weakened."""
        return swapped(self.replacements)

    def weak_output(self, driver, call, moment, plain, unguided):
        """W, the weakened model's output for the rows with the prompt; plain, unguided: the ordinary C and U."""
        with self.weakened(moment):
            return driver.output_of(call.with_prompt)

    def away(self, plain, unguided, weak):
        """What leads away from the weakened model, C - W; `scale` times that is added."""
        return plain - weak

    def combined(self, plain, unguided, weight, moment):
        """CFG, U + w (C - U), or C where there is no U."""
        return plain if unguided is None else unguided + weight * (plain - unguided)
