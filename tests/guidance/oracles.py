"""Guidance done by hand: forward hooks of the tests' own on diffusers' modules, and formulas written out."""

import inspect
import math
import types

import torch
import torch.nn.functional as F

from ..nn.backbones.checks import denoiser


def sampled(pipeline, arguments):
    """(what a pipeline draws, the predictions that its scheduler was given, step by step)."""
    pipeline.set_progress_bar_config(disable=True)
    scheduler, predictions = pipeline.scheduler, []
    step = type(scheduler).step

    def recording(self, prediction, *args, **kwargs):
        if self is scheduler:  # not a copy of it, as LTX-2 has for its sound
            predictions.append(prediction.detach().clone())
        return step(self, prediction, *args, **kwargs)

    scheduler.step = types.MethodType(recording, scheduler)
    try:
        with torch.no_grad():
            drawn = pipeline(generator=torch.Generator().manual_seed(0), **arguments)
    finally:
        del scheduler.step
    found = next(getattr(drawn, name) for name in ("images", "image", "frames") if hasattr(drawn, name))
    return torch.as_tensor(found), predictions


SCALES = {"pag": 3.0, "seg": 3.0, "oseg": 3.0, "slg": 2.8}  # the methods' own


def weakened_by_hand(pipeline, arguments, method, layers, guidance_scale=None):
    """{"guided", "plain", "weak"}: the first step's predictions with a method, without, and of the weak model alone.

    guidance_scale: of a pipeline that does not tell it. C + (w - 1) (C - U) + scale (C - C') where U is the model's;
    with oseg C + (w - 1) (C - U') + scale (C - C').
    """
    model = denoiser(pipeline)
    given = arguments.get("prompt") if isinstance(arguments.get("prompt"), list) else arguments.get("prompt_embeds")
    images = 1 if given is None else len(given)
    calls = calls_of_first_step(pipeline, arguments)

    def outputs():
        """(C, U or None)."""
        with torch.no_grad():
            found = [model(**{**call, "return_dict": False})[0] for call in calls]
        if isinstance(found[0], list):  # Z-Image, whose pipeline has the prompt first and turns the sign
            return (-torch.stack(found[0]).squeeze(2)).chunk(2)
        if len(found) == 1 and len(found[0]) == 2 * images:
            return found[0][images:], found[0][:images]
        return found[0], found[1] if len(found) > 1 else None

    cond, uncond = outputs()
    handles = [handle for layer in layers for handle in _perturb(model, layer, method, calls[0])]
    try:
        weak_cond, weak_uncond = outputs()
    finally:
        for handle in handles:
            handle.remove()
    _, predictions = sampled(pipeline, arguments)  # U + w (C - U), whatever the pipeline makes of it
    plain = predictions[0]
    guided = plain + SCALES[method] * _like(cond - weak_cond, plain)
    if method == "oseg" and uncond is not None:
        w = pipeline.guidance_scale if guidance_scale is None else guidance_scale
        w = w + 1 if type(pipeline).__name__ in ("Krea2Pipeline", "ZImagePipeline") else w  # C + w (C - U)
        guided = guided - (w - 1) * _like(weak_uncond - uncond, plain)
    return {"guided": guided, "plain": plain, "weak": weak_cond}


def calls_of_first_step(pipeline, arguments):
    """The arguments of the denoiser's calls before the scheduler's first step: one, or with the prompt and without."""
    calls, forward = [], denoiser(pipeline).forward
    names = list(inspect.signature(type(denoiser(pipeline)).forward).parameters)[1:]

    def recording(*args, **kwargs):
        calls.append(dict(zip(names, args, strict=False)) | kwargs)
        return forward(*args, **kwargs)

    def stop(*args, **kwargs):
        raise InterruptedError

    denoiser(pipeline).forward, pipeline.scheduler.step = recording, stop
    try:
        sampled_once = {**arguments, "generator": torch.Generator().manual_seed(0)}
        pipeline.set_progress_bar_config(disable=True)
        with torch.no_grad():
            pipeline(**sampled_once)
    except InterruptedError:
        return calls
    finally:
        del denoiser(pipeline).forward, pipeline.scheduler.step
    raise AssertionError("the pipeline took no step")


def _like(away, guided):
    """A difference of predictions, without a learned variance beside them."""
    away = away.to(guided.dtype)
    return away if away.shape == guided.shape else away[:, : guided.shape[1]]


def _perturb(model, layer, method, call):
    """Forward hooks that weaken one layer; returns their handles."""
    attention = model.get_submodule(layer.path)
    if method == "slg":
        block = model.get_submodule(layer.block)
        return [block.register_forward_hook(_as_it_came, with_kwargs=True)]
    if method == "pag":

        def identity(module, args, kwargs, output):
            states = args[0] if args else kwargs["hidden_states"]
            return module.to_out[0](module.to_v(states))

        return [attention.register_forward_hook(identity, with_kwargs=True)]

    def queries(module, args, output):
        first, count, shape = _image_tokens(model, call, output.shape[1])
        if count == 0:
            return None
        changed = output.clone()
        image = output[:, first : first + count]
        if method == "seg":
            frames = image.unflatten(1, (shape[0], -1))
            changed[:, first : first + count] = frames.mean(2, keepdim=True).expand_as(frames).flatten(1, 2)
            return changed
        keys = attention.to_k(args[0])[:, first : first + count]
        heads = getattr(attention, "heads", None) or attention.num_heads
        groups = image.shape[2] // keys.shape[2]  # heads of queries that share one of keys
        keys = keys.unflatten(2, (heads // groups, -1)).repeat_interleave(groups, dim=2).flatten(2)
        for head in range(heads):
            part = slice(head * image.shape[2] // heads, (head + 1) * image.shape[2] // heads)
            q, k = image[..., part].double(), keys[..., part].double()
            along = (q * k).sum(-1, keepdim=True) / (k * k).sum(-1, keepdim=True) * k
            blurred = _gaussian((q - along).unflatten(1, tuple(shape)), 5.0).flatten(1, 3)
            changed[:, first : first + count, part] = (along + blurred).to(output.dtype)
        return changed

    return [attention.to_q.register_forward_hook(queries)]


def _as_it_came(block, args, kwargs, output):
    names = list(inspect.signature(type(block).forward).parameters)[1:]
    given = dict(zip(names, args, strict=False)) | kwargs
    if not isinstance(output, tuple):
        return given[names[0]]
    image = given["hidden_states"]
    # Which of the two is the image is told by its length; where both are alike, by what diffusers names first.
    first_is_image = output[0].shape == image.shape and output[1].shape != image.shape
    text = given["encoder_hidden_states"]
    return (image, text) if first_is_image else (text, image)


def _image_tokens(model, call, tokens):
    """(first token of the image, how many, (frames, height, width)) in a sequence of so many."""
    name = type(model).__name__.removeprefix("Pladis")
    if name.startswith("UNet"):
        height, width = call["sample"].shape[-2:]
        while height * width > tokens:
            height, width = math.ceil(height / 2), math.ceil(width / 2)
        return 0, tokens, (1, height, width)
    if name.startswith("ZImage"):
        shape = (1, *(side // 2 for side in call["x"][0].shape[-2:]))
    elif name.startswith("Krea2"):
        shape = (1, *(int(side) + 1 for side in call["position_ids"].amax(0)[1:]))
    elif name.startswith("LTX"):
        shape = (call["num_frames"], call["height"], call["width"])
    elif "img_ids" in call:
        ids = call["img_ids"].reshape(-1, call["img_ids"].shape[-1])
        shape = (1, int(ids[:, 1].max()) + 1, int(ids[:, 2].max()) + 1)
    elif "img_shapes" in call:
        shape = tuple(call["img_shapes"][0][0])
    else:
        patch = {"PixArt": 2, "Sana": 1, "SD3": 2}.get(name.removesuffix("Transformer2DModel"))
        if patch:
            shape = (1, *(side // patch for side in call["hidden_states"].shape[-2:]))
        else:
            sides = call["hidden_states"].shape[-3:]
            sizes = {"Mochi": (1, 2, 2), "Wan": (1, 2, 2)}.get(name.removesuffix("Transformer3DModel"))
            sizes = sizes or (model.config.patch_size_t, model.config.patch_size, model.config.patch_size)
            shape = tuple(side // size for side, size in zip(sides, sizes, strict=True))
    count = math.prod(shape)
    if tokens < count:
        return 0, 0, shape
    text_first = "img_ids" in call or name.startswith("Krea2")
    return (tokens - count if text_first else 0), count, shape


def _gaussian(grid, sigma):
    """(batch, frames, height, width, channels), each frame blurred as `seg_blur` has it."""
    planes = grid.permute(0, 1, 4, 2, 3)
    return seg_blur(planes, sigma).permute(0, 1, 3, 4, 2)


def seg_blur(planes, sigma):
    """(..., height, width) float64, as the SEG authors' gaussian_blur_2d: a kernel of ceil(6 sigma), made odd, but no
    longer than the side, made odd; a reflected border; one product of both directions."""
    *rest, height, width = planes.shape
    lengths = [
        min(math.ceil(6 * sigma) + 1 - math.ceil(6 * sigma) % 2, side - (side % 2 - 1)) for side in (height, width)
    ]
    lengths = [length if side > 1 else 1 for length, side in zip(lengths, (height, width), strict=True)]
    halves = [(length - 1) * 0.5 for length in lengths]
    lines = [torch.linspace(-half, half, steps=round(2 * half) + 1, dtype=torch.float64) for half in halves]
    lines = [torch.exp(-0.5 * (line / sigma) ** 2) for line in lines]
    down, across = (line / line.sum() for line in lines)
    kernel = torch.outer(down, across)[None, None]
    (up, left) = (length // 2 for length in lengths)
    padded = F.pad(planes.double().reshape(-1, 1, height, width), (left, left, up, up), mode="reflect")
    return F.conv2d(padded, kernel).reshape(*rest, height, width)
