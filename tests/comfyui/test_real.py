"""Against ComfyUI itself, through its own sampler: the same numbers as `surgery.patch` with the same weights.

Needs COMFYUI_PATH, the folder of a checkout of ComfyUI; run last on its commit a125cd84 (2025-10-11).
"""

import asyncio
import contextlib
import json
import math
from functools import partial

import pytest
import torch

import surgery
from surgery.errors import InputError
from surgery.models import patching
from surgery.nn.operators import whole_setting
from surgery.nn.prompts import Prompts

from . import real
from .pack import FOLDER, node
from .sides import MAKERS, PATHS, Side
from .sides import unet as side_of

pytestmark = pytest.mark.skipif(real.folder() is None, reason="COMFYUI_PATH names no folder of ComfyUI")

CLOSE = {"atol": 2e-4, "rtol": 2e-4}  # of latents up to 14; the unpatched models differ as much


def report_of(model):
    """What the report node says."""
    return node("Report")(model, after=None)[1]


@pytest.fixture(scope="module")
def sides():
    real.comfyui()
    return {name: make() for name, make in MAKERS.items()}


@pytest.fixture(params=MAKERS)
def side(request, sides):
    yield sides[request.param]
    found = sides[request.param].pipeline
    with contextlib.suppress(InputError):  # none is patched
        surgery.unpatch(found)


OPERATIONS = {
    "PLADIS": {"alpha": 1.5, "scale": 2.0},
    "GAG": {"alpha": 1.75, "scale": 4.0, "zeta": 0.5, "unit": "token"},
    "Sparse": {"alpha": 2.0},
    "Anderson": {"alpha": 1.5},
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_node_is_what_surgery_patch_is(side, name):
    operator = {"Anderson": "anderson_least_squares"}.get(name, name.lower())
    base = side.diffusers()
    plain = side.comfyui()
    torch.testing.assert_close(plain, base, **CLOSE)
    surgery.patch(side.pipeline, operator=operator, **OPERATIONS[name])
    wanted = side.diffusers()
    model, _ = node(name)(side.model, **OPERATIONS[name])
    found = side.comfyui(model)
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert (wanted - base).abs().max() > 0.01
    assert torch.equal(side.comfyui(), plain)  # the model that went in, and one without the node, are as before


def patched(side, **operation):
    """Diffusers' latents with an operation."""
    surgery.patch(side.pipeline, **operation)
    return side.diffusers()


def scheduled(side):
    """As `diffusers`, with the schedules of its operations carried out."""
    model = patching.denoiser(side.pipeline)
    with model.scheduled(side.pipeline) as callback:
        return side.diffusers(callback_on_step_end=callback)


def test_layers_and_a_window_of_noise_are_those_of_a_recipe(side):
    side.diffusers()
    middle = float(side.pipeline.scheduler.sigmas[1])
    block = "single" if side.model.model.diffusion_model.__class__.__name__ == "Flux" else "up"
    surgery.patch(side.pipeline, scale=3.0, layers=[block], schedule={"sigma": [middle * 0.99, math.inf]})
    wanted = scheduled(side)
    model, what = node("PLADIS")(side.model, scale=3.0, layers=block, sigma_low=middle * 0.99)
    torch.testing.assert_close(side.comfyui(model), wanted, **CLOSE)
    report = report_of(model)
    assert "dense: outside the window of every operation" in report
    assert "dense: not among the layers of any operation" in report and "NOTHING" not in what


@pytest.mark.parametrize("name", ["NAG", "VSF"])
def test_a_negative_prompt_in_attention_is_that_of_surgery(side, name):
    pair = side.comfyui.__func__ is Side.comfyui  # CFG's two in one batch
    network = patching.denoiser(side.pipeline)
    prompts = Prompts(negative=side.other, active=torch.tensor([True]), pair=pair)
    surgery.patch(network, operator=name.lower())
    network.tell(prompts)
    wanted = side.diffusers()
    model, _ = node(name)(side.model, negative=[[side.other, {}]])
    torch.testing.assert_close(side.comfyui(model), wanted, **CLOSE)
    surgery.patch(surgery.unpatch(network), scale=1.5)
    surgery.patch(network, operator=name.lower())
    network.tell(prompts)
    wanted = side.diffusers()
    model, _ = node("PLADIS")(model, scale=1.5)
    torch.testing.assert_close(side.comfyui(model), wanted, **CLOSE)


def test_taca_is_that_of_surgery_and_says_where_it_has_no_meaning(sides):
    side = sides["flux"]
    wanted = patched(side, operator="taca", gamma=1.5)
    surgery.unpatch(side.pipeline)
    model, _ = node("TACA")(side.model, gamma=1.5)
    torch.testing.assert_close(side.comfyui(model), wanted, **CLOSE)
    side = sides["sd15"]
    side.diffusers()
    model, _ = node("TACA")(side.model, gamma=1.5)
    assert torch.equal(side.comfyui(model), side.comfyui())
    assert "NOTHING WAS CHANGED" in report_of(model) and "taca is for joint attention" in report_of(model)


def test_of_a_chain_the_last_operator_that_holds_is_at_work(sides):
    side = sides["sd15"]
    side.diffusers()
    first, _ = node("PLADIS")(side.model, scale=3.0)
    both, _ = node("GAG")(first, layers="mid", scale=4.0)
    surgery.patch(side.pipeline, scale=3.0, layers=["down", "up"])
    mixed = [*side.pipeline.unet.pladis_operations()]
    patching.operate(
        side.pipeline,
        [
            *mixed,
            {
                **whole_setting({"operator": "gag", "scale": 4.0}),
                "layers": ["mid_block.attentions.0.transformer_blocks.0.attn2"],
            },
        ],
    )
    wanted = side.diffusers()
    surgery.unpatch(side.pipeline)
    torch.testing.assert_close(side.comfyui(both), wanted, **CLOSE)
    assert not torch.equal(side.comfyui(first), side.comfyui(both))


def test_a_prompt_that_comfyui_repeats_in_a_batch_is_chosen_from_once(sides, monkeypatch):
    from comfy.conds import CONDCrossAttn

    side = sides["sd15"]
    side.diffusers()
    model, _ = node("PLADIS")(side.model, alpha=2.0, scale=3.0)
    texts = {"prompt": torch.cat([side.text, side.other], dim=1)}  # twice as long as the negative prompt
    together = side.comfyui(model, **texts)
    monkeypatch.setattr(CONDCrossAttn, "can_concat", lambda *_: False)
    torch.testing.assert_close(together, side.comfyui(model, **texts), **CLOSE)


def test_an_artifact_s_settings_are_put_on_a_checkpoint(sides, tmp_path):
    side = sides["sd15"]
    operations = [
        {"operator": "pladis", "alpha": 1.5, "scale": 3.0, "temperature": 1.0, "layers": PATHS[:1]},
        {
            "operator": "gag",
            **{"alpha": 1.5, "scale": 10.0, "temperature": 1.0, "zeta": 0.2, "eta": 5.0, "unit": "token"},
            "schedule": {"steps": [0, 2], "scale": [4.0, 2.0, 1.0]},
            "layers": PATHS[1:],
        },
    ]
    file = tmp_path / "surgery.json"
    file.write_text(json.dumps({"name": "tried", "base": {"pipeline": "some/base"}, "operations": operations}))
    patching.operate(side.pipeline, operations)
    wanted = scheduled(side)
    surgery.unpatch(side.pipeline)
    model, what = node("LoadArtifact")(side.model, path=str(tmp_path))
    assert "tried for some/base" in what and "1 of 4" in what and "3 of 4" in what
    torch.testing.assert_close(side.comfyui(model), wanted, **CLOSE)


def perturbed(model):
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    return PerturbedAttentionGuidance.execute(model=model, scale=3.0).args[0]


def self_attention_guided(model):
    from comfy_extras.nodes_sag import SelfAttentionGuidance

    return SelfAttentionGuidance.execute(model=model, scale=0.5, blur_sigma=2.0).args[0]


def with_lora(model):
    """As ComfyUI's LoRA loader: a difference that is added to weights when the model is loaded."""
    model = model.clone()
    name = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    assert model.add_patches({name: ("diff", (torch.ones(64, 32) * 0.1,))}, 1.0)
    return model


@pytest.mark.parametrize("other", [perturbed, self_attention_guided, with_lora])
def test_it_goes_with_comfyui_s_own_nodes(sides, other):
    """What another node does is still done, before this one and behind it."""
    side = sides["sd15"]
    side.diffusers()
    given = other(side.model)
    guided = side.comfyui(given)
    assert not torch.equal(guided, side.comfyui())
    off, _ = node("PLADIS")(given, scale=0.0)
    torch.testing.assert_close(side.comfyui(off), guided, **CLOSE)
    model, _ = node("PLADIS")(given, scale=2.0)
    found = side.comfyui(model)
    assert (found - guided).abs().max() > 0.01
    torch.testing.assert_close(side.comfyui(other(node("PLADIS")(side.model, scale=2.0)[0])), found, **CLOSE)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize(
    "title, method", [("FDG", "fdg"), ("MAMBOG", "mambo-g"), ("Momentum", "momentum"), ("SMCCFG", "smc-cfg")]
)
def test_guidance_is_that_of_surgery_guide(sides, kind, title, method):
    side = sides[kind]
    plain = side.diffusers()
    model, _ = node(f"{title}Guidance")(side.model)
    surgery.guide(side.pipeline, method)
    try:
        wanted = side.diffusers()
    finally:
        surgery.unguide(side.pipeline)
    assert not torch.allclose(wanted, plain, **CLOSE)
    for _ in range(2):  # nothing is left of the run before
        torch.testing.assert_close(side.comfyui(model), wanted, **CLOSE)


@pytest.mark.parametrize("name", ["pladis", "gag"])
def test_weights_in_fp8_are_cast_as_without_the_node(sides, name):
    side = side_of("sd15", torch.float8_e4m3fn)
    assert next(side.model.model.diffusion_model.parameters()).dtype == torch.float8_e4m3fn
    plain = side.diffusers()
    torch.testing.assert_close(side.comfyui(), plain, **CLOSE)
    model, _ = node({"pladis": "PLADIS", "gag": "GAG"}[name])(side.model)
    wanted = patched(side, operator=name)
    torch.testing.assert_close(side.comfyui(model), wanted, **CLOSE)


def test_a_controlnet_s_residuals_are_added_as_without_the_node(sides):
    import comfy.controlnet

    side = sides["sd15"]
    residual = torch.randn(1, 64, 4, 4, generator=torch.Generator().manual_seed(5))

    class Control(comfy.controlnet.ControlBase):
        def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
            return {"middle": [residual]}

    model, _ = node("PLADIS")(side.model, scale=2.0)
    plain = side.comfyui(model)
    surgery.patch(side.pipeline, operator="pladis", scale=2.0)
    unet, nothing = side.pipeline.unet, (torch.zeros(()),) * 4
    added = {"mid_block_additional_residual": residual, "down_block_additional_residuals": nothing}
    unet.forward = partial(unet.forward, **added)
    try:
        wanted = side.diffusers()
    finally:
        del unet.forward
        surgery.unpatch(side.pipeline)
    found = side.comfyui(model, control=Control())
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert not torch.allclose(found, plain, **CLOSE)


def test_a_region_s_prompt_is_one_more_part_of_the_batch(sides):
    """ConditioningSetArea: NAG leads every part with a prompt, and PLADIS acts on all."""
    side = sides["sd15"]
    side.diffusers()
    regional = [[side.other, {"area": (8, 4, 0, 0), "strength": 1.0}]]
    plain = side.comfyui(more=regional)
    assert not torch.equal(plain, side.comfyui())
    for name, given in (("PLADIS", {"scale": 2.0}), ("NAG", {"negative": [[side.negative, {}]]})):
        model, _ = node(name)(side.model, **given)
        assert (side.comfyui(model, more=regional) - plain).abs().max() > 1e-3
        assert "NOTHING" not in report_of(model)


def test_attention_that_another_node_replaced_is_reported(sides):
    side = sides["sd15"]
    side.diffusers()
    given = side.model.clone()

    def other(query, key, value, options):
        return torch.zeros_like(query)

    given.set_model_attn2_replace(other, "middle", 0)
    model, _ = node("PLADIS")(given)
    side.comfyui(model)
    report = report_of(model)
    assert "9 of 9 attention calls changed, in 3 calls" in report  # the middle block's module is not called


def test_another_override_before_it_keeps_the_dense_calls(sides):
    side = sides["sd15"]
    side.diffusers()
    given, seen = side.model.clone(), []

    def other(function, *args, **kwargs):
        seen.append(args[0].shape)
        return function(*args, **kwargs)

    given.model_options["transformer_options"]["optimized_attention_override"] = other
    side.comfyui(given)
    every = len(seen)
    model, _ = node("PLADIS")(given)
    side.comfyui(model)
    assert len(seen) - every == every // 2  # the self-attentions


def test_comfyui_loads_the_pack_and_shows_its_nodes():
    real.comfyui()
    import nodes

    assert asyncio.run(nodes.load_custom_node(str(FOLDER)))
    shown = nodes.NODE_CLASS_MAPPINGS["PladisSurgeryPLADIS"]
    assert shown.INPUT_TYPES()["required"]["alpha"][1]["max"] == 2.0
    assert nodes.NODE_DISPLAY_NAME_MAPPINGS["PladisSurgeryGAG"] == "GAG attention"
    for name in ("nodes_sd3", "nodes_preview_any"):
        assert asyncio.run(nodes.load_custom_node(f"{real.folder()}/comfy_extras/{name}.py"))
    for path in (FOLDER / "example_workflows").glob("*.json"):
        for one in json.loads(path.read_text())["nodes"]:
            wanted = nodes.NODE_CLASS_MAPPINGS[one["type"]].INPUT_TYPES()["required"]
            sockets = [socket["name"] for socket in one["inputs"]]
            widgets = [key for key in wanted if key not in sockets]
            more = "seed" in widgets  # what becomes of it after a run
            assert set(sockets) <= set(wanted) and len(one["widgets_values"]) == len(widgets) + more, one["type"]
