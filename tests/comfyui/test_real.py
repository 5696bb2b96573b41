"""Against ComfyUI itself, through its own sampler: the same numbers as `surgery.patch` with the same weights.

Needs COMFYUI_PATH, the folder of a checkout of ComfyUI; run last on its commit a125cd84 (2025-10-11).
"""

import asyncio
import contextlib
import json
import math

import pytest
import torch

import surgery
from surgery.errors import InputError
from surgery.models import patching
from surgery.nn.operators import whole_setting
from surgery.nn.prompts import Prompts

from ..tiny import tiny_vae
from . import real
from .pack import FOLDER, node

pytestmark = pytest.mark.skipif(real.folder() is None, reason="COMFYUI_PATH names no folder of ComfyUI")

CLOSE = {"atol": 2e-4, "rtol": 2e-4}  # of latents up to 14; the unpatched models differ as much


class Side:
    """A tiny model in ComfyUI (`model`) and in diffusers (`pipeline`), with the same weights, text and noise."""

    def __init__(self, pipeline, model, text, pooled=None, call=None, conditioning=None):
        self.pipeline, self.model, self.call, self.conditioning = pipeline, model, call or {}, conditioning or {}
        generator = torch.Generator().manual_seed(1)
        self.text, self.negative, self.other = (torch.randn(1, *text, generator=generator) for _ in range(3))
        self.pooled = pooled and [torch.randn(1, pooled, generator=generator) for _ in range(2)]
        pipeline.set_progress_bar_config(disable=True)

    def diffusers(self, **more):
        """The latents of diffusers' pipeline."""
        given = {"prompt_embeds": self.text, "negative_prompt_embeds": self.negative, "guidance_scale": 3.0}
        if self.pooled:
            names = "pooled_prompt_embeds", "negative_pooled_prompt_embeds"
            given |= dict(zip(names, self.pooled, strict=True))
        given |= {"latents": self.noise(), "num_inference_steps": 3, "output_type": "latent"}
        return self.pipeline(**{**given, **self.call, **more}).images

    def noise(self):
        return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def comfyui(self, model=None, scale=3.0, **texts):
        """Those of ComfyUI's sampler, at the sigmas of diffusers' last run."""
        sigmas = self.pipeline.scheduler.sigmas
        texts = {"prompt": self.text, "negative": self.negative, "pooled": self.pooled, **texts}
        first = self.noise() * getattr(self.pipeline.scheduler, "init_noise_sigma", 1.0) / sigmas[0]
        return real.sampled(model or self.model, first, sigmas, scale=scale, **texts, **self.conditioning)


def unet(kind):
    from diffusers import (
        EulerDiscreteScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )

    torch.manual_seed(0)
    common = {"block_out_channels": (32, 64), "layers_per_block": 1, "sample_size": 8, "cross_attention_dim": 32}
    config = {"in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1], "image_size": 32}
    config |= {"channel_mult": [1, 2], "context_dim": 32, "use_spatial_transformer": True, "legacy": False}
    config["dtype"] = torch.float32
    parts = {"vae": tiny_vae(), "text_encoder": None, "tokenizer": None}
    parts["scheduler"] = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    if kind == "sd15":
        stock = UNet2DConditionModel(
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=4,
            **common,
        ).eval()
        config |= {"transformer_depth": [1, 0], "transformer_depth_output": [1, 1, 0, 0], "num_heads": 4}
        config |= {"transformer_depth_middle": 1, "use_linear_in_transformer": False}
        pipeline = StableDiffusionPipeline(
            unet=stock, safety_checker=None, feature_extractor=None, requires_safety_checker=False, **parts
        )
        return Side(pipeline, real.unet(config, stock), (77, 32))
    stock = UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=6 * 256 + 32,
        **common,
    ).eval()
    config |= {"transformer_depth": [0, 2], "transformer_depth_output": [0, 0, 2, 2], "num_head_channels": 16}
    config |= {"transformer_depth_middle": 2, "use_linear_in_transformer": True, "num_classes": "sequential"}
    config["adm_in_channels"] = 6 * 256 + 32
    pipeline = StableDiffusionXLPipeline(
        unet=stock, text_encoder_2=None, tokenizer_2=None, add_watermarker=False, **parts
    )
    size = {"width": 64, "height": 64}
    return Side(pipeline, real.unet(config, stock), (77, 32), 32, size, size)


class Flux(Side):
    """FLUX.1: latents in patches, no CFG."""

    def diffusers(self, **more):
        from diffusers import FluxPipeline

        noise = FluxPipeline._pack_latents(self.noise(), 1, 4, 8, 8)
        given = {"guidance_scale": 3.5, "negative_prompt_embeds": None, "negative_pooled_prompt_embeds": None}
        packed = super().diffusers(latents=noise, **given, **more)
        return FluxPipeline._unpack_latents(packed, 8, 8, 1)

    def comfyui(self, model=None, **texts):
        return super().comfyui(model, 1.0, **texts)


def flux():
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    stock = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    pipeline = FluxPipeline(
        transformer=stock,
        vae=tiny_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
    )
    config = {"image_model": "flux", "in_channels": 4, "out_channels": 4, "vec_in_dim": 32, "context_in_dim": 32}
    config |= {"hidden_size": 32, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2}
    config |= {"axes_dim": [4, 4, 8], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True}
    config["dtype"] = torch.float32
    size = {"width": 16, "height": 16}
    return Flux(pipeline, real.flux(config, stock), (24, 32), 32, size, {"guidance": 3.5})


PATHS = [
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2",
    "mid_block.attentions.0.transformer_blocks.0.attn2",
    "up_blocks.1.attentions.0.transformer_blocks.0.attn2",
    "up_blocks.1.attentions.1.transformer_blocks.0.attn2",
]
MAKERS = {"sd15": lambda: unet("sd15"), "sdxl": lambda: unet("sdxl"), "flux": flux}


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
