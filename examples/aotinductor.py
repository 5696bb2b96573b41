"""Run an AOTInductor engine from torch alone: neither this package nor diffusers is imported.

    surgery export out/shapes --target inductor --weights engine --decompose
    python examples/aotinductor.py out/shapes/engines/<key>

The package takes the tensors of the model's call in the order of `engine.json`, then a vector for each hyperparameter,
and checks nothing: sizes outside the engine's are answered with nonsense, so they are compared here. In C++ the same
file is opened by torch::inductor::AOTIModelPackageLoader.
"""

import json
import sys
from pathlib import Path

import torch


class Engine:
    """The one function of an engine that holds its weights. hyperparameters: {name: vector}, to be changed at will."""

    def __init__(self, folder):
        record = json.loads((Path(folder) / "engine.json").read_text())
        (self.region,) = record["regions"]
        self.package = torch._inductor.aoti_load_package(str(Path(folder) / self.region["file"]))
        self.hyperparameters = {name: torch.tensor(values) for name, values in self.region["values"].items()}

    def __call__(self, **given):
        """{name: tensor} of what the model returns, for {name: tensor} as `engine.json` names them."""
        tensors = []
        for wanted in self.region["inputs"]:
            tensor = given[wanted["name"]].to(getattr(torch, wanted["dtype"])).contiguous()
            sizes = zip(tensor.shape, wanted["shape"], strict=True)
            if not all(low <= size <= high for size, (low, high) in sizes):
                raise ValueError(f"{wanted['name']} is {tuple(tensor.shape)}, and the engine takes {wanted['shape']}")
            tensors.append(tensor)
        results = self.package(*tensors, *self.hyperparameters.values())
        return dict(zip(self.region["outputs"], results, strict=True))


def main():
    """Run an engine once, on random tensors of the least sizes that it takes, and print what comes back."""
    engine = Engine(sys.argv[1])
    given = {
        tensor["name"]: torch.rand([low for low, _ in tensor["shape"]]).to(getattr(torch, tensor["dtype"]))
        for tensor in engine.region["inputs"]
    }
    for name, tensor in engine(**given).items():
        print(name, tuple(tensor.shape), tensor.dtype)


if __name__ == "__main__":
    main()
