"""What the cross-attention modules of a model see, call by call, while its pipeline draws."""

from surgery.errors import UnsupportedModelError


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
