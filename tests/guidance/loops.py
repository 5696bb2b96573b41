"""The tiny denoisers of tests/nn/backbones/hosted*.py in their models' own pipelines, with embeddings for an encoder.

So what runs is diffusers' own loop, its calls of the denoiser and what it makes of both of CFG's outputs.
"""

import inspect

import torch

from ..nn.backbones import hosted_cross, hosted_text_first, hosted_text_last
from ..nn.backbones.hosted import hosted, noise, padded
from ..nn.backbones.parts import flow_scheduler, wan_vae
from ..tiny import tiny_vae

CALL = {"prompt": ["a cat", "a dog"], "num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}
WORDS, KEPT = 12, 9


def text(channels, seed, words=WORDS):
    """Embeddings of two prompts."""
    return noise(2, words, channels, seed=seed)


def loop(name, built, encodings, scheduler=None, **arguments):
    """(A pipeline of a class of diffusers, arguments of a call) around a hosted denoiser.

    encodings: what its encode_prompt gives back, call by call, over and over.
    """
    import diffusers

    transformer = built()[0].transformer
    kind = getattr(diffusers, name)
    parameters = list(inspect.signature(kind.__init__).parameters)[1:]
    parts = dict.fromkeys(parameters) | {"transformer": transformer, "scheduler": scheduler or flow_scheduler()}
    parts |= {"vae": tiny_vae()} if "vae" in parameters else {}
    pipeline = kind(**{**parts, **arguments.pop("parts", {})})
    given = []

    def encode_prompt(*args, **kwargs):
        given.append(None)
        return encodings[(len(given) - 1) % len(encodings)]

    pipeline.encode_prompt = encode_prompt
    known = inspect.signature(kind.__call__).parameters
    return pipeline, {**{name: value for name, value in CALL.items() if name in known}, **arguments}


class _Harmless(torch.nn.Module):
    """In the place of Cosmos's guard, which is a package of its own."""

    device, dtype = torch.device("cpu"), torch.float32

    def check_text_safety(self, prompt):
        """That it may be drawn."""
        return True


def longcat_image():
    """LongCat-Image."""
    ids = torch.zeros(WORDS, 3)
    encodings = [(text(32, 1), ids), (text(32, 2), ids)]
    return loop(
        "LongCatImagePipeline",
        hosted_text_first.longcat_image,
        encodings,
        height=96,
        width=96,
        latents=noise(2, 36, 16, seed=7),
        parts={"vae": None},
        enable_prompt_rewrite=False,
        enable_cfg_renorm=False,
    )


def lumina2():
    """Lumina 2, with prompts of two lengths."""
    mask = padded(WORDS, KEPT)
    encodings = [(text(16, 1), mask, text(16, 2), torch.ones_like(mask))]
    return loop("Lumina2Pipeline", hosted_text_first.lumina2, encodings, height=32, width=32)


def cogview4():
    """CogView4."""
    return loop("CogView4Pipeline", hosted_text_first.cogview4, [(text(16, 1), text(16, 2))], height=64, width=64)


def aura_flow():
    """AuraFlow."""
    mask = torch.ones(2, WORDS)
    encodings = [(text(16, 1), mask, text(16, 2), mask)]
    return loop("AuraFlowPipeline", hosted_text_first.aura_flow, encodings, height=32, width=32)


def prx():
    """PRX, whose pipeline of diffusers 0.42 guides one image at a time."""
    mask = padded(WORDS, KEPT)[:1]
    encodings = [(text(16, 1)[:1], mask, text(16, 2)[:1], torch.ones_like(mask))]
    return loop(
        "PRXPipeline",
        hosted_text_first.prx,
        encodings,
        prompt="a cat",
        height=64,
        width=64,
        use_resolution_binning=False,
    )


def glm_image():
    """GLM-Image."""
    ids = torch.arange(64).remainder(16).repeat(2, 1)
    encodings = [(text(16, 1), text(16, 2))]
    return loop("GlmImagePipeline", hosted_text_first.glm_image, encodings, height=32, width=32, prior_token_ids=ids)


def hunyuan_image():
    """HunyuanImage 2.1, whose guider is adaptive projected guidance."""
    from diffusers import AdaptiveProjectedMixGuidance

    mask, none = padded(WORDS, KEPT), (torch.zeros(2, 4, 8), torch.zeros(2, 4, dtype=torch.long))
    encodings = [(text(16, 1), mask, *none), (text(16, 2), torch.ones_like(mask), *none)]
    guider = AdaptiveProjectedMixGuidance(guidance_scale=3.0, adaptive_projected_guidance_start_step=0)
    return loop(
        "HunyuanImagePipeline",
        hosted_text_last.hunyuan_image,
        encodings,
        height=192,
        width=192,
        parts={"guider": guider, "vae": None},
    )


def hunyuan_video15():
    """HunyuanVideo 1.5."""
    from diffusers import ClassifierFreeGuidance

    masks = padded(WORDS, KEPT), padded(5, 3)
    encodings = [(text(16, seed), masks[0], text(8, seed + 2, 5), masks[1]) for seed in (1, 2)]
    vae = tiny_vae()
    vae.temporal_compression_ratio, vae.spatial_compression_ratio = 4, 16
    parts = {"guider": ClassifierFreeGuidance(guidance_scale=3.0), "vae": vae}

    def built():  # the latents, those of an image to begin with, and a mask
        return hosted_text_last.hunyuan_video15(channels=9)

    return loop("HunyuanVideo15Pipeline", built, encodings, height=80, width=80, num_frames=5, parts=parts)


def hidream():
    """HiDream-I1."""
    llama = [noise(2, 2, 4, 16, seed=seed) for seed in (5, 6)]
    encodings = [(text(16, 1, 4), text(16, 2, 4), *llama, noise(2, 8, seed=3), noise(2, 8, seed=4))]
    pipeline, arguments = loop("HiDreamImagePipeline", hosted_text_last.hidream, encodings, height=24, width=24)
    pipeline.default_sample_size = 12  # it takes an image to so many latents
    return pipeline, arguments


def ernie_image():
    """ERNIE-Image."""
    prompts = [[noise(length, 16, seed=seed) for length in (9, 12)] for seed in (1, 2)]
    return loop("ErnieImagePipeline", hosted_text_last.ernie_image, prompts, height=96, width=96, use_pe=False)


def nucleus_moe():
    """NucleusMoE-Image."""
    mask = padded(WORDS, KEPT)
    encodings = [(text(16, 1), mask), (text(16, 2), torch.ones_like(mask))]
    return loop(
        "NucleusMoEImagePipeline",
        hosted_text_last.nucleus_moe,
        encodings,
        height=96,
        width=96,
        negative_prompt=["", ""],
        parts={"vae": None},
    )


def kandinsky5():
    """Kandinsky 5."""
    lengths = torch.tensor([0, WORDS, 2 * WORDS])
    encodings = [(text(16, seed), noise(2, 8, seed=seed + 2), lengths) for seed in (1, 2)]
    pipeline, arguments = loop("Kandinsky5T2IPipeline", hosted_cross.kandinsky5, encodings, height=64, width=64)
    pipeline.resolutions = [(64, 64)]
    return pipeline, arguments


def sana_video():
    """SANA-Video."""
    mask = padded(WORDS, KEPT)
    encodings = [(text(16, 1), mask, text(16, 2), torch.ones_like(mask))]
    return loop(
        "SanaVideoPipeline",
        hosted_cross.sana_video,
        encodings,
        height=64,
        width=64,
        frames=5,
        use_resolution_binning=False,
    )


def sana_sprint():
    """SANA-Sprint, which is distilled: its scale is an input."""
    from diffusers import SCMScheduler

    return loop(
        "SanaSprintPipeline",
        hosted_cross.sana_sprint,
        [(text(16, 1), padded(WORDS, KEPT))],
        height=256,
        width=256,
        use_resolution_binning=False,
        scheduler=SCMScheduler(),
        parts={"vae": None},
    )


def cosmos():
    """Cosmos 2."""
    encodings = [(text(16, 1), text(16, 2))]
    return loop(
        "Cosmos2TextToImagePipeline",
        hosted_cross.cosmos,
        encodings,
        height=64,
        width=64,
        parts={"safety_checker": _Harmless(), "vae": None},
        scheduler=flow_scheduler(use_karras_sigmas=True),
    )


def cosmos25():
    """Cosmos 2.5 Predict from text. A latent has one channel fewer than the model, which has a mask too."""

    def built():
        return hosted(hosted_cross.cosmos_transformer(out_channels=3), {})

    return loop(
        "Cosmos2_5_PredictBasePipeline",
        built,
        [(text(16, 1), text(16, 2))],
        height=64,
        width=64,
        num_frames=5,
        parts={"safety_checker": _Harmless(), "vae": wan_vae()},
    )


def ltx2():
    """LTX-2, video and sound, with the connectors between its text encoder and its transformer."""
    from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    torch.manual_seed(0)
    vae = AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=1,
    ).eval()
    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=4, output_channels=2, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8
    ).eval()
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "num_learnable_registers": None}
    connectors = LTX2TextConnectors(
        caption_channels=16,
        text_proj_in_factor=1,
        **{f"{kind}_connector_{name}": size for kind in ("video", "audio") for name, size in sizes.items()},
        connector_rope_base_seq_len=32,
    ).eval()
    mask = padded(WORDS, KEPT, torch.long)
    own_methods = {"stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.0}
    return loop(
        "LTX2Pipeline",
        hosted_cross.ltx2,
        [(text(16, 1), mask, text(16, 2), torch.ones_like(mask))],
        height=32,
        width=32,
        num_frames=5,
        frame_rate=25.0,
        # Its own methods, which are on unless told otherwise, would run the model more often.
        **{f"{sound}{name}": off for sound in ("", "audio_") for name, off in own_methods.items()},
        parts={"vae": vae, "audio_vae": audio_vae, "connectors": connectors},
    )


def bria_fibo2():
    """FIBO 2."""
    mask = padded(WORDS, KEPT)
    encodings = [(noise(2, 3, WORDS, 16, seed=seed), mask) for seed in (1, 2)]
    return loop("BriaFibo2Pipeline", hosted_cross.bria_fibo2, encodings, height=128, width=128)


LOOPS = {
    made.__name__: made
    for made in (
        longcat_image,
        lumina2,
        cogview4,
        aura_flow,
        prx,
        glm_image,
        hunyuan_image,
        hunyuan_video15,
        hidream,
        ernie_image,
        nucleus_moe,
        kandinsky5,
        sana_video,
        sana_sprint,
        cosmos,
        cosmos25,
        ltx2,
        bria_fibo2,
    )
}
