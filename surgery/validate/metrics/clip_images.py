"""PIL images as the models of the reward metrics take them, in the arithmetic of torchvision's transforms.

ImageReward resizes and crops a PIL image; HPSv2 makes a tensor first, and resizes and pads that. Both round otherwise
than transformers' CLIPImageProcessor.
"""

import numpy as np
import torch
from PIL import Image

# CLIP's mean and standard deviation of red, green and blue, which both metrics use.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def cropped_pixels(images, size):
    """float32 tensor (n, 3, size, size): the shorter side resized to `size` by Pillow, the middle of the longer kept.

    torchvision's Resize(size, BICUBIC), CenterCrop(size), ToTensor, Normalize on PIL images.
    """
    return torch.stack([_normalised(_tensor(_cropped(image, size))) for image in images])


def padded_pixels(images, size):
    """float32 tensor (n, 3, size, size): the longer side resized to `size`, the shorter padded with black.

    The tensor is resized bicubically with antialiasing (torchvision's default since 0.17) and not clamped to [0, 1]:
    tgxs002/HPSv2 hpsv2/src/open_clip/transform.py, image_transform with resize_longest_max.
    """
    return torch.stack([_normalised(_padded(_tensor(image), size)) for image in images])


def _cropped(image, size):
    shorter, longer = sorted(image.size)
    longer = int(size * longer / shorter)
    width, height = (size, longer) if image.width <= image.height else (longer, size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)  # halves to the even number, as torchvision
    return image.crop((left, top, left + size, top + size))


def _padded(tensor, size):
    scale = size / max(tensor.shape[1:])
    height, width = (max(1, round(side * scale)) for side in tensor.shape[1:])
    if tensor.shape[1:] != (height, width):
        tensor = torch.nn.functional.interpolate(tensor[None], (height, width), mode="bicubic", antialias=True)[0]
    top, left = (size - height) // 2, (size - width) // 2
    return torch.nn.functional.pad(tensor, (left, size - width - left, top, size - height - top))


def _tensor(image):
    """float32 (3, height, width) in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def _normalised(tensor):
    return (tensor - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
