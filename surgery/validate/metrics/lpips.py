"""LPIPS: how far apart two images are to a network whose layers were weighted by human judgements."""

import numpy as np
import torch
from torch import nn

from .info import Device, Files, Images, Info, WebFile, exact_convolutions
from .pixels import pair_tensors
from .weights import read_weights

# After each of AlexNet's convolutions' activations LPIPS compares: its place in `features`, and its channels.
_COMPARED = {1: 64, 4: 192, 7: 384, 9: 256, 11: 256}
_CLASSIFIER = frozenset(f"classifier.{layer}.{part}" for layer in (1, 4, 6) for part in ("weight", "bias"))
_SMALLEST = 31  # pixels; under that nothing is left after the second pooling
# PerceptualSimilarity's ScalingLayer and normalize_tensor: constants for images in [-1, 1].
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_EPSILON = 1e-10


class Lpips:
    """LPIPS 0.1 with AlexNet: squared differences of unit-length features, weighted per channel, averaged over the
    places of each of five layers and summed over the layers. Images are not resized.
    """

    info = Info(
        name="lpips",
        title="LPIPS",
        kind="fidelity",
        higher_is_better=False,
        source="Zhang et al. 2018 (arXiv:1801.03924), version 0.1 with AlexNet of richzhang/PerceptualSimilarity",
        checkpoints={
            "alexnet": WebFile(
                "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
                "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
            ),
            "heads": WebFile(
                "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/"
                "c33f89e9f46522a584cf41d8880eb0afa982708b/lpips/weights/v0.1/alex.pth",
                "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
            ),
        },
    )

    def __init__(self, files: Files, device: Device) -> None:
        """files: {"alexnet": torchvision's weights, "heads": the linear heads}; InputError for a wrong file."""
        self._device = device
        with torch.device("meta"):  # no weights are drawn, so the caller's random numbers stay as they were
            self._features = _alexnet_features()
        shapes = {f"features.{name}": tensor.shape for name, tensor in self._features.state_dict().items()}
        weights = read_weights(files["alexnet"], shapes, "torchvision's AlexNet", _CLASSIFIER)
        self._features.to_empty(device="cpu")
        self._features.load_state_dict({name.removeprefix("features."): weights[name] for name in shapes})
        self._features.to(device).eval()
        heads = {f"lin{index}.model.1.weight": (1, size, 1, 1) for index, size in enumerate(_COMPARED.values())}
        weights = read_weights(files["heads"], heads, "the linear heads of LPIPS 0.1 for AlexNet")
        self._heads = [weights[name].to(device) for name in heads]
        self._shift = torch.tensor(_SHIFT, device=device)[:, None, None]
        self._scale = torch.tensor(_SCALE, device=device)[:, None, None]

    def compare(self, patched: Images, base: Images) -> np.ndarray:
        """float64 array (n,): 0 for identical images, higher for more different ones. Images are PIL RGB.

        Raises InputError for a pair of different sizes, or with a side under 31 pixels.
        """
        pairs = pair_tensors(patched, base, self._device, self.info.title, _SMALLEST)
        return np.array([self._distance(one, other) for one, other in pairs], np.float64)

    def _distance(self, one, other):
        with torch.inference_mode(), exact_convolutions():
            pair = torch.cat([one, other]).float() * 2 - 1  # (2, 3, height, width) in [-1, 1]
            layers = self._compared_layers((pair - self._shift) / self._scale)
            return sum(
                float((head[0] * (first - second) ** 2).sum(0).mean())  # over channels, then places
                for head, (first, second) in zip(self._heads, layers, strict=True)
            )

    def _compared_layers(self, images):
        for place, layer in enumerate(self._features):
            images = layer(images)
            if place in _COMPARED:
                yield images / (images.square().sum(1, keepdim=True).sqrt() + _EPSILON)


def _alexnet_features():
    """AlexNet's convolutions under torchvision's names (torchvision/models/alexnet.py), but for the last pooling."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
    )
