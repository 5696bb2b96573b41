"""The training of recipes/shapes: what it shows, that it goes on where it stopped, and that it makes a pipeline."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from surgery.recipes.shapes.scenes import SHIPPED_HELD_OUT, captions
from surgery.validate.prompts.shapes import is_held_out

from ..conftest import SHAPES
from .averaging import average

sys.path.insert(0, str(SHAPES))
from training import loop, scenes, tokenizer, workers
from training.autoencoder import encode, new_autoencoder, normalise

ALONE = workers.Workers(0, 1, "cpu")


def test_every_word_is_one_token_and_a_prompt_is_77():
    made = tokenizer.shapes_tokenizer()
    for word in tokenizer.words():
        assert len(made(word).input_ids) == 3, word
    assert made("a star", padding="max_length").input_ids[3:] == [made.eos_token_id] * 74
    assert len(made("a pink hexagon").input_ids) > 5  # other words come apart


def test_the_shipped_tokenizer_is_the_one_that_the_training_makes():
    shipped = type(tokenizer.shapes_tokenizer()).from_pretrained(SHAPES / "tokenizer")
    assert shipped.get_vocab() == tokenizer.shapes_tokenizer().get_vocab()
    assert shipped.model_max_length == tokenizer.LENGTH


def test_scenes_are_the_same_whatever_their_number_and_hold_nothing_held_out():
    few, many = scenes.Scenes(50, seed=3).all, scenes.Scenes(300, seed=3).all
    assert few == many[:50] != scenes.Scenes(50, seed=4).all
    assert not {(drawn.colour, drawn.shape) for scene in many for drawn in scene.objects} & SHIPPED_HELD_OUT.pairs
    for scene in many:
        for caption in captions(scene):
            number, relation, *kinds = scenes.facts_of(caption)[:8]
            named = [(scenes.COLOURS[c - 1] if c else None, scenes.SHAPES[s - 1]) for c, s in _pairs(kinds) if s]
            asked = {"objects": named, "relation": list(scenes.RELATIONS)[relation - 1] if relation else None}
            assert not is_held_out(asked), caption
            assert number + 1 == len(scene.objects), caption


def test_facts_of_a_caption():
    said = scenes.facts_of("a red circle to the left of a star").tolist()
    places = [1, 1, 0, 4, 0, 0, 0, 0]  # left, right, above, below
    assert said == [1, 1, 1, 1, 0, 4, 0, 0, *places]
    assert scenes.facts_of("a star to the right of a red circle").tolist()[8:] == places
    assert scenes.facts_of("three blue crosses").tolist() == [2, 0, 3, 5, *[0] * 12]


def test_captions_that_tell_a_relation_are_drawn_more_often():
    random = np.random.default_rng(0)
    scene = next(s for s in scenes.Scenes(100, seed=1).all if any(map(scenes.relation_in, captions(s))))
    share = np.mean([scenes.relation_in(scenes.caption_of(scene, random)) is not None for _ in range(400)])
    assert share > 0.75 > np.mean([scenes.relation_in(caption) is not None for caption in captions(scene)])


def test_the_captions_that_are_exchanged_are_a_share_and_stay_the_same():
    chosen = [scenes.is_exchanged(number, 0.45, seed=0) for number in range(2000)]
    assert 0.41 < np.mean(chosen) < 0.49
    assert chosen == [scenes.is_exchanged(number, 0.45, seed=0) for number in range(2000)]
    assert all(scenes.is_exchanged(n, 1.0, 0) and not scenes.is_exchanged(n, 0.0, 0) for n in range(100))


def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(tmp_path, monkeypatch):
    training = loop.Training(samples=40, rate=0.1, batch=2, warmup=3, decay=0.5, seed=9)
    monkeypatch.setattr(loop, "_SAVE_EVERY", -1)  # after every step

    def run(folder, stop_at=None):
        folder.mkdir(exist_ok=True)
        layer = torch.nn.Linear(3, 1)
        torch.nn.init.ones_(layer.weight), torch.nn.init.zeros_(layer.bias)
        steps = []

        def loss_of(random, generator, count):
            if len(steps) == stop_at:
                raise KeyboardInterrupt
            steps.append(1)
            x = torch.randn(count, 3, generator=generator) + float(random.normal())
            return (layer(x) - x.sum(1, keepdim=True) * 2).square().mean(), {}

        loop.train("line", layer.parameters(), loss_of, training, ALONE, folder)
        return layer.weight.detach(), len(steps)

    whole, steps = run(tmp_path / "whole")
    assert steps == 20
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop_at=7)
    again, left = run(tmp_path / "cut")
    assert left == 13 and torch.equal(again, whole) and not torch.equal(whole, torch.ones(1, 3))
    longer = loop.Training(samples=20, rate=0.1, batch=2, seed=9)
    with pytest.raises(SystemExit, match="a checkpoint of another run"):
        loop.train("line", torch.nn.Linear(3, 1).parameters(), None, longer, ALONE, tmp_path / "cut")


def test_the_rate_rises_stays_and_falls_to_nothing():
    training = loop.Training(samples=100, rate=2.0, batch=1, warmup=10, decay=0.3)
    assert [training.rate_at(step) for step in (0, 9, 69, 85)] == [0.2, 2.0, 2.0, 1.0]
    assert training.rate_at(99) == pytest.approx(2 / 30)


def test_two_workers_average_their_gradients(tmp_path):
    workers.run_workers(average, 2, "cpu", tmp_path)
    for rank in range(2):
        gradients = torch.load(tmp_path / f"{rank}.pt")
        assert [gradient.tolist() for gradient in gradients] == [[1.5, 1.5], [[15.0]]]


SLEEPERS = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from training.workers import run_workers

def sleep(worker, folder):
    Path(folder, f"{worker.rank}.part").write_text(str(os.getpid()))
    os.replace(Path(folder, f"{worker.rank}.part"), Path(folder, f"{worker.rank}.pid"))
    time.sleep(600)

if __name__ == "__main__":
    run_workers(sleep, 2, "cpu", sys.argv[2])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
def test_workers_end_with_the_process_that_started_them_even_as_a_background_job(tmp_path):
    psutil = pytest.importorskip("psutil")
    (tmp_path / "sleepers.py").write_text(SLEEPERS)
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "sleepers.py", SHAPES, tmp_path],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # as a shell does to a job with &
    )
    names = [tmp_path / f"{rank}.pid" for rank in range(2)]
    try:
        _wait_until(lambda: all(name.exists() for name in names))
    finally:
        parent.kill()
        parent.wait()

    def runs(pid):
        return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE

    _wait_until(lambda: not any(runs(int(name.read_text())) for name in names))


def _wait_until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_normalised_latents_decode_to_the_same_images():
    images = scenes.Scenes(40, seed=5).images(range(40))
    plain, normalised = new_autoencoder(1), new_autoencoder(1)
    with torch.no_grad():  # channels of unlike mean and spread
        for model in (plain, normalised):
            model.quant_conv.weight[:4] *= torch.tensor([5.0, 1.0, 0.2, 3.0]).view(4, 1, 1, 1)
            model.quant_conv.bias[:4] += torch.tensor([2.0, -1.0, 0.0, 4.0])
    normalise(normalised, images)
    latents = encode(normalised, images)
    assert latents.mean((0, 2, 3)).abs().max() < 1e-4 and (latents.std((0, 2, 3)) - 1).abs().max() < 1e-3
    with torch.no_grad():
        one, other = (model.decode(encode(model, images[:4])).sample for model in (plain, normalised))
        spread = [model.encode(torch.from_numpy(images[:4])).latent_dist for model in (plain, normalised)]
        one_noise, other_noise = (
            post.std / encode(m, images).std((0, 2, 3)).view(1, 4, 1, 1)
            for post, m in zip(spread, (plain, normalised), strict=True)
        )
    assert torch.allclose(one, other, atol=1e-4)
    assert torch.allclose(one_noise, other_noise, rtol=1e-3)


@pytest.mark.slow
def test_the_script_makes_a_pipeline_that_draws_and_does_nothing_twice(tmp_path):
    few = ["text=64", "autoencoder=32", "denoiser=64"]
    command = [sys.executable, SHAPES / "train.py", "--out", tmp_path, "--scenes", "40", "--samples", *few]
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    facts = json.loads((tmp_path / "pipeline" / "training.json").read_text())
    assert facts["scenes"] == {"count": 40, "seed": 1} and facts["stages"]["denoiser"]["samples"] == 64
    assert facts["parameters"]["unet"] > 5e6 and facts["psnr_db"] > 0
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "pipeline", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a star", num_inference_steps=2, height=64, width=64).images[0].size == (64, 64)
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert all(f"{stage}: done before" in again.stdout for stage in facts["stages"])

    noisy = [sys.executable, SHAPES / "train.py", "--out", tmp_path / "noisy", "--start", tmp_path / "pipeline"]
    noisy += ["--scenes", "40", "--exchanged", "0.45", "--samples", "denoiser=64"]
    subprocess.run(noisy, capture_output=True, text=True, check=True)
    facts = json.loads((tmp_path / "noisy" / "pipeline" / "training.json").read_text())
    assert list(facts["stages"]) == ["latents", "denoiser"] and facts["stages"]["denoiser"]["exchanged"] == 0.45


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--samples", "latents=5"], "--samples is for text, autoencoder, denoiser"),
        (["--exchanged", "45"], "a share from 0 to 1"),
        (["--start", "nowhere"], "no folder of a pipeline"),
        (["--workers", "2", "--device", "cuda"], "--workers is for a CPU"),
        (["--stages", "unet"], "invalid choice: 'unet'"),
    ],
)
def test_what_it_cannot_do_is_said_before_it_begins(tmp_path, monkeypatch, capsys, options, says):
    import train

    monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(tmp_path / "x"), *options])
    with pytest.raises(SystemExit) as left:
        train.main()
    assert left.value.code == 2 and says in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def _pairs(values):
    return list(zip(values[::2], values[1::2], strict=True))
