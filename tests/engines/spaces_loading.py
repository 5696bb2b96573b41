"""What `spaces` 0.51 (zero/torch/aoti.py) does with a repository of compiled blocks, done with a folder.

`aoti_blocks_load` opens <Class>/package.pt2 for each name in `_repeated_blocks`, `aoti_load` opens
package/submodules/<path>/package.pt2; either shows the one package of several blocks a block's own state dict when that
block is called after another, all of it at the block's first call.
"""

from pathlib import Path

import torch


class _Opened:
    def __init__(self, path):
        self.package, self.shown = torch._inductor.aoti_load_package(str(path)), None

    def call(self, weights, is_first, args, kwargs):
        if self.shown is not weights:
            names = self.package.get_constant_fqns()
            held = {name: tensor for name, tensor in weights.items() if name in names}
            self.package.load_constants(held, check_full_update=is_first, user_managed=True)
            self.shown = weights
        return self.package(*args, **kwargs)


def _put_in_place(block, opened):
    weights, first = block.state_dict(), [True]

    def forward(*args, **kwargs):
        return opened.call(weights, first.pop() if first else False, args, kwargs)

    block.forward = forward


def blocks_load(model, folder):
    """aoti_blocks_load."""
    opened = {name: _Opened(Path(folder) / name / "package.pt2") for name in model._repeated_blocks}
    for name, package in opened.items():
        for block in model.modules():
            if block.__class__.__name__ == name:
                _put_in_place(block, package)


def load(model, folder):
    """aoti_load."""
    for place in (Path(folder) / "package/submodules").iterdir():
        module, opened = model.get_submodule(place.name), _Opened(place / "package.pt2")
        for block in module if isinstance(module, torch.nn.ModuleList) else [module]:
            _put_in_place(block, opened)
