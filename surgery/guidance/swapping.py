"""Put other modules in a model's place for the time of a call.

By the entry in the parent's `_modules`, not by hooks: torch.compile guards on a submodule's type, so a compiled model
gets a second graph for its weakened form and keeps both, whereas hooks that come and go are not seen by it.
"""

from contextlib import contextmanager


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
