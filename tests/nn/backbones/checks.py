"""Running the tiny backbones: their denoisers' real inputs, and diffusers' own code around a brute-force attention."""

import inspect
import math

import torch
import torch.nn.functional as F


def recorded_call(pipeline, arguments):
    """The keyword arguments of the first call of a pipeline's denoiser, tensors detached."""
    model = denoiser(pipeline)
    found = {}

    def hook(module, args, kwargs):
        found.setdefault("args", args)
        found.setdefault("kwargs", dict(kwargs))

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        draw(pipeline, arguments)
    finally:
        handle.remove()
    if found["args"]:
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        found["kwargs"] |= dict(zip(names, found["args"], strict=False))
    return found["kwargs"]


def denoiser(pipeline):
    """A pipeline's transformer or UNet."""
    return getattr(pipeline, "transformer", None) or pipeline.unet


def draw(pipeline, arguments, seed=0):
    """What a pipeline draws, as a tensor."""
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        drawn = pipeline(generator=torch.Generator().manual_seed(seed), **arguments)
    found = drawn.images if hasattr(drawn, "images") else drawn.frames
    return torch.as_tensor(found)


def forward(pipeline, call):
    """What the denoiser returns for a call, as a tensor."""
    return predicted(denoiser(pipeline), call)


def predicted(model, call):
    """What a denoiser, compiled or not, returns for a call, as a tensor."""
    with torch.no_grad():
        found = model(**{**call, "return_dict": False})[0]
    return torch.stack(found) if isinstance(found, list) else found


def brute_force(
    attention_of_stock,
    text,
    text_first,
    operator="pladis",
    alpha=1.5,
    scale=2.0,
    sparse_temperature=1.0,
    parallel=1.0,
    zeta=0.0,
    eta=15.0,
):
    """A stand-in for scaled_dot_product_attention: an operator by the entmax package in float64 where `text` says so.

    text: (query, key) -> how many of the keys are text, None for attention that stays dense. text_first: None where all
    keys are text.
    """
    from entmax import entmax_bisect

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **more):
        length = text(query, key)
        if length is None:
            return attention_of_stock(query, key, value, attn_mask=attn_mask, is_causal=is_causal, **more)
        qk_scale = more.get("scale") or query.shape[-1] ** -0.5
        value = value.double()
        z = query.double() @ key.double().transpose(-1, -2) * qk_scale
        if attn_mask is not None:
            z = z.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else z + attn_mask.double()
        z = z.clamp_min(-1e4)
        weights, keys = z.softmax(-1), key.shape[2]
        columns = slice(0, length) if text_first in (None, True) else slice(keys - length, keys)
        share = weights[..., columns].sum(-1, keepdim=True)
        dense = z[..., columns].softmax(-1) @ value[:, :, columns]
        sparse = entmax_bisect(z[..., columns] / sparse_temperature, alpha, n_iter=60) @ value[:, :, columns]
        if operator == "pladis":
            changed = dense + scale * (sparse - dense)
        else:
            residual = sparse - dense
            along = (
                (residual * sparse).sum(-1, keepdim=True)
                / sparse.square().sum(-1, keepdim=True).clamp_min(1e-300)
                * sparse
            )
            step = parallel * along + zeta * (residual - along)
            length_of_step = step.square().sum(-1, keepdim=True).sqrt()
            changed = sparse + scale * (eta / length_of_step.clamp_min(1e-300)).clamp_max(1.0) * step
        output = weights @ value + share * (changed - dense)
        if text_first is not None:
            rows = torch.zeros(query.shape[2], 1, dtype=torch.bool)
            if query.shape[2] == keys:  # text's own queries stay dense, where it has any
                rows[columns] = True
            output = torch.where(rows, weights @ value, output)
        return output.to(query.dtype)

    return attention


def with_brute_force(monkeypatch, pipeline, call, family, **settings):
    """The stock denoiser's output where diffusers' own attention is replaced by `brute_force`; how often it was."""
    stock, outputs, used = F.scaled_dot_product_attention, [], []
    for entry in family.entries(call):
        length = family.text_length(entry)

        def text(query, key, length=length):
            used.append(family.is_to_text(length, query.shape[2], key.shape[2]))
            return length if used[-1] else None

        attention = brute_force(stock, text, family.text_first, **settings)
        monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
        try:
            outputs.append(forward(pipeline, entry))
        finally:
            monkeypatch.setattr(F, "scaled_dot_product_attention", stock)
    return torch.cat(outputs), sum(used) / len(outputs)
