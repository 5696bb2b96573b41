"""Engines of modular pipelines: their denoiser's inputs are taken by running the blocks."""

import json

import pytest
import torch

import surgery
from surgery.artifact import read_manifest
from surgery.engines.record import Profile, parse_profile
from surgery.errors import InputError
from surgery.export.engines.build import Wanted, build_engine
from surgery.export.engines.capture import capture
from surgery.runtime.draw import draw

from ..nn.backbones.modular import anima

SAMPLING = {"steps": 2, "height": 32, "width": 32, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """The folder of an artifact of the tiny Anima."""
    folder = tmp_path_factory.mktemp("modular")
    anima().save_pretrained(str(folder / "base"), overwrite_modular_index=True)
    operations = [{"replace": "cross-attention", "with": {"operator": "pladis", "scale": 2.0}}]
    recipe = {"schema": 1, "name": "anima", "base": {"pipeline": "./base"}, "operations": operations}
    (folder / "recipe.yaml").write_text(json.dumps({**recipe, "sampling": SAMPLING}))
    return surgery.apply(folder / "recipe.yaml", folder / "artifact").folder


def test_the_inputs_of_each_component_are_taken_with_the_others_hollow(artifact):
    manifest, sizes = read_manifest(artifact), Profile.of(1, 32, 32).sizes()
    captured = capture(artifact, manifest, "transformer", sizes, "cpu", torch.float32, regional=True)
    calls = captured.recorded.calls["usual"]
    assert len(calls) == 4 and set(captured.blocks) == {"transformer_blocks.0", "transformer_blocks.1"}  # CFG's too
    pipeline = surgery.load(artifact, dtype=torch.float32, quiet=True)
    found = []
    hook = pipeline.transformer.register_forward_hook(lambda module, args, output: found.append(output[0]))
    prompt = "three red apples to the left of a blue ceramic bowl, a wooden table, morning light"
    draw(pipeline, [(prompt, 0)], SAMPLING)
    hook.remove()
    for call, whole in zip(calls, found, strict=True):
        assert torch.equal(next(iter(call.results.values())), whole)
    decoded = capture(artifact, manifest, "vae", sizes, "cpu", torch.float32, regional=False)
    assert decoded.recorded.method == "decode" and len(decoded.recorded.calls["usual"]) == 1
    with pytest.raises(InputError, match="one by one; give 1 image"):
        capture(artifact, manifest, "transformer", Profile.of(2, 32, 32).sizes(), "cpu", torch.float32, False)


@pytest.mark.slow
def test_an_engine_draws_what_eager_does(artifact):
    wanted = Wanted(target="inductor", regional=True, profile=parse_profile("1x32x32"), device="cpu")
    engine, _, _ = build_engine(artifact, wanted)
    assert engine.difference.relative < 1e-4 and engine.difference.calls == 6  # of three lengths of text
    eager, compiled = (surgery.load(artifact, quiet=True, engine=one, device="cpu") for one in (None, "auto"))
    for scale in (2.0, 0.0):
        images = []
        for pipeline in (eager, compiled):
            surgery.tune(pipeline, scale=scale)
            images.append(torch.tensor(list(draw(pipeline, [("a cat", 0)], SAMPLING)[0].tobytes())).int())
        assert (images[0] - images[1]).abs().max() <= 1
