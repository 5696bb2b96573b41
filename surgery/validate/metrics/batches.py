"""Scores of many images, a few at a time, so that memory stays bounded whatever their number."""

import numpy as np
import torch

from surgery.validate.metrics.precision import exact_convolutions

BATCH_SIZE = 16


def in_batches(score, images, prompts, size=BATCH_SIZE):
    """float64 array (n,): `score(images, texts)` gives a tensor (b,) for at most `size` of n images and prompts."""
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images, but {len(prompts)} prompts")
    scores = []
    with torch.inference_mode(), exact_convolutions():
        for start in range(0, len(images), size):
            texts = [prompt.text for prompt in prompts[start : start + size]]
            scores += score(images[start : start + size], texts).tolist()
    return np.array(scores, dtype=np.float64)
