"""SSIM and PSNR: known values, a second implementation, and the pairs that are refused."""

import math
import sys

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from surgery.errors import InputError
from surgery.validate.metrics.pixels import Psnr, Ssim


@pytest.fixture(scope="module")
def ssim():
    return Ssim({}, "cpu")


@pytest.fixture(scope="module")
def psnr():
    return Psnr({}, "cpu")


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def plain(level, width=16, height=16):
    return Image.new("RGB", (width, height), (level, level, level))


def ssim_by_scipy(one, other):
    """Wang et al.'s formula with scipy's Gaussian filter, the mean over channels and pixels."""

    def blurred(values):
        return gaussian_filter(values, 1.5, radius=5, mode="mirror", axes=(0, 1))

    x, y = (np.asarray(image) / 255 for image in (one, other))
    mean_x, mean_y = blurred(x), blurred(y)
    variances = blurred(x * x) - mean_x**2 + blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
    return np.mean(luminance * (2 * covariance + 0.03**2) / (variances + 0.03**2))


def test_ssim_of_plain_images_is_that_of_their_levels(ssim):
    x, y = 51 / 255, 102 / 255
    expected = (2 * x * y + 0.01**2) / (x * x + y * y + 0.01**2)
    found = ssim.compare([plain(51), plain(51)], [plain(102), plain(51)])
    assert found.dtype == np.float64
    assert found == pytest.approx([expected, 1], abs=1e-9)


def test_ssim_is_the_formula_of_wang_and_others(ssim):
    one, other = noise(40, 24), Image.blend(noise(40, 24), noise(40, 24, seed=1), 0.4)
    assert ssim.compare([one], [other]) == pytest.approx([ssim_by_scipy(one, other)], abs=1e-9)


def test_psnr_of_a_known_error(psnr):
    # 51 levels are 0.2, so the mean squared error is 0.04; a half of the pixels off is half of that.
    half = plain(0)
    half.paste((51, 51, 51), (0, 0, 8, 16))
    found = psnr.compare([plain(51), half], [plain(0), plain(0)])
    assert found.dtype == np.float64
    assert found == pytest.approx([-10 * math.log10(0.04), -10 * math.log10(0.02)], abs=1e-6)


def test_psnr_of_identical_and_of_nearly_identical_images_is_100(psnr):
    almost = plain(128, 512, 512)
    almost.putpixel((3, 3), (129, 128, 128))  # 107 dB, and an identical image must not be under it
    assert psnr.compare([plain(9), almost], [plain(9), plain(128, 512, 512)]).tolist() == [100.0, 100.0]


def test_pairs_may_be_of_different_sizes(ssim, psnr):
    ones, others = [noise(20, 12), noise(11, 30)], [noise(20, 12, seed=1), noise(11, 30, seed=1)]
    for metric in (ssim, psnr):
        alone = [metric.compare([one], [other])[0] for one, other in zip(ones, others, strict=True)]
        assert metric.compare(ones, others).tolist() == alone


def test_a_pair_of_two_sizes_is_named(ssim, psnr):
    for metric in (ssim, psnr):
        with pytest.raises(InputError, match="in pair 1 the patched image is 16x20 and the base's 20x16"):
            metric.compare([plain(0), plain(0, 16, 20)], [plain(0), plain(0, 20, 16)])


def test_an_image_under_the_window_is_named(ssim):
    with pytest.raises(InputError, match="SSIM: pair 0 is 64x10, and each side must have at least 11 pixels"):
        ssim.compare([plain(0, 64, 10)], [plain(0, 64, 10)])


def test_unpaired_images_are_refused(psnr):
    with pytest.raises(InputError, match="2 patched and 1 base images"):
        psnr.compare([plain(0), plain(0)], [plain(0)])


def test_a_missing_torchmetrics_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional", None)
    with pytest.raises(InputError, match="pip install torchmetrics"):
        Ssim({}, "cpu")
