"""Weights of a published .pth file, taken only where it is whole and holds the expected names and shapes, no others."""

from surgery.errors import InputError

from .strict_weights import listed, torch_checkpoint


def read_weights(path, shapes, title, unused=frozenset()):
    """{name: float32 tensor} of a .pth file, read without running code from it.

    shapes: {name: shape} that the file must hold; unused: further names that it may hold. title: what the file should
    be, for the errors. Raises InputError, which names the file and what is missing, unexpected or of another shape.
    """
    tensors = torch_checkpoint(path)
    shapes = {name: tuple(shape) for name, shape in shapes.items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    problems = {
        "missing": sorted(shapes.keys() - found.keys()),
        "unexpected": sorted(map(str, found.keys() - shapes.keys() - unused)),
        "of another shape": [
            f"{name} {list(found[name])} instead of {list(shape)}"
            for name, shape in shapes.items()
            if found.get(name, shape) != shape
        ],
    }
    if any(problems.values()):
        told = "; ".join(f"{kind}: {listed(names)}" for kind, names in problems.items() if names)
        raise InputError(f"{path} is not {title}: {told}. Give the published file, or fetch it again")
    return {name: tensors[name].float() for name in shapes}
