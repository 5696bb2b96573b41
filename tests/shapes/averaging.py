"""What two training processes do in a test: a module of its own, since each of them imports it anew."""

import torch


def average(worker, folder):
    """Average gradients that are the process's number, and that times 10; save them."""
    parameters = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1, 1))]
    for factor, parameter in zip((1, 10), parameters, strict=True):
        parameter.grad = torch.full_like(parameter, factor * (worker.rank + 1))
    worker.average_gradients(parameters)
    torch.save([parameter.grad for parameter in parameters], folder / f"{worker.rank}.pt")
