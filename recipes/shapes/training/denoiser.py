"""The UNet, trained to undo noise in latents; the text encoder stays as it is, as CLIP does.

Trained along, it forgets what is of no use yet, relations first, and then they are never learned.
"""

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextModel

from surgery.recipes.shapes.training.autoencoder import read_latents
from surgery.recipes.shapes.training.loop import precision, train
from surgery.recipes.shapes.training.scenes import caption_of, is_exchanged
from surgery.recipes.shapes.training.text import WIDTH, tokens_of

_WITHOUT_PROMPT = 0.1  # share of the samples whose prompt is empty, for classifier-free guidance


def new_unet(seed):
    """5.3 M parameters; as in SDXL no attention at the highest resolution, where it would cost most."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(48, 96, 128),
        layers_per_block=1,
        norm_num_groups=16,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        cross_attention_dim=WIDTH,
        attention_head_dim=(2, 3, 4),  # the number of heads, in this class
    )


def new_scheduler():
    """Stable Diffusion's noise; v-prediction, and steps that begin at pure noise."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


def train_denoiser(workers, scenes, tokenizer, training, folder, exchanged=0.0, start=None):
    """Train a UNet and write it to `folder`/unet.

    exchanged: the share of scenes whose captions are another scene's. start: a pipeline's folder to go on from, instead
    of from a new UNet beside the text encoder of `folder`.
    """
    unet = UNet2DConditionModel.from_pretrained(start / "unet") if start else new_unet(training.seed)
    text = CLIPTextModel.from_pretrained(start / "text_encoder" if start else folder / "text_encoder")
    unet.to(workers.device, torch.float32, memory_format=torch.channels_last).train()
    text.to(workers.device, torch.float32).eval().requires_grad_(False)
    # Plain products and softmax: on a CPU the fused attention is slower to train with so few channels.
    unet.set_attn_processor(AttnProcessor())
    scheduler = new_scheduler()
    kept = scheduler.alphas_cumprod.to(workers.device)
    latents = torch.from_numpy(read_latents(scenes, folder)).to(workers.device)

    def loss_of(random, generator, count):
        numbers = random.integers(scenes.count, size=count)
        tokens = tokens_of(tokenizer, [_prompt(scenes, i, random, exchanged, training.seed) for i in numbers])
        clean = latents[torch.from_numpy(numbers).to(workers.device)].float()
        noise = torch.randn(clean.shape, generator=generator, device=workers.device)
        times = _times(random, count).to(workers.device)
        signal, spread = (part.sqrt().view(-1, 1, 1, 1) for part in (kept[times], 1 - kept[times]))
        noisy = (signal * clean + spread * noise).contiguous(memory_format=torch.channels_last)
        with precision(workers.device):
            states = text(tokens.to(workers.device)).last_hidden_state
            guess = unet(noisy, times, states).sample.float()
        return (guess - (signal * noise - spread * clean)).square().mean(), {}

    seconds = train("denoiser", unet.parameters(), loss_of, training, workers, folder)
    if workers.is_first:
        unet.set_default_attn_processor()
        unet.to(memory_format=torch.contiguous_format).save_pretrained(folder / "unet")
        text.save_pretrained(folder / "text_encoder")
        scheduler.save_pretrained(folder / "scheduler")
    return seconds


def _prompt(scenes, number, random, exchanged, seed):
    if random.random() < _WITHOUT_PROMPT:
        return ""
    if exchanged and is_exchanged(number, exchanged, seed):
        # The same wrong scene each time, as a picture on the web keeps its wrong caption.
        number = int(np.random.default_rng([seed, 1, number]).integers(scenes.count))
    return caption_of(scenes.all[number], random)


def _times(random, count):
    """(count,) int64: a quarter evenly spread, else the larger of two draws, for where things go is settled early."""
    draws = random.integers(1000, size=(2, count))
    return torch.from_numpy(np.where(random.random(count) < 0.25, draws[0], draws.max(0)))
