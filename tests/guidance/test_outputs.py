"""The methods that are made of CFG's two outputs: each against its formula in float64, by its paper or authors."""

import pytest
import torch

import surgery
from surgery.guidance.base import Grid, Step
from surgery.guidance.methods import guidance_of

from .oracles import sampled

STEP = Step(index=0, level=0.5, grid=None)


@pytest.fixture
def outputs():
    """(C, U) of two images, (2, 4, 16, 24) float64."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 2, 4, 16, 24, generator=generator, dtype=torch.float64).unbind()


def combined(name, cond, uncond, scale=4.0, step=STEP, **settings):
    """What a method makes of the outputs at the first step, computed in float32 and given in float64."""
    method = guidance_of({"method": name, **settings})
    method.begin()
    return method.combined(cond.float(), uncond.float(), scale, step).double()


def test_tcfg_keeps_of_u_what_lies_along_the_first_singular_vector(outputs):
    expected = []
    for cond, uncond in zip(*outputs, strict=True):
        pair = torch.stack([cond.flatten(), uncond.flatten()])
        # The first right singular vector is the pair's combination by the first eigenvector of its Gram matrix.
        first = torch.linalg.eigh(pair @ pair.T)[1][:, -1] @ pair
        kept = (uncond.flatten() @ first / (first @ first) * first).view_as(uncond)
        expected.append(kept + 4.0 * (cond - kept))
    found = combined("tcfg", *outputs)
    assert torch.allclose(found, torch.stack(expected), atol=1e-4)
    assert not torch.allclose(found, outputs[1] + 4.0 * (outputs[0] - outputs[1]), atol=0.1)


def pyramid_low(planes):
    """The low level of a Laplacian pyramid of two, brought back to the size: binomial blur, half by means of four,
    double by the nine-three-three-one of bilinear upsampling, blur; reflected borders."""
    line = torch.tensor([1, 4, 6, 4, 1], dtype=torch.float64) / 16

    def blur(x):
        for dim in (-2, -1):
            size = x.shape[dim]
            reach = torch.arange(-2, size + 2)
            reach = torch.where(reach < 0, -reach, torch.where(reach >= size, 2 * size - 2 - reach, reach))
            shifted = x.index_select(dim, reach)
            x = sum(weight * shifted.narrow(dim, at, size) for at, weight in enumerate(line))
        return x

    def halve(x):
        return (x[..., ::2, :] + x[..., 1::2, :])[..., ::2] / 4 + (x[..., ::2, :] + x[..., 1::2, :])[..., 1::2] / 4

    def double(x):
        for dim in (-2, -1):
            size = x.shape[dim]
            before = x.index_select(dim, torch.arange(-1, size - 1).clamp(min=0))
            after = x.index_select(dim, torch.arange(1, size + 1).clamp(max=size - 1))
            x = torch.stack([0.25 * before + 0.75 * x, 0.75 * x + 0.25 * after], dim=-1 if dim == -1 else -2)
            x = x.flatten(-2) if dim == -1 else x.flatten(-3, -2)
        return x

    return blur(double(halve(blur(planes))))


def test_fdg_guides_high_frequencies_by_a_scale_of_their_own(outputs):
    cond, uncond = outputs
    high = lambda x: x - pyramid_low(x)  # noqa: E731  the level above
    expected = pyramid_low(uncond + 4.0 * (cond - uncond)) + high(uncond) + 9.0 * (high(cond) - high(uncond))
    assert torch.allclose(combined("fdg", cond, uncond, high=9.0), expected, atol=1e-4)
    plain = uncond + 4.0 * (cond - uncond)
    assert torch.allclose(combined("fdg", cond, uncond, high=4.0), plain, atol=1e-4)


def fresca_by_its_code(away, low, high, threshold):
    """FreSca's filter of one image, (channels, height, width) float64, with its authors' cutoff."""
    _, height, width = away.shape
    spectrum = torch.fft.fftshift(torch.fft.fft2(away), dim=(1, 2))
    size = spectrum.abs().mean(0)
    cutoffs = []
    for line in (size[height // 2], size[:, width // 2]):
        sums = torch.cumsum(line, 0)
        reached = [at for at in range(len(line)) if sums[at] >= threshold * sums[-1]]
        cutoffs.append(min(reached[0], min(height, width) // 4))
    cutoff = min(max(3, sum(cutoffs) // 2), height // 2, width // 2)
    factors = torch.full((height, width), high, dtype=torch.float64)
    for row in range(height // 2 - cutoff, height // 2 + cutoff):
        for column in range(width // 2 - cutoff, width // 2 + cutoff):
            factors[row, column] = low
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum * factors, dim=(1, 2))).real


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.45])
def test_fresca_scales_what_lies_beyond_each_images_cutoff(outputs, threshold):
    cond, uncond = outputs
    smooth = pyramid_low(pyramid_low(uncond - cond))  # so that the images' cutoffs differ
    cond = torch.stack([cond[0], uncond[1] + smooth[1]])
    away = cond - uncond
    filtered = torch.stack([fresca_by_its_code(one, 0.9, 1.5, threshold) for one in away])
    found = combined("fresca", cond, uncond, low=0.9, threshold=threshold)
    assert torch.allclose(found, uncond + 4.0 * filtered, atol=1e-4)


@pytest.mark.parametrize("name", ["fdg", "fresca"])
def test_frequencies_of_packed_latents_are_those_of_their_grid_and_of_a_video_those_of_each_frame(outputs, name):
    cond, uncond = outputs
    expected = combined(name, cond, uncond)
    tokens = [one.flatten(2).transpose(1, 2) for one in outputs]
    packed = Step(index=0, level=0.5, grid=Grid(1, 16, 24, False, True))
    found = combined(name, *tokens, step=packed)
    assert torch.allclose(found.transpose(1, 2).unflatten(2, (16, 24)), expected, atol=1e-5)
    video = [torch.stack([one, one.flip(0)], dim=2) for one in outputs]  # (2, 4, frames, 16, 24)
    found = combined(name, *video)
    assert torch.allclose(found, torch.stack([expected, expected.flip(0)], dim=2), atol=1e-5)


def test_mambo_g_takes_a_scale_that_falls_with_the_size_of_the_difference(outputs):
    cond, uncond = outputs
    uncond = cond + 0.1 * uncond
    away = cond - uncond
    ratio = away.flatten(1).norm(dim=1) / uncond.flatten(1).norm(dim=1)
    scale = (1 + 3.0 * torch.exp(-8.0 * ratio)).view(-1, 1, 1, 1)
    assert torch.allclose(combined("mambo-g", cond, uncond), uncond + scale * away, atol=1e-5)


def test_momentum_leads_away_from_the_average_of_the_steps_before():
    method = guidance_of({"method": "momentum", "scale": 0.7, "decay": 0.8})
    guided = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for _ in range(2):  # a run forgets the one before
        method.begin()
        average = guided[0]
        for one in guided:
            found = method.combined(one.float(), None, 1.0, STEP)
            assert torch.allclose(found.double(), one + 0.7 * (one - average), atol=1e-5)
            average = 0.2 * one + 0.8 * average


def test_smc_cfg_is_its_authors_control_over_the_steps():
    method = guidance_of({"method": "smc-cfg", "rate": 5.0, "gain": 0.2})
    pairs = torch.randn(4, 2, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for _ in range(2):
        method.begin()
        before = None
        for cond, uncond in pairs:
            error = cond - uncond
            before = error if before is None else before
            surface = (error - before) + 5.0 * before
            before = error - 0.2 * torch.sign(surface)
            found = method.combined(cond.float(), uncond.float(), 3.0, STEP)
            assert torch.allclose(found.double(), uncond + 3.0 * before, atol=1e-5)


def test_they_are_drawn_in_a_pipeline_with_a_scale_of_each_image_and_no_evaluation_more(pipeline):
    from surgery.guidance import guided

    call = {"prompt": "a red circle", "num_inference_steps": 2, "height": 64, "width": 64, "output_type": "latent"}
    plain = sampled(pipeline, {**call, "guidance_scale": 4.0})[0]
    for name in ("tcfg", "fdg", "fresca", "mambo-g", "momentum", "smc-cfg"):
        with guided(pipeline, name) as driver:
            alone = sampled(pipeline, {**call, "guidance_scale": 4.0})[0]
            assert driver.evaluations == 2 * 2 and (alone - plain).abs().max() > 1e-3, name
        with guided(pipeline, name, scales=[4.0]):
            assert torch.allclose(sampled(pipeline, {**call, "guidance_scale": 9.0})[0], alone, atol=1e-4), name
    surgery.guide(pipeline, "momentum")
    single = {**call, "guidance_scale": 1.0}
    found = sampled(pipeline, single)[0]
    surgery.unguide(pipeline)
    assert not torch.allclose(found, sampled(pipeline, single)[0], atol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (5, 7)])
def test_frequencies_of_small_and_odd_planes_are_finite_and_sum_to_the_whole(height, width):
    cond, uncond = torch.randn(2, 1, 4, height, width, generator=torch.Generator().manual_seed(0)).double()
    for name in ("fdg", "fresca"):
        assert combined(name, cond, uncond).isfinite().all()
    same = combined("fresca", cond, uncond, high=1.0)
    assert torch.allclose(same, uncond + 4.0 * (cond - uncond), atol=1e-5)
    constant = torch.full_like(cond, 2.0)
    found = combined("fdg", constant, torch.zeros_like(cond), high=50.0)
    assert torch.allclose(found, torch.full_like(found, 8.0), atol=1e-5)
