"""A Gaussian blur of tokens on their grid, as two small matrices: exact at the borders for any width."""

import math

import torch

from surgery.nn.kernels.reference import without_autocast

INFINITE = 9999.0  # as in the SEG authors' code: from here on the mean takes the blur's place


def blur_matrix(length, sigma):
    """(length, length) float32: row i holds the weights of a Gaussian about i, reflected at the ends as F.pad does.

    The kernel reaches ceil(6 sigma) tokens, made odd, in all, as the SEG authors' does.
    """
    if length == 1:
        return torch.ones(1, 1)
    size = math.ceil(6 * sigma) + 1 - math.ceil(6 * sigma) % 2
    reach = size // 2
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel /= kernel.sum()
    period = 2 * (length - 1)
    positions = (torch.arange(length)[:, None] + offsets[None].long()) % period
    positions = torch.where(positions >= length, period - positions, positions)
    matrix = torch.zeros(length, length, dtype=torch.float64)
    return matrix.scatter_add_(1, positions, kernel.expand(length, -1)).float()


@without_autocast
def blurred(states, frames, height, width, sigma):
    """Tokens (batch, frames * height * width, channels), each frame blurred by itself; sigma in tokens.

    From INFINITE on every token is its frame's mean.
    """
    grid = states.unflatten(1, (frames, height, width))
    if sigma >= INFINITE:
        return grid.mean(dim=(2, 3), keepdim=True).expand_as(grid).flatten(1, 3)
    across = blur_matrix(width, sigma).to(states)
    down = blur_matrix(height, sigma).to(states)
    grid = torch.matmul(across, grid)  # over width, for each frame and row
    grid = torch.einsum("ij,bfjwc->bfiwc", down, grid)
    return grid.flatten(1, 3)
