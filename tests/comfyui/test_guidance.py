"""Guidance of the pack without ComfyUI: by the text of the papers in float64, whatever a model predicts."""

import sys
from types import SimpleNamespace

import pytest
import torch

from surgery.guidance.methods import METHODS

from . import stand_in
from .pack import NAME, load, node

SHAPE = (2, 3, 8, 8)
NAMES = {"fdg": "FDG", "mambo-g": "MAMBOG", "momentum": "Momentum", "smc-cfg": "SMCCFG"}


def eps(sigma, output, latents):
    return latents - sigma * output


def v_prediction(sigma, output, latents):
    return latents / (sigma**2 + 1) - output * sigma / (sigma**2 + 1) ** 0.5


def image(sigma, output, latents):
    return output


PREDICTED = pytest.mark.parametrize("denoised", [eps, v_prediction, image])


class Run:
    """A sampling run: step(sigma, C, U, w) is the guided output of the model at each step, in its own terms."""

    def __init__(self, model, denoised):
        self.function, self.denoised = model.model_options["sampler_cfg_function"], denoised
        for wrappers in model.wrappers.get("outer_sample", {}).values():
            wrappers[0](lambda: None)

    def step(self, sigma, pred_cond, pred_uncond, scale):
        latents = torch.randn(SHAPE, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        sigma = torch.full((SHAPE[0],), sigma, dtype=torch.float64)
        shaped = sigma.view(-1, 1, 1, 1)
        cond, uncond = (self.denoised(shaped, one, latents) for one in (pred_cond, pred_uncond))
        given = {"cond_denoised": cond, "uncond_denoised": uncond, "cond": latents - cond, "uncond": latents - uncond}
        sampling = SimpleNamespace(calculate_denoised=lambda s, *rest: self.denoised(s.view(-1, 1, 1, 1), *rest))
        given |= {"model": SimpleNamespace(model_sampling=sampling), "sigma": sigma, "timestep": sigma}
        found = latents - self.function({**given, "input": latents, "cond_scale": scale})
        offset = self.denoised(shaped, torch.zeros(SHAPE).double(), latents)
        slope = self.denoised(shaped, torch.ones(SHAPE).double(), latents) - offset
        return (found - offset) / slope


@pytest.fixture
def outputs():
    """(C, U) of three steps."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, *SHAPE, generator=generator, dtype=torch.float64) for _ in range(3)]


def guided(name, **given):
    return node(f"{NAMES[name]}Guidance")(stand_in.Patcher(stand_in.UNet()), **given)


@PREDICTED
def test_momentum_is_algorithm_1(outputs, denoised):
    run, average = Run(guided("momentum", scale=0.7, decay=0.6)[0], denoised), None
    for sigma, (cond, uncond) in zip((8.0, 3.0, 1.0), outputs, strict=True):
        output = uncond + 4.0 * (cond - uncond)
        average = output if average is None else average
        torch.testing.assert_close(run.step(sigma, cond, uncond, 4.0), output + 0.7 * (output - average))
        average = 0.4 * output + 0.6 * average


@PREDICTED
def test_smc_cfg_drives_the_error_to_its_surface(outputs, denoised):
    run, before = Run(guided("smc-cfg", rate=5.0, gain=0.2)[0], denoised), None
    for sigma, (cond, uncond) in zip((8.0, 3.0, 1.0), outputs, strict=True):
        error = cond - uncond
        before = error if before is None else before
        before = error - 0.2 * torch.sign((error - before) + 5.0 * before)
        torch.testing.assert_close(run.step(sigma, cond, uncond, 4.0), uncond + 4.0 * before)


@PREDICTED
def test_mambo_g_s_scale_falls_with_the_size_of_the_difference(outputs, denoised):
    run = Run(guided("mambo-g", alpha=8.0)[0], denoised)
    cond, uncond = outputs[0]
    cond = uncond + 0.05 * cond
    size = torch.stack([(c - u).norm() / u.norm() for c, u in zip(cond, uncond, strict=True)]).view(-1, 1, 1, 1)
    wanted = uncond + (1 + 3.0 * torch.exp(-8.0 * size)) * (cond - uncond)
    torch.testing.assert_close(run.step(2.0, cond, uncond, 4.0), wanted)


def test_fdg_guides_what_is_even_by_cfg_s_scale_and_a_checkerboard_by_its_own():
    run = Run(guided("fdg", high=10.0)[0], eps)
    uncond, board = torch.zeros(SHAPE).double(), (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
    torch.testing.assert_close(run.step(2.0, uncond + 1.0, uncond, 4.0), torch.full(SHAPE, 4.0).double())
    found = run.step(2.0, uncond + board, uncond, 4.0)[..., 2:-2, 2:-2]
    torch.testing.assert_close(found, (10.0 * board).double().expand(SHAPE)[..., 2:-2, 2:-2], atol=0.1, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_outside_its_window_it_is_cfg_and_a_run_keeps_nothing_for_the_next(outputs, name):
    model, what = guided(name, sigma_low=0.5, sigma_high=5.0)
    copied = model.clone()  # by a node behind it
    assert what.startswith(f"{name}, ") and "REPLACED" not in what
    found = []
    for one in (model, copied):
        run = Run(one, eps)
        cond, uncond = outputs[0]
        torch.testing.assert_close(run.step(8.0, cond, uncond, 4.0), uncond + 4.0 * (cond - uncond))
        found.append([run.step(sigma, *both, 4.0) for sigma, both in zip((4.0, 2.0), outputs[1:], strict=True)])
        torch.testing.assert_close(run.step(0.1, cond, uncond, 4.0), uncond + 4.0 * (cond - uncond))
    assert all(torch.equal(first, again) for first, again in zip(*found, strict=True))
    assert "REPLACED" in node("MomentumGuidance")(copied)[1]


@pytest.mark.parametrize("name", NAMES)
def test_its_settings_are_those_of_a_recipe(name):
    load()
    nodes = {one.identifier: one for one in sys.modules[f"{NAME}.nodes"].NODES}
    own = {one.name: one.default for one in nodes[f"PladisSurgery{NAMES[name]}Guidance"].inputs[1:-2]}
    fields = METHODS[name].model_fields
    assert own == {key: fields[key].default for key in own}
    assert own.keys() == fields.keys() - {"method", "steps", "fraction", "sigma"}
