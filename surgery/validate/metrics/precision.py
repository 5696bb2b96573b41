"""Convolutions as their checkpoints were trained: in whole float32, and the same in every run."""

from contextlib import contextmanager

import torch


@contextmanager
def exact_convolutions():
    """Without TF32, which changes features in the third digit on an NVIDIA GPU, and with deterministic algorithms.

    Puts back the caller's settings. torch.backends.cudnn.flags would do it too, but raises where the caller has set
    fp32_precision, torch's newer name for the same.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.conv.fp32_precision, cudnn.deterministic
    cudnn.conv.fp32_precision, cudnn.deterministic = "ieee", True
    try:
        yield
    finally:
        cudnn.conv.fp32_precision, cudnn.deterministic = before
