"""Modular pipelines of diffusers: patched, drawn, guided, saved, and in artifacts, as the others are."""

import json
import threading

import pytest
import torch
from diffusers import ClassifierFreeGuidance, FlowMatchEulerDiscreteScheduler, Flux3AutoBlocks, ModularPipeline
from PIL import Image

import surgery
from surgery.errors import BaseError, InputError, UnsupportedModelError
from surgery.models.tempered import tempered
from surgery.recipe.plan import make_plan
from surgery.runtime.draw import draw
from surgery.runtime.video import Video

from ..nn.backbones.modular import anima, flux3, ltx

SAMPLING = {"steps": 2, "height": 32, "width": 32, "guidance_scale": 3.0}
JOBS = [("a cat", 0), ("a dog", 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the tiny Anima in ./base."""
    place = tmp_path_factory.mktemp("modular")
    anima().save_pretrained(str(place / "base"), overwrite_modular_index=True)
    return place


@pytest.fixture(scope="module")
def built():
    return anima()


@pytest.fixture
def pipeline(built):
    """The tiny Anima, as it was after each test."""
    yield built
    built.update_components(guider=ClassifierFreeGuidance(guidance_scale=4.0))
    if hasattr(built.transformer, "revert"):
        surgery.unpatch(built)


def recipe(folder, **more):
    """The path of a recipe on ./base."""
    data = {
        "schema": 1,
        "name": "anima",
        "base": {"pipeline": "./base", **more.pop("base", {})},
        "operations": [{"replace": "cross-attention", "with": {"operator": "pladis", "scale": 2.0}}],
        "sampling": SAMPLING,
        **more,
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(data))
    return path


def pixels(pipeline, jobs=JOBS[:1], sampling=SAMPLING, **more):
    return [image.tobytes() for image in draw(pipeline, jobs, sampling, **more)]


def test_one_is_patched_tuned_and_unpatched_in_place_and_its_index_says_so(pipeline):
    steps = []
    base = pixels(pipeline, JOBS, on_step=lambda: steps.append(1))
    assert len(set(base)) == 2 and len(steps) == 2  # one a step of the batch, though drawn singly
    stock = pipeline.config["transformer"]
    surgery.patch(pipeline, scale=0.0)
    assert pixels(pipeline) == base[:1]
    surgery.tune(pipeline, scale=2.0)
    assert pixels(pipeline) != base[:1]
    assert pipeline.config["transformer"][2]["type_hint"] == (None, None)  # for AutoModel to find
    surgery.unpatch(pipeline)
    assert pixels(pipeline) == base[:1] and pipeline.config["transformer"][1:] == stock[1:]


def test_the_guidance_scale_is_the_guiders_for_one_image(pipeline):
    by_hand = {}
    for scale in (1.0, 3.0):
        pipeline.update_components(guider=ClassifierFreeGuidance(guidance_scale=scale))
        call = {"height": 32, "width": 32, "num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
        by_hand[scale] = pipeline(prompt="a cat", output="images", **call)[0].tobytes()
    pipeline.update_components(guider=ClassifierFreeGuidance(guidance_scale=7.0))
    for scale, same in ((0.0, 1.0), (1.0, 1.0), (3.0, 3.0)):
        assert pixels(pipeline, sampling={**SAMPLING, "guidance_scale": scale}) == [by_hand[same]]
    assert pipeline.guider.guidance_scale == 7.0
    pipeline.update_components(guider=ClassifierFreeGuidance(guidance_scale=7.0, use_original_formulation=True))
    original = draw(pipeline, JOBS[:1], SAMPLING)[0]
    gap = torch.tensor(list(original.tobytes())).float() - torch.tensor(list(by_hand[3.0])).float()
    assert gap.abs().max() <= 1  # (C - U) added to C twice, or to U thrice
    with pytest.raises(InputError, match="has no setting true_cfg_scale"):
        draw(pipeline, JOBS[:1], {**SAMPLING, "true_cfg_scale": 3.0})


def test_a_range_of_scales_gives_each_image_its_own_and_schedules_are_carried_out(pipeline):
    uniform = {**SAMPLING, "guidance_scale": {"uniform": [2.0, 6.0]}}
    assert pixels(pipeline, JOBS, uniform) != pixels(pipeline, JOBS)
    base = pixels(pipeline)
    surgery.patch(pipeline, scale=2.0)
    patched = pixels(pipeline)
    surgery.unpatch(pipeline)
    surgery.patch(pipeline, scale=2.0, schedule={"steps": [0, 1]})
    assert pixels(pipeline) not in (base, patched)
    assert {values["scale"] for values in read(pipeline)} == {2.0}


def read(pipeline):
    from surgery.models.patching import read_hyperparameters

    return read_hyperparameters(pipeline.transformer).values()


def calls_of_first_step(pipeline, call):
    """The arguments of the denoiser's two calls, with the prompt and without, and what the scheduler was given."""
    calls, given = [], []
    handle = pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(dict(kwargs)), with_kwargs=True
    )
    step = pipeline.scheduler.step
    pipeline.scheduler.step = lambda prediction, *args, **kwargs: (
        given.append(prediction.clone()) or step(prediction, *args, **kwargs)
    )
    try:
        pipeline(prompt="a cat", generator=torch.Generator().manual_seed(0), **call)
    finally:
        handle.remove()
        del pipeline.scheduler.step
    return calls[:2], given[0]


def test_guidance_beside_a_guider_is_its_formula_by_hand(pipeline):
    pipeline.update_components(guider=ClassifierFreeGuidance(guidance_scale=3.0))
    surgery.patch(pipeline)
    call = {"height": 32, "width": 32, "num_inference_steps": 2}
    (with_prompt, without), plain = calls_of_first_step(pipeline, call)
    with torch.no_grad():
        cond, uncond = (pipeline.transformer(**arguments)[0] for arguments in (with_prompt, without))
        skipped = pipeline.transformer.transformer_blocks[1].register_forward_hook(
            lambda module, args, kwargs, output: args[0] if args else kwargs["hidden_states"], with_kwargs=True
        )
        weak = pipeline.transformer(**with_prompt)[0]
        skipped.remove()
    assert torch.allclose(plain, uncond + 3.0 * (cond - uncond), atol=1e-5)
    assert (cond - weak).abs().max() > 1e-3
    surgery.guide(pipeline, "slg", layers=["transformer_blocks.1"], scale=2.8)
    _, guided = calls_of_first_step(pipeline, call)
    assert torch.allclose(guided, uncond + 3.0 * (cond - uncond) + 2.8 * (cond - weak), atol=1e-4)
    surgery.unguide(pipeline)
    surgery.guide(pipeline, "cfg-zero", zero_init=0)
    _, guided = calls_of_first_step(pipeline, call)
    nearest = (cond * uncond).sum() / (uncond * uncond).sum() * uncond  # s U
    assert torch.allclose(guided, nearest + 3.0 * (cond - nearest), atol=1e-4)
    surgery.unguide(pipeline)
    with tempered(pipeline.text_encoder, 0.2):
        (other_text, _), _ = calls_of_first_step(pipeline, call)
    with torch.no_grad():
        weak = pipeline.transformer(**other_text)[0]
    assert (cond - weak).abs().max() > 1e-3
    surgery.guide(pipeline, "erg", tau=1.0, tau_c=0.2, scale=2.0)
    assert torch.allclose(calls_of_first_step(pipeline, call)[1], plain + 2.0 * (cond - weak), atol=1e-4)
    surgery.unguide(pipeline)
    assert torch.equal(calls_of_first_step(pipeline, call)[1], plain)


def test_guidance_of_a_recipe_is_carried_out_and_what_does_not_fit_is_refused_by_name(pipeline):
    from diffusers import AdaptiveProjectedGuidance

    weakened = {"method": "seg", "layers": ["mid"], "scale": 2.0}
    assert pixels(pipeline, sampling={**SAMPLING, "guidance": weakened}) != pixels(pipeline)
    with pytest.raises(UnsupportedModelError, match="nag encodes its negative prompt as modular pipelines do not"):
        surgery.guide(pipeline, "nag")
    pipeline.update_components(guider=AdaptiveProjectedGuidance())
    with pytest.raises(UnsupportedModelError, match="its guider is AdaptiveProjectedGuidance"):
        surgery.guide(pipeline, "slg")


def test_what_is_saved_loads_patched_and_stock_classes_refuse_it(pipeline, tmp_path, monkeypatch, caplog):
    surgery.patch(pipeline, scale=2.0)
    drawn = pixels(pipeline)
    pipeline.save_pretrained(str(tmp_path / "saved"), overwrite_modular_index=True)
    assert pixels(surgery.load(tmp_path / "saved", dtype=torch.float32)) == drawn
    _loads_in_diffusers(tmp_path / "saved", drawn, tmp_path, monkeypatch, caplog)


def _loads_in_diffusers(folder, drawn, tmp_path, monkeypatch, caplog):
    """That ModularPipeline runs a folder patched when it may run its code, and else has no denoiser."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    trusted, untrusted = (ModularPipeline.from_pretrained(str(folder)) for _ in range(2))
    untrusted.load_components(dtype=torch.float32)
    assert untrusted.transformer is None and untrusted.vae is not None
    assert "trust_remote_code=True" in caplog.text
    trusted.load_components(dtype=torch.float32, trust_remote_code=True)
    assert type(trusted.transformer).__name__ == "PladisCosmosTransformer3DModel"
    assert pixels(trusted) == drawn


def test_an_artifact_holds_all_of_it_and_draws_what_the_live_one_does(pipeline, folder, tmp_path, monkeypatch, caplog):
    artifact = surgery.apply(recipe(folder), tmp_path / "out")
    surgery.patch(pipeline, scale=2.0)
    drawn = pixels(pipeline)
    assert pixels(surgery.load(artifact.folder, dtype=torch.float32)) == drawn
    assert surgery.verify(artifact.folder).verified
    assert artifact.manifest.index_name == "modular_model_index.json"
    assert not (artifact.folder / "model_index.json").exists()
    _loads_in_diffusers(artifact.folder, drawn, tmp_path, monkeypatch, caplog)
    given = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert surgery.load(artifact.folder, scheduler=given, quiet=True).scheduler is given
    with pytest.raises(InputError, match="AnimaModularPipeline takes no unet"):
        surgery.load(artifact.folder, unet=None, quiet=True)


def test_a_scheduler_that_diffusion_models_have_is_refused_for_a_flow_model(folder):
    scheduler = {"class": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    with pytest.raises(surgery.errors.RecipeError, match="does not fit a pipeline made for"):
        make_plan(recipe(folder, base={"scheduler": scheduler}))


def test_components_that_lie_nowhere_and_blocks_that_nobody_has_are_refused(folder, tmp_path):
    import shutil

    shutil.copytree(folder / "base", tmp_path / "base")
    path = tmp_path / "base/modular_model_index.json"
    index = json.loads(path.read_text())
    changed = {**index, "_blocks_class_name": "MyBlocks"}
    path.write_text(json.dumps(changed))
    with pytest.raises(BaseError, match="names the blocks MyBlocks, which diffusers does not have"):
        make_plan(recipe(tmp_path))
    broken = {**index["vae"][2], "revision": [1], "pretrained_model_name_or_path": "a/b"}
    path.write_text(json.dumps({**index, "vae": [*index["vae"][:2], broken], "transformer": index["transformer"]}))
    shutil.move(tmp_path / "base/vae", tmp_path / "vae")
    with pytest.raises(BaseError, match="does not say where vae comes from"):
        make_plan(recipe(tmp_path))
    shutil.move(tmp_path / "vae", tmp_path / "base/vae")
    path.write_text(json.dumps(index))
    shutil.rmtree(tmp_path / "base/t5_tokenizer")
    with pytest.raises(BaseError, match="has t5_tokenizer come from .* which is not here"):
        make_plan(recipe(tmp_path))


def test_flux3_is_drawn_patched_guided_and_planned(tmp_path):
    pipeline = flux3()
    base = pixels(pipeline)
    surgery.patch(pipeline, operator="gag", scale=2.0)
    patched, weakened = pixels(pipeline), {"method": "seg", "layers": ["all"], "scale": 2.0}
    guided = pixels(pipeline, sampling={**SAMPLING, "guidance": weakened})
    assert len({base[0], patched[0], guided[0]}) == 3
    surgery.unpatch(pipeline)
    assert pixels(pipeline) == base
    whole = Flux3AutoBlocks().init_pipeline()  # which expects an upsampler
    whole.update_components(**{name: getattr(pipeline, name) for name in pipeline.pretrained_component_names})
    whole.save_pretrained(str(tmp_path / "base"), overwrite_modular_index=True)
    joint = {"replace": "joint-attention", "with": {"operator": "gag", "scale": 2.0}}
    artifact = surgery.apply(recipe(tmp_path, operations=[joint]), tmp_path / "out")
    loaded = surgery.load(artifact.folder, dtype=torch.float32)
    pipeline.transformer = loaded.transformer  # what it loads of its tokenizer would need torchvision
    assert loaded.prompt_upsampler is None and "prompt_upsampler" not in artifact.manifest.index
    assert type(loaded).__name__ == "Flux3ModularPipeline" and pixels(pipeline) == patched


def test_an_artifact_is_served_and_scored(folder, tmp_path):
    from surgery.export.serve.checking import served_model
    from surgery.export.serve.replica import BatchRunner
    from surgery.export.serve.request import BatchKey
    from surgery.runtime.worker import ImageRequest, WorkerConfig
    from surgery.validate import validate

    artifact = surgery.apply(recipe(folder), tmp_path / "out")
    served, model, _ = served_model(artifact.folder)
    assert (served.width, served.height, served.is_video) == (32, 32, False)
    key, never = BatchKey(steps=2, guidance_scale=3.0, width=32, height=32), threading.Event()
    runner = BatchRunner(WorkerConfig(model, None, served.artifact_hash, device="cpu", threads=1), key, 2)
    requests = [ImageRequest(prompt, seed) for prompt, seed in JOBS]
    together = runner.draw(key, requests, never)
    assert [one.size for one in together] == ["32x32"] * 2 and together[0].image != together[1].image
    assert together[1].image == runner.draw(key, requests[1:], never)[0].image
    found = validate(artifact.folder, prompts=["a cat", "a dog"], metrics=["ssim"], out=tmp_path / "work")
    assert found.scores.metrics[0].n == 2 and found.scores.metrics[0].patched < 1


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """The folder of an artifact of the tiny LTX-Video."""
    place = tmp_path_factory.mktemp("films")
    ltx().save_pretrained(str(place / "base"), overwrite_modular_index=True)
    return surgery.apply(recipe(place, sampling=FILMED), place / "out").folder


FILMED = {**SAMPLING, "num_frames": 5, "fps": 4}


def test_videos_are_drawn(films):
    pipeline = surgery.load(films, dtype=torch.float32, quiet=True)
    (video,) = draw(pipeline, JOBS[:1], FILMED)
    assert isinstance(video, Video) and (len(video.frames), video.size, video.fps) == (5, (32, 32), 4)
    again, other = draw(pipeline, [JOBS[0], ("a dog", 0)], FILMED)
    assert again.frames[2].tobytes() == video.frames[2].tobytes() != other.frames[2].tobytes()


@pytest.mark.slow
def test_videos_are_generated_and_scored(films, tmp_path):
    from surgery.cli.main import main
    from surgery.validate import validate

    assert main(["generate", str(films), "a cat", "--images", "1", "--out", str(tmp_path / "x.webp")]) == 0
    with Image.open(tmp_path / "x.webp") as shown:
        assert getattr(shown, "n_frames", 1) == 5
    found = validate(films, prompts=["a cat", "a dog"], metrics=["psnr"], out=tmp_path / "work")
    assert found.scores.metrics[0].n == 2 and "frames" in found.scores.drawing
