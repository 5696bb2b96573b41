"""Guidance done by hand: forward hooks of the tests' own on diffusers' modules, and formulas written out."""

import inspect
import math

import torch
import torch.nn.functional as F

from ..nn.backbones.checks import denoiser, recorded_call


def sampled(pipeline, arguments):
    """(what a pipeline draws, the predictions that its scheduler was given, step by step)."""
    pipeline.set_progress_bar_config(disable=True)
    scheduler, predictions = pipeline.scheduler, []
    step = scheduler.step

    def recording(prediction, *args, **kwargs):
        predictions.append(prediction.detach().clone())
        return step(prediction, *args, **kwargs)

    scheduler.step = recording
    try:
        with torch.no_grad():
            drawn = pipeline(generator=torch.Generator().manual_seed(0), **arguments)
    finally:
        del scheduler.step
    found = drawn.images if hasattr(drawn, "images") else drawn.frames
    return torch.as_tensor(found), predictions


def weakened_by_hand(pipeline, arguments, method, layers, scale=None):
    """{"guided", "plain", "weak"}: the first step's predictions with a method, without, and of the weak model alone."""
    model = denoiser(pipeline)
    call = recorded_call(pipeline, arguments)
    scale = {"pag": 3.0, "seg": 3.0, "oseg": 3.0, "slg": 2.8}[method] if scale is None else scale
    rows = _rows(call, arguments)
    with torch.no_grad():
        whole = model(**{**call, "return_dict": False})[0]
        handles = [handle for layer in layers for handle in _perturb(model, layer, method, call)]
        try:
            weak = model(**{**call, "return_dict": False})[0][rows]
        finally:
            for handle in handles:
                handle.remove()
    plain = whole[rows]
    _, predictions = sampled(pipeline, arguments)  # U + w (C - U), whatever the pipeline makes of it
    guided = predictions[0]
    away = (plain - weak).to(guided.dtype)
    if away.shape != guided.shape:  # a learned variance beside the prediction
        away = away[:, : guided.shape[1]]
    return {"guided": guided + scale * away, "plain": guided, "weak": weak}


def _rows(call, arguments):
    """The rows with the prompt."""
    name = "sample" if "sample" in call else "hidden_states"
    batch = call[name].shape[0]
    prompts = arguments.get("prompt")
    images = len(prompts) if isinstance(prompts, list) else 1
    return slice(batch - images, batch)


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
        heads = attention.heads
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
        return given["hidden_states"]
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
    if name.startswith("LTX"):
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
    text_first = "img_ids" in call
    return (tokens - count if text_first else 0), count, shape


def _gaussian(grid, sigma):
    """(batch, frames, height, width, channels), each frame blurred by a convolution over a reflected border."""
    size = math.ceil(6 * sigma) + 1 - math.ceil(6 * sigma) % 2
    x = torch.arange(size, dtype=grid.dtype) - size // 2
    kernel = torch.exp(-0.5 * (x / sigma) ** 2)
    kernel = (kernel / kernel.sum())[None, None]
    for axis in (2, 3):
        lines = grid.movedim(axis, -1)
        flat = lines.reshape(-1, 1, lines.shape[-1])
        left = size // 2
        while left:  # a border wider than the line is reflected again and again
            pad = min(left, flat.shape[-1] - 1)
            if pad == 0:
                flat = F.pad(flat, (left, left), mode="replicate")
                break
            flat = F.pad(flat, (pad, pad), mode="reflect")
            left -= pad
        grid = F.conv1d(flat, kernel).reshape(lines.shape).movedim(-1, axis)
    return grid
