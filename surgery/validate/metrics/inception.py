"""The Inception network of FID and KID: TensorFlow's graph of 2015-12-05, with the weights of mseitzer/pytorch-fid.

Its keys and layers are torchvision's Inception v3 with 1008 classes, changed as pytorch-fid's inception.py does:
average pooling leaves the padding out of the mean, and the very last block pools by maximum. Images are prepared as
there: RGB in [0, 1], bilinear to 299x299 by torch (align_corners False, no antialiasing), then scaled to [-1, 1].
clean-fid resizes by antialiased bicubic instead, so its figures and stored statistics are others.
"""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from surgery.errors import InputError

from .info import Device, Files, WebFile, exact_convolutions
from .weights import read_weights

WEIGHTS = WebFile(
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)
DIMENSIONS = 2048
_CLASSES = 1008  # TensorFlow's; torchvision's own network has 1000
_SIZE = 299  # pixels
_BATCH = 32  # images


def load_inception(path: Path | str, device: Device) -> "FidInception":
    """The network with the weights of pt_inception-2015-12-05-6726825d.pth, float32; InputError for another file."""
    with torch.device("meta"):  # no weights are drawn, so the caller's random numbers stay as they were
        network = FidInception()
    names = network.state_dict()
    # Batches are counted in training alone; the file has the counts, older ones of that format have not.
    counts = {name for name in names if name.endswith(".num_batches_tracked")}
    shapes = {name: tensor.shape for name, tensor in names.items() if name not in counts}
    # The classifier is not used, but shows that the file is this network's and not torchvision's own.
    classifier = {"fc.weight": (_CLASSES, DIMENSIONS), "fc.bias": (_CLASSES,)}
    weights = read_weights(path, shapes | classifier, "the FID Inception network of mseitzer/pytorch-fid", counts)
    network.to_empty(device="cpu")
    network.load_state_dict({name: weights[name] for name in shapes} | dict.fromkeys(counts, torch.tensor(0)))
    return network.to(device).eval()


class InceptionFeatures:
    """What fid and kid have in common: the network, and the features that either may take of the other."""

    def __init__(self, files: Files, device: Device) -> None:
        """files: {"inception": path of the weights}; InputError for a wrong file."""
        self._network = load_inception(files["inception"], device)

    def features(self, images: Iterable[Image.Image]) -> np.ndarray:
        """float32 array (n, 2048) of any iterable of PIL RGB images."""
        return inception_features(self._network, images)


def inception_features(network: nn.Module, images: Iterable[Image.Image]) -> np.ndarray:
    """float32 array (n, 2048) of any iterable of n PIL RGB images of any sizes, in batches of 32.

    Raises InputError where there is none, or where a feature is not finite.
    """
    device = next(network.parameters()).device
    images, batches = iter(images), []
    with torch.inference_mode(), exact_convolutions():
        while batch := list(islice(images, _BATCH)):
            inputs = torch.stack([_prepared(image, device) for image in batch])
            batches.append(network(inputs).cpu().numpy())
    if not batches:
        raise InputError("there are no images to compute Inception features of")
    features = np.concatenate(batches)
    if not np.isfinite(features).all():
        raise InputError("the Inception network gave features that are not finite: its weights are damaged")
    return features


def _prepared(image, device):
    """(3, 299, 299) in [-1, 1]; each image is resized for itself, as their sizes may differ."""
    pixels = torch.from_numpy(np.array(image)).to(device).permute(2, 0, 1)[None].float() / 255
    resized = functional.interpolate(pixels, size=(_SIZE, _SIZE), mode="bilinear", align_corners=False)
    return 2 * resized[0] - 1


class FidInception(nn.Module):
    """Images (n, 3, 299, 299) in [-1, 1] -> features (n, 2048): the mean over the places of the last block."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = _Convolution(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = _Convolution(80, 192, 3)
        for name, build in _BLOCKS.items():
            setattr(self, name, build())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (n, 64, 147, 147)
        x = functional.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))  # (n, 192, 71, 71)
        x = functional.max_pool2d(x, 3, stride=2)
        for name in _BLOCKS:
            x = getattr(self, name)(x)
        return x.mean((2, 3))  # (n, 2048, 8, 8) -> (n, 2048)


class _Convolution(nn.Module):
    """A convolution without bias, batch normalisation and ReLU."""

    def __init__(self, inputs, outputs, kernel, stride=1, padding: Any = 0):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x):
        return functional.relu(self.bn(self.conv(x)))


class _Mixed(nn.Module):
    """A block of branches, as a graph: the outputs that no layer of the block takes in, concatenated in their order.

    layers: {name: (what it takes in: "input", "pool" or a layer above, its channels, kernel)}; a layer whose name is in
    `halving` has stride 2 and no padding, every other keeps the size. pool: "average" or "maximum" of 3x3 places that
    keeps the size, or "halving", a maximum with stride 2 that is itself the last output.
    """

    def __init__(self, inputs, layers, pool, halving=()):
        super().__init__()
        self._sources = {name: source for name, (source, _, _) in layers.items()}
        self._pool = pool
        channels = {"input": inputs, "pool": inputs}
        for name, (source, outputs, kernel) in layers.items():
            stride, padding = (2, 0) if name in halving else (1, tuple(side // 2 for side in kernel))
            setattr(self, name, _Convolution(channels[source], outputs, kernel, stride, padding))
            channels[name] = outputs
        taken = set(self._sources.values())
        self._outputs = [name for name in layers if name not in taken] + ([] if "pool" in taken else ["pool"])

    def forward(self, x):
        values = {"input": x, "pool": _POOLS[self._pool](x)}
        for name, source in self._sources.items():
            values[name] = getattr(self, name)(values[source])
        return torch.cat([values[name] for name in self._outputs], 1)


_POOLS = {
    "average": lambda x: functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False),
    "maximum": lambda x: functional.max_pool2d(x, 3, stride=1, padding=1),
    "halving": lambda x: functional.max_pool2d(x, 3, stride=2),
}


def _block_a(inputs, pooled):
    layers = {
        "branch1x1": ("input", 64, (1, 1)),
        "branch5x5_1": ("input", 48, (1, 1)),
        "branch5x5_2": ("branch5x5_1", 64, (5, 5)),
        "branch3x3dbl_1": ("input", 64, (1, 1)),
        "branch3x3dbl_2": ("branch3x3dbl_1", 96, (3, 3)),
        "branch3x3dbl_3": ("branch3x3dbl_2", 96, (3, 3)),
        "branch_pool": ("pool", pooled, (1, 1)),
    }
    return _Mixed(inputs, layers, "average")


def _block_b():
    layers = {
        "branch3x3": ("input", 384, (3, 3)),
        "branch3x3dbl_1": ("input", 64, (1, 1)),
        "branch3x3dbl_2": ("branch3x3dbl_1", 96, (3, 3)),
        "branch3x3dbl_3": ("branch3x3dbl_2", 96, (3, 3)),
    }
    return _Mixed(288, layers, "halving", halving=("branch3x3", "branch3x3dbl_3"))


def _block_c(middle):
    layers = {
        "branch1x1": ("input", 192, (1, 1)),
        "branch7x7_1": ("input", middle, (1, 1)),
        "branch7x7_2": ("branch7x7_1", middle, (1, 7)),
        "branch7x7_3": ("branch7x7_2", 192, (7, 1)),
        "branch7x7dbl_1": ("input", middle, (1, 1)),
        "branch7x7dbl_2": ("branch7x7dbl_1", middle, (7, 1)),
        "branch7x7dbl_3": ("branch7x7dbl_2", middle, (1, 7)),
        "branch7x7dbl_4": ("branch7x7dbl_3", middle, (7, 1)),
        "branch7x7dbl_5": ("branch7x7dbl_4", 192, (1, 7)),
        "branch_pool": ("pool", 192, (1, 1)),
    }
    return _Mixed(768, layers, "average")


def _block_d():
    layers = {
        "branch3x3_1": ("input", 192, (1, 1)),
        "branch3x3_2": ("branch3x3_1", 320, (3, 3)),
        "branch7x7x3_1": ("input", 192, (1, 1)),
        "branch7x7x3_2": ("branch7x7x3_1", 192, (1, 7)),
        "branch7x7x3_3": ("branch7x7x3_2", 192, (7, 1)),
        "branch7x7x3_4": ("branch7x7x3_3", 192, (3, 3)),
    }
    return _Mixed(768, layers, "halving", halving=("branch3x3_2", "branch7x7x3_4"))


def _block_e(inputs, pool):
    layers = {
        "branch1x1": ("input", 320, (1, 1)),
        "branch3x3_1": ("input", 384, (1, 1)),
        "branch3x3_2a": ("branch3x3_1", 384, (1, 3)),
        "branch3x3_2b": ("branch3x3_1", 384, (3, 1)),
        "branch3x3dbl_1": ("input", 448, (1, 1)),
        "branch3x3dbl_2": ("branch3x3dbl_1", 384, (3, 3)),
        "branch3x3dbl_3a": ("branch3x3dbl_2", 384, (1, 3)),
        "branch3x3dbl_3b": ("branch3x3dbl_2", 384, (3, 1)),
        "branch_pool": ("pool", 192, (1, 1)),
    }
    return _Mixed(inputs, layers, pool)


_BLOCKS = {
    "Mixed_5b": lambda: _block_a(192, 32),
    "Mixed_5c": lambda: _block_a(256, 64),
    "Mixed_5d": lambda: _block_a(288, 64),
    "Mixed_6a": _block_b,
    "Mixed_6b": lambda: _block_c(128),
    "Mixed_6c": lambda: _block_c(160),
    "Mixed_6d": lambda: _block_c(160),
    "Mixed_6e": lambda: _block_c(192),
    "Mixed_7a": _block_d,
    "Mixed_7b": lambda: _block_e(1280, "average"),
    "Mixed_7c": lambda: _block_e(2048, "maximum"),
}
