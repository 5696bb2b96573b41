"""Attention weights recorded while a pipeline draws, per step, module and word."""

import math

import torch
import torch.nn.functional as F

from surgery.errors import UnsupportedModelError
from surgery.nn import attention, is_pladis
from surgery.nn.kernels.combined import weights_of_three
from surgery.nn.kernels.reference import without_autocast
from surgery.nn.operators import OPERATORS, later_defaults


class Observer:
    """Calls seen(path, module, query, key, value, mask) after each call of each module, while it is open.

    Hooks on `to_q`, `to_k` and `to_v` see what the module sees, LoRA included; the module's own run is not touched.
    query, key, value: (1, heads, length, head_dim), after the module's norms; mask: additive, (1, heads, 1 or queries,
    keys), or None. Only the conditional half of a classifier-free guidance batch is shown, so one image may be drawn at
    a time. Raises UnsupportedModelError, out of the pipeline's run, for modules that cannot be observed.
    """

    def __init__(self, pipeline, model, paths, tokens, seen):
        """paths: of the modules. tokens: how many keys the text gives each of them."""
        self._pipeline, self._tokens, self._tell = pipeline, tokens, seen
        self._modules = {path: model.get_submodule(path) for path in paths}
        self._handles = []
        self._outputs = {}  # path -> what its hooks saw of the call that is under way

    def __enter__(self):
        for path, module in self._modules.items():
            self._hook(path, module)
        return self

    def __exit__(self, *_):
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._outputs.clear()

    def _hook(self, path, module):
        def before(_module, arguments, keywords):
            mask = keywords.get("attention_mask", arguments[2] if len(arguments) > 2 else None)
            self._outputs[path] = {"mask": mask}

        def seeing(name):
            def after_projection(_projection, _arguments, output):
                self._outputs[path][name] = output

            return after_projection

        def after(_module, _arguments, _output):
            self._show(path, module, self._outputs.pop(path))

        self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        for name in ("to_q", "to_k", "to_v"):
            self._handles.append(getattr(module, name).register_forward_hook(seeing(name)))
        self._handles.append(module.register_forward_hook(after))

    def _show(self, path, module, outputs):
        if "to_q" not in outputs or "to_k" not in outputs:
            raise UnsupportedModelError(
                f"{path} does not run its own to_q and to_k; take fused projections apart before its maps are drawn"
            )
        batch, keys, _ = outputs["to_k"].shape
        if keys != self._tokens:
            raise UnsupportedModelError(f"{path} has {keys} keys, but the prompt {self._tokens} tokens")
        # diffusers stacks [unconditional, conditional]; perturbed-attention guidance appends a third.
        entry = 1 if batch > 1 and getattr(self._pipeline, "do_classifier_free_guidance", True) else 0
        query, key, value = (_heads(module, outputs[name][entry : entry + 1]) for name in ("to_q", "to_k", "to_v"))
        query = query if module.norm_q is None else module.norm_q(query)
        key = key if module.norm_k is None else module.norm_k(key)
        mask = outputs["mask"]
        if mask is not None:
            mask = module.prepare_attention_mask(mask, keys, batch)
            mask = mask.view(batch, module.heads, -1, mask.shape[-1])[entry : entry + 1]
        self._tell(path, module, query, key, value, mask)


def _heads(module, projected):
    batch, length, _ = projected.shape
    return projected.reshape(batch, length, module.heads, -1).transpose(1, 2)  # (batch, heads, length, head_dim)


def module_weights(module, query, key, value, mask=None):
    """The weights of one call of a cross-attention module: (batch, heads, queries, keys) in float32.

    module: a PladisAttention, with the hyperparameters that its buffers have now, or diffusers' Attention, whose
    weights are softmax. query, key, value: (batch, heads, length, head_dim), of any floating dtype. mask: additive,
    (batch, heads, 1 or queries, keys), or None.
    """
    scores = {"mask": mask, "qk_scale": module.scale, "implementation": "blocked"}
    if not is_pladis(module):
        return attention_map(query, key, operator="pladis", scale=0.0, **scores)
    operator = module.pladis_operator
    names = [name for name in OPERATORS[operator].defaults if f"pladis_{name}" in module._buffers]
    settings = {**later_defaults(operator), **{name: module._buffers[f"pladis_{name}"] for name in names}}
    if operator in ("gag", "anderson_least_squares"):
        return _combined_weights(query, key, value, settings, operator, module.pladis_unit, scores)
    return attention_map(query, key, operator=operator, **settings, **scores)


def attention_map(query, key, **arguments):
    """The weights of an operator without a value's part: its output for the identity, (batch, heads, queries, keys).

    arguments: as `surgery.nn.attention` takes them.
    """
    keys = key.shape[2]
    identity = torch.eye(keys, dtype=torch.float32, device=key.device).expand(*key.shape[:2], keys, keys)
    return attention(query, key, identity, **arguments)


@without_autocast
def _combined_weights(query, key, value, settings, operator, unit, scores):
    """The weights of what is combined by how the outputs lie: linear in the maps once that is known."""

    def map_of(alpha, *temperatures):
        temperature = math.prod(settings[name] for name in temperatures)
        return attention_map(query, key, operator="sparse", alpha=alpha, temperature=temperature, **scores)

    value = value.float()
    dense = map_of(1.0, "temperature")
    sparse = map_of(settings["alpha"], "temperature", "sparse_temperature")
    if operator == "anderson_least_squares":
        low = map_of(settings["alpha_low"], "temperature", "sparse_temperature")
        share, share_low = weights_of_three(sparse @ value, low @ value, dense @ value, query, unit)
        return dense + share * (sparse - dense) + share_low * (low - dense)
    residual = sparse - dense
    sparse_output, residual_output = sparse @ value, residual @ value
    dims = {"head": (-1,), "token": (1, 3), "image": (1, 2, 3)}[unit]
    length = sparse_output.square().sum(dims, keepdim=True)
    tiny = torch.finfo(length.dtype).tiny
    along = (residual_output * sparse_output).sum(dims, keepdim=True) / length.clamp_min(tiny)

    def bent(part, base):  # u = parallel r_par + zeta r_orth
        return settings["parallel"] * along * base + settings["zeta"] * (part - along * base)

    norm = bent(residual_output, sparse_output).square().sum(dims, keepdim=True).sqrt()
    gain = (settings["eta"] / norm.clamp_min(tiny)).clamp_max(1.0)
    return sparse + settings["scale"] * gain * bent(residual, sparse)


class Recording:
    """Records modules of a model while it is open: `with Recording(pipeline, model, paths, tokens) as recording:`.

    paths: of the modules. tokens: how many keys the text gives each of them. Each call of each module counts the same.
    As for `Observer`, one image may be drawn at a time, and UnsupportedModelError comes out of the pipeline's run.
    """

    def __init__(self, pipeline, model, paths, tokens):
        self._model = model
        self._observer = Observer(pipeline, model, paths, tokens, self._add)
        self._handle = None
        self._latent_size = None
        self._sums = {}  # number of queries -> (queries, keys), the sum over calls of the mean over heads
        self._zeros = self._negatives = 0.0  # (keys,): sums over calls of the share of weights
        self._calls = dict.fromkeys(paths, 0)

    def __enter__(self):
        def before_model(_module, arguments, keywords):
            sample = arguments[0] if arguments else keywords["sample"]
            self._latent_size = tuple(sample.shape[-2:])

        self._handle = self._model.register_forward_pre_hook(before_model, with_kwargs=True)
        self._observer.__enter__()
        return self

    def __exit__(self, *_):
        self._handle.remove()
        self._observer.__exit__()

    def maps(self, columns, size):
        """The mean map of each column at the image's size: (columns, height, width), float32, on the CPU.

        columns: objects with `positions`, over whose tokens the weights are summed. Each size of map is enlarged
        bilinearly, so that where every token is in a column the dense map's values at a pixel sum to one.
        """
        self._check_calls()
        total = 0.0
        for queries, summed in self._sums.items():
            grid = _grid(queries, *self._latent_size)
            of_columns = torch.stack([summed[:, list(column.positions)].sum(1) for column in columns])
            of_columns = of_columns.view(1, len(columns), *grid)
            total = total + F.interpolate(of_columns, size=size, mode="bilinear", align_corners=False)[0]
        return (total / sum(self._calls.values())).cpu()

    def shares(self, columns):
        """Of each column: (mean weight of all its tokens, share of weights exactly zero, share below zero)."""
        self._check_calls()
        calls = sum(self._calls.values())
        mean = sum(summed.mean(0) for summed in self._sums.values()) / calls
        zeros, negatives = self._zeros / calls, self._negatives / calls
        return [
            (float(mean[places].sum()), float(zeros[places].mean()), float(negatives[places].mean()))
            for places in (list(column.positions) for column in columns)
        ]

    def _add(self, path, module, query, key, value, mask):
        weights = module_weights(module, query, key, value, mask)[0]  # (heads, queries, keys)
        queries = weights.shape[1]
        self._sums[queries] = self._sums.get(queries, 0.0) + weights.mean(0)
        self._zeros = self._zeros + (weights == 0).float().mean((0, 1))
        self._negatives = self._negatives + (weights < 0).float().mean((0, 1))
        self._calls[path] += 1

    def _check_calls(self):
        for path, calls in self._calls.items():
            if not calls:
                raise UnsupportedModelError(f"{path} was never called while the image was drawn; there is no map of it")


def _grid(queries, height, width):
    """(height, width) of a map with so many queries: the latent's size, halved and rounded up as often as need be."""
    latent = f"{height} x {width}"
    while height * width > queries:
        height, width = -(-height // 2), -(-width // 2)
    if height * width != queries:
        raise UnsupportedModelError(f"a map of {queries} queries is no halving of the latent's {latent}")
    return height, width
