"""LoRAs that batches may have: in a live denoiser's own weights while they are wanted, and taken out bit for bit."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.errors import ArtifactError, BaseError, InputError, UnsupportedModelError
from surgery.hub.base import HubBase, open_weight_file, read_index, read_json_file, sha256_of
from surgery.models.denoisers import denoiser_of

_USUAL_FILE = "pytorch_lora_weights.safetensors"  # as diffusers writes it

Chosen = tuple[tuple[str, float], ...]  # (name, scale) of each


@dataclass(frozen=True)
class LoraSource:
    """Where a LoRA is. name: what requests call it; repo: None for a file on disk; sha256: of the file, if known."""

    name: str
    repo: str | None
    file: str
    revision: str | None = None
    sha256: str | None = None

    def path(self) -> Path:
        """The file on this machine, fetched if need be; BaseError, or ArtifactError where it is another by now."""
        base, name = open_weight_file(self.repo, self.file, self.revision)
        path = Path(base.path(name))
        if self.sha256 is not None and sha256_of(path) != self.sha256:
            raise ArtifactError(f"the LoRA {self.name}, {path}, is another file than the one that was checked")
        return path


def lora_source(text: str) -> LoraSource:
    """The LoraSource of NAME=FILE, NAME=OWNER/NAME or NAME=OWNER/NAME/FILE, at the commit that the Hub has now."""
    name, _, where = text.partition("=")
    if not name or not where or not name.isprintable() or len(name) > 100:
        raise InputError(f"--lora {text[:200]}: write NAME=FILE, NAME=OWNER/NAME or NAME=OWNER/NAME/FILE")
    path = Path(where).expanduser()
    slashes = where.count("/")
    if path.exists() or where[0] in "./~" or not slashes or (slashes == 1 and where.endswith(".safetensors")):
        if path.is_dir():
            path = path / _USUAL_FILE
        if not path.is_file():
            raise InputError(f"--lora {text[:200]}: there is no file {path}")
        return LoraSource(name, None, str(path.absolute()), None, sha256_of(path))
    owner, repo, *inside = where.split("/")
    base = HubBase(f"{owner}/{repo}")
    weights = [one for one in base.files if one.endswith(".safetensors")]
    file = "/".join(inside) or (_USUAL_FILE if _USUAL_FILE in weights or len(weights) != 1 else weights[0])
    if file not in base.files:
        there = ", ".join(weights[:5]) or "none"
        raise InputError(f"--lora {text[:200]}: {owner}/{repo} has no {file}; it has these weights: {there}")
    return LoraSource(name, f"{owner}/{repo}", file, base.commit)


def check_loras(folder: Path, sources: Sequence[LoraSource]) -> None:
    """Raise InputError for a LoRA that does not fit the pipeline of a folder, whose weights are not read."""
    from surgery.artifact.loras import lora_layers
    from surgery.hub.tensors import layout_of

    index = read_index(folder)
    component, _ = denoiser_of(index)
    layouts = map(layout_of, sorted((folder / component).glob("*.safetensors")))
    shapes = {name: shape for layout in layouts for name, (_, shape) in layout.items()}
    config = read_json_file(folder / component / "config.json")
    for one in sources:
        try:
            lora_layers(one.path(), component, index.get("_class_name", ""), config, shapes)
        except (BaseError, UnsupportedModelError) as error:
            raise InputError(f"--lora {one.name}: {error}") from error


class Loras:
    """LoRAs read for a pipeline, none of them in its weights yet.

    Raises what `lora_layers` does for one that does not fit, UnsupportedModelError for a denoiser whose weights are no
    plain numbers, or are elsewhere than in its modules.
    """

    def __init__(self, pipeline: Any, sources: Sequence[LoraSource]) -> None:
        import torch

        from surgery.artifact.loras import lora_layers
        from surgery.models.patching import attachment, denoisers

        component, self._model = next(iter(denoisers(pipeline).items()))
        running = attachment(self._model)
        if running and running.engine.weights == "engine":
            text = "holds weights of its own, so that no LoRA reaches them; build one with --weights artifact"
            raise UnsupportedModelError(f"the engine {running.engine.key} {text}")
        shapes = {name: tuple(one.shape) for name, one in self._model.named_parameters()}
        kind, config = type(pipeline).__name__, self._model.config
        self._layers = {one.name: lora_layers(one.path(), component, kind, config, shapes) for one in sources}
        for name in {name for layers in self._layers.values() for name in layers}:
            weight = self._model.get_parameter(name)
            if type(weight.data) is not torch.Tensor or not weight.is_floating_point() or weight.is_meta:
                text = f"the weight {name} is quantised or offloaded, so that no LoRA can be added to it by request"
                raise UnsupportedModelError(text)
        self._kept = {}  # the weights as they were, in the CPU's memory
        self._worn: Chosen = ()

    def wear(self, chosen: Chosen) -> None:
        """Have these and no others in the weights; InputError, and none in them, where a weight would overflow."""
        import torch

        if chosen == self._worn:
            return
        with torch.no_grad():
            self._take_out()
            try:
                self._put_in(chosen)
            except BaseException:
                self._take_out()
                raise
        self._worn = chosen

    def _take_out(self):
        for name, weight in self._kept.items():
            self._model.get_parameter(name).copy_(weight)
        self._kept, self._worn = {}, ()

    def _put_in(self, chosen):
        from surgery.artifact.loras import adder

        stacks = {}
        for lora, scale in chosen:
            for name, layer in self._layers[lora].items():
                stacks.setdefault(name, []).append((layer, scale))
        for name, stack in stacks.items():
            weight = self._model.get_parameter(name)
            fused = adder(stack)(weight.float()).to(weight.dtype)
            if not fused.isfinite().all():
                raise InputError(f"with this LoRA the weight {name} overflows {weight.dtype}; use a smaller scale")
            self._kept[name] = weight.to("cpu", copy=True)
            weight.copy_(fused)
