"""Inversion: DDIM's own formula there and back, by each operator, and the pipeline is afterwards what it was."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import surgery
from surgery.analysis.inversion import PRESETS, captioned_images
from surgery.analysis.inversion.inverting import carry, ddim_schedulers, decode, encode
from surgery.analysis.inversion.pictures import fitted_image, sheet
from surgery.analysis.inversion.sides import sides_of
from surgery.errors import InputError, UnsupportedModelError
from surgery.models.patching import patched_modules
from surgery.nn.operators import OPERATORS
from surgery.recipes.shapes.scenes import Drawn, render
from surgery.validate.metrics.pixels import Ssim

from ..conftest import SHAPES, draw, load_shapes
from ..nn.backbones.cross import pixart
from ..tiny import tiny_sdxl

PROMPTS = ["a red circle to the left of a blue square", "two green stars"]


@pytest.fixture(scope="module")
def shapes():
    """One pipeline for the tests that leave it as it was, which is itself a promise tested below."""
    return load_shapes()


@pytest.fixture(scope="module")
def scenes():
    """What PROMPTS say, rendered."""
    objects = [
        (Drawn("red", "circle", 6, 20, 20), Drawn("blue", "square", 38, 22, 18)),
        (Drawn("green", "star", 6, 8, 20), Drawn("green", "star", 36, 34, 22)),
    ]
    return [Image.fromarray(render(drawn, 220)) for drawn in objects]


@pytest.fixture(scope="module")
def found(shapes, scenes):
    """All sides at few steps."""
    return surgery.invert(shapes, scenes, PROMPTS, steps=4, batch=2)


def by_hand(pipeline, latents, steps, inverse):
    """DDIM (arXiv 2010.02502, eq. 12) in float64 on the model's v, with the shipped scheduler's noise levels."""
    levels = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    times = [round(1000 * (step + 1) / steps) - 1 for step in range(steps)]
    embeddings = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)[0]
    latents = latents.double()
    for time in times if inverse else reversed(times):
        before, at = levels[max(time - 1000 // steps, 0)], levels[time]
        now, then = (before, at) if inverse else (at, before)
        with torch.no_grad():
            velocity = pipeline.unet(latents.float(), time, embeddings).sample.double()
        image = math.sqrt(now) * latents - math.sqrt(1 - now) * velocity
        noise = math.sqrt(now) * velocity + math.sqrt(1 - now) * latents
        latents = math.sqrt(then) * image + math.sqrt(1 - then) * noise
    return latents


def test_the_dense_side_is_ddims_formula_there_and_back(shapes, scenes, found):
    latents = encode(shapes, scenes)
    inverse, forward = ddim_schedulers(shapes)
    noise, wanted = carry(shapes, inverse, latents, PROMPTS, 4), by_hand(shapes, latents, 4, inverse=True)
    assert (noise - wanted).abs().max() < 1e-4 * wanted.abs().max()
    back, wanted = carry(shapes, forward, noise, PROMPTS, 4), by_hand(shapes, wanted, 4, inverse=False)
    assert (back - wanted).abs().max() < 1e-4 * wanted.abs().max()
    for image, other in zip(found.sides["dense"].images, decode(shapes, wanted.float()), strict=True):
        assert np.abs(np.asarray(image, int) - np.asarray(other, int)).max() <= 1


def test_more_steps_come_nearer_and_none_as_near_as_the_autoencoder(shapes, scenes, found):
    more = surgery.invert(shapes, scenes, PROMPTS, operators=["dense"], steps=20, batch=2)
    few, many = (inversion.sides["dense"].scores["round_trip"]["psnr"].mean for inversion in (found, more))
    assert many > few + 1
    assert more.sides["dense"].scores["image"]["psnr"].mean < more.round_trip.scores["image"]["psnr"].mean


def test_a_side_is_what_the_pipeline_patched_by_hand_gives(scenes, found, shapes):
    dense_noise = None
    shared = surgery.invert(shapes, scenes, PROMPTS, operators=["gag"], steps=4, batch=2, inverted_by="dense")
    pipeline = load_shapes()
    latents = encode(pipeline, scenes)
    inverse, forward = ddim_schedulers(pipeline)
    for name in ("dense", "gag"):
        if name != "dense":
            surgery.patch(pipeline, operator=name)
        noise = carry(pipeline, inverse, latents, PROMPTS, 4)
        dense_noise = noise if name == "dense" else dense_noise
        for inversion, start in ((found, noise), (shared, dense_noise)):
            wanted = decode(pipeline, carry(pipeline, forward, start, PROMPTS, 4))
            for image, other in zip(inversion.sides[name].images, wanted, strict=True):
                assert image.tobytes() == other.tobytes()
        if name != "dense":
            surgery.unpatch(pipeline)
    assert found.sides["gag"].setting == "alpha 1.5, scale 10, temperature 1, zeta 0, eta 15, unit head"
    assert shared.sides["gag"].images[0].tobytes() != found.sides["gag"].images[0].tobytes()


def test_scores_are_the_metrics_of_the_pictures_and_their_paired_differences(scenes, found):
    assert list(found.rows) == ["VAE round trip", "dense", "sparse", "pladis", "gag"]
    for target, others in (("image", scenes), ("round_trip", found.round_trip.images)):
        for side in found.sides.values():
            values = Ssim({}, "cpu").compare(side.images, others)
            assert side.values[target]["ssim"].tolist() == values.tolist()
            assert side.scores[target]["ssim"].mean == pytest.approx(values.mean())
        gag, dense = (found.sides[name].scores[target]["psnr"] for name in ("gag", "dense"))
        assert dense.difference is None and gag.difference == pytest.approx(gag.mean - dense.mean)
        assert gag.interval[0] <= gag.difference <= gag.interval[1]
    picture = sheet(found)
    assert picture.width > 6 * 160 and picture.height > 2 * 160
    assert sorted(found.round_trip.values) == ["image"]


def test_the_pipeline_is_afterwards_what_it_was(scenes, monkeypatch):
    pipeline = surgery.patch(load_shapes(), scale=1.25, layers="up", implementation="reference")
    operations, scheduler, index = pipeline.unet.pladis_operations(), pipeline.scheduler, dict(pipeline.config)
    before = draw(pipeline)
    sides = sides_of(pipeline, ("gag", "pladis"))
    assert list(sides) == ["dense", "gag", "pladis"] and sides["dense"] is None and sides["pladis"] == operations
    assert sides["gag"][0]["layers"] == operations[0]["layers"] and sides["gag"][0]["scale"] == 10.0
    done = surgery.invert(pipeline, scenes[:1], PROMPTS[0], operators=["gag", "pladis"], steps=2, guidance_scale=3.0)
    assert done.sides["pladis"].setting == "alpha 1.5, scale 1.25, temperature 1"
    assert done.sides["gag"].scores["image"]["ssim"].interval is None
    assert pipeline.unet.pladis_operations() == operations and pipeline.scheduler is scheduler
    assert {module.pladis_implementation for module in patched_modules(pipeline.unet).values()} == {"reference"}
    assert dict(pipeline.config) == index and torch.equal(draw(pipeline), before)
    decoded = iter([pipeline.vae.decode])  # the second time, with dense attention in place, there is none
    monkeypatch.setattr(pipeline.vae, "decode", lambda *given, **named: next(decoded)(*given, **named))
    with pytest.raises(StopIteration):
        surgery.invert(pipeline, scenes[:1], PROMPTS[0], steps=2)
    assert pipeline.unet.pladis_operations() == operations and pipeline.scheduler is scheduler


@pytest.mark.parametrize("make", [tiny_sdxl, pixart])
def test_other_pipelines_and_schedulers(make, scenes):
    pipeline, _ = make()
    side = 64 if make is tiny_sdxl else 32
    found = surgery.invert(pipeline, scenes, "a cat", operators=["sparse"], steps=2, height=side, width=side, batch=2)
    assert found.settings["timestep_spacing"] == "leading" and found.images[0].size == (side, side)
    inverse, forward = ddim_schedulers(pipeline)
    assert inverse.config.clip_sample is forward.config.clip_sample is False
    levels = pipeline.scheduler.alphas_cumprod
    assert torch.equal(inverse.alphas_cumprod, levels) and torch.equal(forward.alphas_cumprod, levels)


def test_noise_levels_are_the_schedulers_own_also_where_its_config_leaves_them_to_its_defaults():
    from diffusers import EulerDiscreteScheduler, LCMScheduler

    pipeline = load_shapes()
    for scheduler in (LCMScheduler(), EulerDiscreteScheduler(timestep_spacing="linspace", prediction_type="sample")):
        pipeline.scheduler = scheduler
        for made in ddim_schedulers(pipeline):
            assert torch.equal(made.alphas_cumprod, scheduler.alphas_cumprod)
            assert made.config.prediction_type == scheduler.config.prediction_type
            assert made.config.timestep_spacing == "leading" and made.config.clip_sample is False


def test_latents_are_normalised_and_back_as_the_autoencoders_config_says(scenes):
    pipeline, _ = tiny_sdxl()
    plain, picture = encode(pipeline, scenes), decode(pipeline, encode(pipeline, scenes))
    for settings, wanted in (
        ({"scaling_factor": 0.5, "shift_factor": 0.25}, (plain / 0.18215 - 0.25) * 0.5),
        (
            {"latents_mean": [1.0, 2.0, 3.0, 4.0], "latents_std": [2.0] * 4, "scaling_factor": 0.5},
            (plain / 0.18215 - torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1)) * 0.25,
        ),
    ):
        pipeline.vae.register_to_config(**settings)
        latents = encode(pipeline, scenes)
        assert torch.allclose(latents, wanted, atol=1e-5)
        for image, other in zip(decode(pipeline, latents), picture, strict=True):
            assert np.abs(np.asarray(image, int) - np.asarray(other, int)).max() <= 1


def test_flow_matching_and_what_is_no_diffusion_is_refused_by_name(scenes):
    from diffusers import DPMSolverMultistepScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

    pipeline = load_shapes()
    for scheduler, reason in (
        (FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler is made for flow matching"),
        (
            DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
            "DPMSolverMultistepScheduler is made for flow matching",
        ),
        (EDMEulerScheduler(), "EDMEulerScheduler has no alphas_cumprod"),
    ):
        pipeline.scheduler = scheduler
        with pytest.raises(UnsupportedModelError, match=f"StableDiffusionPipeline cannot be inverted.*{reason}"):
            surgery.invert(pipeline, scenes, PROMPTS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"images": []}, "there is no image"),
        ({"images": ["nowhere.png"] * 2}, "there is no image nowhere.png"),
        ({"images": [__file__] * 2}, "cannot be read as an image"),
        ({"prompts": PROMPTS * 2}, "4 captions for 2 images"),
        ({"operators": ["gga"]}, "no operator 'gga'; did you mean gag"),
        ({"operators": ["gag", "gag"]}, "named twice"),
        ({"metrics": ["clip_score"]}, "metrics must be of ssim, psnr, lpips"),
        ({"steps": 1001}, "steps must be at most 1000"),
        ({"steps": 0, "height": 65}, "steps: .*height: "),
        ({"inverted_by": "none"}, "inverted_by must be one of same, dense"),
        ({"batch": 0}, "batch must be at least 1"),
    ],
)
def test_bad_input_is_told_before_the_work(shapes, scenes, given, message):
    with pytest.raises(InputError, match=f"(?s){message}"):
        surgery.invert(shapes, **{"images": scenes, "prompts": PROMPTS, **given})


def test_a_schedule_and_guidance_are_refused(scenes):
    pipeline = surgery.patch(load_shapes(), schedule={"steps": [0, 1]})
    with pytest.raises(InputError, match="have a schedule, which is for the way from noise alone"):
        surgery.invert(pipeline, scenes, PROMPTS, steps=2)
    pipeline = surgery.guide(load_shapes(), "seg")
    with pytest.raises(InputError, match="the pipeline is guided"):
        surgery.invert(pipeline, scenes, PROMPTS, steps=2)


def test_the_presets_are_the_papers_choice():
    # GAG, Appendix I: 50 steps both ways, no guidance, one latent by dense attention; Table 7: SSIM and LPIPS of three
    wanted = {"steps": 50, "guidance_scale": 1.0, "inverted_by": "dense", "metrics": ("ssim", "lpips")}
    assert PRESETS["gag"] == {**wanted, "operators": ("dense", "sparse", "gag")}
    assert OPERATORS["sparse"].defaults["alpha"] == 1.5
    assert {**OPERATORS["gag"].defaults, "zeta": 0.0, "eta": 15.0} == OPERATORS["gag"].defaults


def test_captions_come_once_for_each_or_from_a_file(tmp_path):
    assert captioned_images(["a.png", "b.png"], ["x"]) == (["a.png", "b.png"], ["x", "x"])
    assert captioned_images(["a.png", "b.png"], ["x", "y"])[1] == ["x", "y"]
    named, plain, empty = tmp_path / "named.jsonl", tmp_path / "plain.txt", tmp_path / "empty.jsonl"
    named.write_text('{"file": "a.png", "prompt": "x"}\n{"file": "sub/b.png", "caption": "y"}\n')
    plain.write_text("x\ny\n")
    empty.write_text("")
    assert captioned_images(captions=named) == ([tmp_path / "a.png", tmp_path / "sub/b.png"], ["x", "y"])
    assert captioned_images(["a.png", "b.png"], captions=plain)[1] == ["x", "y"]
    for given, message in (
        ((["a.png"], []), "give captions"),
        ((["a.png"], ["x"], plain), "give captions"),
        (([], ["x"]), "there is no image"),
        ((["a.png"], [], plain), "2 captions for 1 images"),
        ((["a.png", "b.png"], [], named), "names image files itself"),
        (([], [], plain), "plain.txt:1: there is no file"),
        (([], [], empty), "is empty"),
        ((["a.png"], [], tmp_path / "no.txt"), "there is no file"),
    ):
        with pytest.raises(InputError, match=message):
            captioned_images(*given)


def test_an_image_is_turned_and_cropped_around_its_middle(tmp_path):
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, :32], wide[:, 32:64], wide[:, 64:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    middle = np.asarray(fitted_image(Image.fromarray(wide), 64, 64))
    assert middle.shape == (64, 64, 3) and (middle[:, 8:-8] == (0, 255, 0)).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(wide[:, :64]).save(tmp_path / "turned.png", exif=exif)
    turned = np.asarray(fitted_image(tmp_path / "turned.png", 64, 32))
    assert (turned[:28] == (255, 0, 0)).all() and (turned[36:] == (0, 255, 0)).all()


def test_the_command_writes_a_png_and_tells_its_scores(run, scenes, tmp_path):
    for index, scene in enumerate(scenes):
        scene.save(tmp_path / f"{index}.png")
    lines = [json.dumps({"file": f"{index}.png", "prompt": prompt}) for index, prompt in enumerate(PROMPTS)]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    options = ["--steps", "2", "--operators", "gag", "--batch", "2", "--height", "64", "--width", "64"]
    done = run("invert", SHAPES, "--prompts", "captions.jsonl", *options, "--json", cwd=tmp_path, check=0)
    made = json.loads(done.stdout)
    assert made["schema_version"] == 1 and made["prompts"] == PROMPTS and made["settings"]["inverted_by"] == "same"
    assert [side["side"] for side in made["sides"]] == ["VAE round trip", "dense", "gag"]
    assert len(made["values"]) == 2 and made["values"][0]["gag"]["image"]["psnr"] > 0
    assert made["sides"][2]["scores"]["image"]["ssim"]["interval"][0] < 1
    with Image.open(tmp_path / "out/inversion.png") as picture:
        assert picture.width > 4 * 160 and json.loads(picture.text["surgery"])["settings"]["steps"] == 2
    table = run("invert", SHAPES, "0.png", "--prompt", "a star", *options, "--out", "x.png", cwd=tmp_path, check=0)
    assert "VAE round trip" in table.stdout and "gag: alpha 1.5" in table.stdout and "each by its own" in table.stdout
    # GAG, Appendix I, but for what is given besides
    given = ["--preset", "gag", "--steps", "2", "--metrics", "ssim", "--out", "y.png", "--json"]
    made = json.loads(run("invert", SHAPES, "0.png", "--prompt", "a star", *given, cwd=tmp_path, check=0).stdout)
    assert [side["side"] for side in made["sides"]] == ["VAE round trip", "dense", "sparse", "gag"]
    assert made["settings"] | {"height": 0, "width": 0, "timestep_spacing": ""} == {
        "steps": 2, "guidance_scale": 1.0, "inverted_by": "dense", "height": 0, "width": 0, "timestep_spacing": "",
    }  # fmt: skip
    for wrong, message in (
        (["no.png", "--prompt", "x"], "there is no image no.png"),
        (["0.png"], "give captions"),
        (["0.png", "1.png", "--prompts", "captions.jsonl"], "names image files itself"),
        (["0.png", "--prompt", "x", "--metrics", "fid"], "metrics must be of ssim, psnr, lpips"),
        (["0.png", "--prompt", "x", "--out", "x.jpg"], "must name a .png file"),
    ):
        failed = run("invert", SHAPES, *wrong, cwd=tmp_path, check=2)
        assert message in failed.stderr and "Traceback" not in failed.stderr
