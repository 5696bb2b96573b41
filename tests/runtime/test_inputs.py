"""`surgery generate` from an image, a mask, a control image: each what diffusers' own pipeline draws of them."""

import io
import json
import struct

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from PIL import Image, ImageOps

import surgery
from surgery.errors import InputError
from surgery.export.serve.uploads import image_size
from surgery.runtime.draw import base_and_patched, draw
from surgery.runtime.inputs import Inputs, images_of, with_inputs

from ..conftest import load_shapes
from ..nn.backbones.cross import pixart
from ..nn.backbones.flux import flux
from ..tiny import tiny_sdxl

SAMPLING = {"steps": 4, "guidance_scale": 4.0, "height": 64, "width": 64}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{name: path} of an image, a mask, a control image and a ControlNet."""
    folder = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (80, 64, 3), dtype=np.uint8)).save(folder / "image.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    torch.manual_seed(0)
    controlnet = ControlNetModel.from_unet(load_shapes().unet, conditioning_embedding_out_channels=(16, 16, 32))
    for parameter in controlnet.controlnet_mid_block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    controlnet.save_pretrained(folder / "controlnet")
    return {
        "image": str(folder / "image.png"),
        "mask": str(folder / "mask.png"),
        "control_image": str(folder / "image.png"),
        "controlnet": str(folder / "controlnet"),
    }


def inputs_of(files, *names):
    inputs = Inputs(**{name: files[name] for name in names})
    return inputs, inputs.images()


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["image"], StableDiffusionImg2ImgPipeline),
        (["image", "mask"], StableDiffusionInpaintPipeline),
        (["control_image", "controlnet"], StableDiffusionControlNetPipeline),
    ],
)
def test_it_draws_what_the_tasks_own_pipeline_draws_patched_and_unpatched(pipeline, files, names, kind):
    other = load_shapes()
    given = inputs_of(files, *names)
    strength = {"strength": 0.5} if "image" in names else {}
    patched_pipeline, sampling = with_inputs(surgery.patch(pipeline, scale=2.0), *given, {**SAMPLING, **strength})
    base, patched = base_and_patched(patched_pipeline, ["a red circle"], [3], sampling)
    more = {}
    if "controlnet" in names:
        more["controlnet"] = ControlNetModel.from_pretrained(files["controlnet"])
    own = kind(**{**other.components, **more}, requires_safety_checker=False)
    own.set_progress_bar_config(disable=True)
    arguments = {"prompt": ["a red circle"], "num_inference_steps": 4, "guidance_scale": 4.0, **strength}
    arguments["image"] = Image.open(files["image"]).convert("RGB").resize((64, 64))
    if "mask" in names:
        arguments |= {"mask_image": Image.open(files["mask"]).convert("L"), "height": 64, "width": 64}
    wanted = own(**arguments, generator=[torch.Generator().manual_seed(3)]).images[0]
    job = ("a red circle", 3)
    assert np.abs(np.asarray(base[job], int) - np.asarray(wanted, int)).max() <= 1
    assert np.abs(np.asarray(patched[job], int) - np.asarray(base[job], int)).max() > 5


def test_a_transformers_pipeline_starts_from_an_image(files):
    pipe = surgery.patch(flux()[0])
    size = {"steps": 2, "height": 32, "width": 32, "max_sequence_length": 24, "strength": 0.5}
    made, sampling = with_inputs(pipe, *inputs_of(files, "image"), size)
    assert type(made).__name__ == "FluxImg2ImgPipeline" and made.transformer is pipe.transformer
    assert draw(made, [("a cat", 0)], sampling)[0].size == (32, 32)


def test_a_refiners_artifact_takes_an_image(files, tmp_path, run):
    pipe = tiny_sdxl(blocks=1)[0]
    refiner = StableDiffusionXLImg2ImgPipeline(**pipe.components, add_watermarker=False)
    refiner.save_pretrained(tmp_path / "base")
    (tmp_path / "r.yaml").write_text(
        "schema: 1\nname: refined\nbase: {pipeline: ./base}\n"
        "operations: [{replace: cross-attention, with: {operator: pladis, scale: 2.0}}]\n"
        "sampling: {steps: 4, guidance_scale: 4.0, height: 64, width: 64}\n"
    )
    artifact = surgery.apply(tmp_path / "r.yaml", tmp_path / "out")
    given = ["--image", files["image"], "--strength", "0.5", "--argument", "aesthetic_score=5.0", "--images", "1"]
    done = run("generate", artifact.folder, "a cat", *given, "--out", tmp_path / "x.png", check=0)
    assert "base and patched, 1 per prompt" in done.stdout
    record = json.loads(Image.open(tmp_path / "x.png").info["surgery"])
    assert record["image"] == files["image"]
    assert record["sampling"]["strength"] == 0.5 and record["sampling"]["aesthetic_score"] == 5.0


def test_what_cannot_be_drawn_from_is_refused(pipeline, files, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    for given, message in (
        ({"image": str(tmp_path / "nowhere.png")}, "nowhere.png cannot be read as an image: No such file"),
        ({"image": str(tmp_path / "text.png")}, "text.png cannot be read as an image"),
    ):
        with pytest.raises(InputError, match=message):
            Inputs(**given).images()
    for given, message in (
        ({"mask": files["mask"]}, "give the --image too"),
        ({"controlnet": files["controlnet"]}, "give the --control-image too"),
    ):
        with pytest.raises(InputError, match=message):
            Inputs(**given).check()
    image = inputs_of(files, "image")
    for strength, message in ((0.0, "above 0 and at most 1"), (1.5, "at most 1"), (0.1, "leaves none of 4 steps")):
        with pytest.raises(InputError, match=message):
            with_inputs(pipeline, *image, {**SAMPLING, "strength": strength})
    control = Inputs(control_image=files["image"], controlnet=str(tmp_path))
    with pytest.raises(InputError, match="holds no ControlNet: it has no config.json"):
        with_inputs(pipeline, control, control.images(), SAMPLING)
    pipeline.unet.save_pretrained(tmp_path / "unet")
    control = Inputs(control_image=files["image"], controlnet=str(tmp_path / "unet"))
    with pytest.raises(InputError, match="is no ControlNet but a UNet2DConditionModel"):
        with_inputs(pipeline, control, control.images(), SAMPLING)
    alone = Inputs(control_image=files["image"])
    with pytest.raises(InputError, match="takes no control image|give a --controlnet"):
        with_inputs(pipeline, alone, alone.images(), SAMPLING)
    with pytest.raises(InputError, match="no pipeline that draws from image and mask for PixArtSigmaPipeline"):
        with_inputs(pixart()[0], *inputs_of(files, "image", "mask"), SAMPLING)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--argument", "strenth=0.5"], "has no setting strenth"),
        (["--argument", "strength"], "write NAME=VALUE"),
        (["--image", "nowhere.png"], "nowhere.png cannot be read as an image"),
        (["--strength", "0.5"], "has no setting strength"),
    ],
)
def test_the_command_line_says_what_to_do(shapes_artifact, run, tmp_path, given, message):
    done = run("generate", shapes_artifact, "a cat", *given, "--out", tmp_path / "x.png", check=2)
    assert message in done.stderr and not (tmp_path / "x.png").exists()


def photo(turned):
    """A JPEG of 64 x 32 with this orientation; of its EXIF data one entry has a text for a number."""
    entries = (
        b"\x01\x07\x00\x02\x00\x00\x00\x04abc\0",
        b"\x01\x12\x00\x03\x00\x00\x00\x01\0" + bytes([turned]) + b"\0\0",
    )
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x02" + b"".join(entries) + bytes(4)
    file = io.BytesIO()
    ramp = np.linspace(0, 255, 64 * 32).reshape(32, 64).astype(np.uint8)
    Image.fromarray(ramp).save(file, format="JPEG", exif=exif)
    return file.getvalue()


@pytest.mark.parametrize("turned", range(1, 9))
def test_a_photo_is_drawn_from_as_the_camera_was_held_whatever_else_its_exif_data_say(turned, tmp_path):
    content = photo(turned)
    (tmp_path / "photo.jpg").write_bytes(content)
    plain = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    wanted = [plain, plain[:, ::-1], plain[::-1, ::-1], plain[::-1]]
    across = plain.transpose(1, 0, 2)
    wanted += [across, across[:, ::-1], across[::-1, ::-1], across[::-1]]
    assert image_size(content, "image", 10_000) == wanted[turned - 1].shape[1::-1]
    with pytest.raises(struct.error):
        ImageOps.exif_transpose(
            Image.open(io.BytesIO(photo(6)))
        )  # Pillow writes them anew; when it does not fail: take it
    for images in (images_of({"image": content}), Inputs(image=str(tmp_path / "photo.jpg")).images()):
        assert np.array_equal(np.asarray(images["image"]), wanted[turned - 1])


def test_a_grey_of_16_bits_is_not_cut_off_at_white(tmp_path):
    greys = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    file = io.BytesIO()
    Image.fromarray(greys).save(file, format="PNG")
    (tmp_path / "grey.png").write_bytes(file.getvalue())
    for image in (images_of({"image": file.getvalue()}), Inputs(image=str(tmp_path / "grey.png")).images()):
        assert image["image"].mode == "RGB"
        assert np.abs(np.asarray(image["image"])[..., 1] - greys / 257.0).max() <= 1
