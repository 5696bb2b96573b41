"""Sums of the cross-attention weights of a model's modules over every call of one run of its pipeline.

Averages over heads, modules and denoising steps, as PLADIS (arXiv 2503.07677, Fig. 10 and G.2), DAAM (arXiv 2210.04885,
castorini/daam) and Prompt-to-Prompt (arXiv 2208.01626, google/prompt-to-prompt) take them. Hooks on `to_q`, `to_k` and
`to_v` see what the module sees, LoRA included; the weights are computed again from that beside the module's own run,
which is not touched. What is kept is one sum per size of map, (queries, keys) in float32: SDXL at 1024 x 1024 pixels
needs 1.6 MB for its two sizes, whatever the number of modules and steps. So no size is left out; `layers` chooses.
"""

import torch
import torch.nn.functional as F

from surgery.errors import UnsupportedModelError

from .weights import module_weights


class Recording:
    """Records modules of a model while it is open: `with Recording(pipeline, model, paths, tokens) as recording:`.

    paths: of the modules. tokens: how many keys the text gives each of them. Each call of each module counts the same.
    Only the conditional half of a classifier-free guidance batch is recorded, and one image may be drawn at a time.
    Raises UnsupportedModelError, out of the pipeline's run, for modules that cannot be recorded.
    """

    def __init__(self, pipeline, model, paths, tokens):
        self._pipeline, self._model, self._tokens = pipeline, model, tokens
        self._modules = {path: model.get_submodule(path) for path in paths}
        self._handles = []
        self._seen = {}  # path -> what its hooks saw of the call that is under way
        self._latent_size = None
        self._sums = {}  # number of queries -> (queries, keys), the sum over calls of the mean over heads
        self._zeros = self._negatives = 0.0  # (keys,): sums over calls of the share of weights
        self._calls = dict.fromkeys(paths, 0)

    def __enter__(self):
        def before_model(_module, arguments, keywords):
            sample = arguments[0] if arguments else keywords["sample"]
            self._latent_size = tuple(sample.shape[-2:])

        self._handles.append(self._model.register_forward_pre_hook(before_model, with_kwargs=True))
        for path, module in self._modules.items():
            self._hook(path, module)
        return self

    def __exit__(self, *_):
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()

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

    def _hook(self, path, module):
        def before(_module, arguments, keywords):
            mask = keywords.get("attention_mask", arguments[2] if len(arguments) > 2 else None)
            self._seen[path] = {"mask": mask}

        def seeing(name):
            def after_projection(_projection, _arguments, output):
                self._seen[path][name] = output

            return after_projection

        def after(_module, _arguments, _output):
            self._add(path, module, self._seen.pop(path))

        self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        for name in ("to_q", "to_k", "to_v"):
            self._handles.append(getattr(module, name).register_forward_hook(seeing(name)))
        self._handles.append(module.register_forward_hook(after))

    def _add(self, path, module, seen):
        if "to_q" not in seen or "to_k" not in seen:
            raise UnsupportedModelError(
                f"{path} does not run its own to_q and to_k; take fused projections apart before its maps are drawn"
            )
        batch, keys, _ = seen["to_k"].shape
        if keys != self._tokens:
            raise UnsupportedModelError(f"{path} has {keys} keys, but the prompt {self._tokens} tokens")
        # diffusers stacks [unconditional, conditional]; perturbed-attention guidance appends a third.
        entry = 1 if batch > 1 and getattr(self._pipeline, "do_classifier_free_guidance", True) else 0
        query, key, value = (_heads(module, seen[name][entry : entry + 1]) for name in ("to_q", "to_k", "to_v"))
        query = query if module.norm_q is None else module.norm_q(query)
        key = key if module.norm_k is None else module.norm_k(key)
        mask = seen["mask"]
        if mask is not None:
            mask = module.prepare_attention_mask(mask, keys, batch)
            mask = mask.view(batch, module.heads, -1, mask.shape[-1])[entry : entry + 1]
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


def _heads(module, projected):
    batch, length, _ = projected.shape
    return projected.reshape(batch, length, module.heads, -1).transpose(1, 2)  # (batch, heads, length, head_dim)


def _grid(queries, height, width):
    """(height, width) of a map with so many queries: the latent's size, halved and rounded up as often as need be."""
    latent = f"{height} x {width}"
    while height * width > queries:
        height, width = -(-height // 2), -(-width // 2)
    if height * width != queries:
        raise UnsupportedModelError(f"a map of {queries} queries is no halving of the latent's {latent}")
    return height, width
