"""A checkpoint of a whole pipeline in one file, read by its header: which components it holds, in diffusers' layout.

The converters are diffusers' own. What the file does not hold is the config repository's: tokenizers and schedulers,
and the weights of FLUX's text encoders and VAE beside a file of its transformer alone.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from surgery.compat import converted_model, converted_text_encoder, default_config_repository
from surgery.errors import BaseError, SurgeryError, UnsupportedModelError
from surgery.hub import HubBase, LocalBase, open_weight_file
from surgery.hub.deferred import Conversion, deferred
from surgery.hub.foreign import first_line, reading
from surgery.hub.listing import components_of
from surgery.hub.tensors import DTYPES, Layout, layout_of
from surgery.models.anatomy import build_on_meta

from .schema import WeightFile

_TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")
_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
# What stands beside weights that are no plain numbers: scaled float8, bitsandbytes' and GPTQ's.
_QUANTISED = (".scale_weight", "scaled_fp8", ".weight_scale", ".absmax", ".qweight", ".SCB")


class SingleFileCheckpoint:
    """A checkpoint in one file, on disk or on the Hub, of which the header is read.

    source: (base, name) of the file. tensors: {name: tensor without content}.
    """

    def __init__(self, wanted: WeightFile, folder: Path) -> None:
        """Raise BaseError for a file that is not there or not whole, UnsupportedModelError for a kind that is not read.

        folder: which a relative path starts at.
        """
        if wanted.file.endswith(".gguf"):
            raise UnsupportedModelError(
                f"{wanted.file}: an artifact's weights are safetensors, which hold no GGUF blocks; patch a pipeline "
                "that diffusers' GGUFQuantizationConfig loaded, or name the checkpoint that the GGUF was made from"
            )
        if not wanted.file.endswith(_SUFFIXES):
            raise UnsupportedModelError(f"{wanted.file}: a single_file is one of {', '.join(_SUFFIXES)}")
        self.source = open_weight_file(**wanted.model_dump(), folder=folder)
        base, name = self.source
        self.name = base.name if wanted.repo is None else f"{base.name}/{name}"
        layout = _layout(base, name)
        if found := next((key for key in layout if key.endswith(_QUANTISED)), None):
            raise UnsupportedModelError(
                f"{self.name} is quantised ({found}), and its numbers mean nothing without those beside them; name the "
                "checkpoint in float16, bfloat16, float32 or plain float8"
            )
        if any(".lora_" in key or ".lora." in key for key in layout):
            raise BaseError(f"{self.name} is a LoRA, no checkpoint of a pipeline; give it under base.loras")
        self.tensors = deferred(layout)

    @property
    def default_config(self) -> str:
        """The repository whose configs diffusers reads it with, by its keys and shapes."""
        with reading(f"{self.name}: what model it is cannot be told; name its `config`", kind=BaseError):
            return default_config_repository(self.tensors)

    def record(self) -> dict[str, str | None]:
        """What a plan says of it; the sha256 of a file on disk is known when it is applied."""
        base, name = self.source
        return {
            "single_file": self.name,
            "single_file_revision": base.commit,
            "single_file_sha256": base.files[name].sha256,
        }

    def conversions(self, base: LocalBase | HubBase, model_index: Mapping) -> dict[str, Conversion]:
        """{component: Conversion} of the components in a model_index.json that the file holds; base: of the configs.

        Raises BaseError for a component that is there in part, or that its config does not fit.
        """
        found = {}
        for name, (library, class_name) in components_of(model_index).items():
            if library == "diffusers" and f"{name}/config.json" in base.files:
                model = build_on_meta(class_name, base.read_json(f"{name}/config.json"))
                tensors = self._taken(name, model, lambda model=model: converted_model(model, self.tensors))
            elif library == "transformers" and class_name in _TEXT_ENCODERS:
                tensors = self._text_encoder(name, class_name, base.path(f"{name}/config.json").parent.parent)
            else:
                continue
            if tensors:
                source, path = self.source
                found[name] = Conversion(source.name, source.commit, path, tensors)
        return found

    def _text_encoder(self, name, class_name, folder):
        import torch
        import transformers

        model_class = getattr(transformers, class_name)
        with reading(f"{folder / name}/config.json cannot be read", kind=BaseError), torch.device("meta"):
            model = model_class(model_class.config_class.from_pretrained(folder, subfolder=name, local_files_only=True))
        is_flat = class_name.startswith("CLIP") and not hasattr(model, "text_model")

        def convert():
            found = converted_text_encoder(model_class, folder, name, self.tensors)
            # On the Hub a CLIP's tensors have the name of its text_model, which later versions have no module of.
            return {_wrapped(key): tensor for key, tensor in found.items()} if is_flat else found

        return self._taken(name, model, convert, _wrapped if is_flat else str)

    def _taken(self, component: str, model: Any, convert: Callable, named: Callable[[str], str] = str) -> dict:
        """The tensors of a model that `convert` makes of the file; {} where it makes none of them."""
        try:
            converted = convert()
        except SurgeryError:
            raise
        except Exception:  # a converter looks for the keys of its model, in whatever way
            return {}
        expected = {named(key): shape for key, shape in _shapes(model).items()}
        missing = sorted(set(expected) - set(converted))
        if len(missing) == len(expected):
            return {}
        if missing:
            raise BaseError(
                f"{self.name} holds a part of the {component}: {len(missing)} of {len(expected)} tensors are missing "
                f"(first: {missing[0]}); fetch it again, or name the `config` of the model that it is"
            )
        for key, shape in expected.items():
            if tuple(converted[key].shape) != shape:
                raise BaseError(
                    f"{self.name}: {component} {key} has shape {tuple(converted[key].shape)}, the config needs "
                    f"{shape}; name the `config` of the model that it is"
                )
        return {key: converted[key] for key in expected}


def _wrapped(key):
    return key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}"


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """{name: shape} of what a model's file must hold: its state dict, of shared parameters the first name."""
    own = {name for name, _ in model.named_parameters()}
    shared = {name for name, _ in model.named_parameters(remove_duplicate=False)} - own
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items() if key not in shared}


def _layout(base, name) -> Layout:
    if base.kind == "hub" and name.endswith(".safetensors"):
        return {key: (DTYPES.get(dtype, dtype), shape) for key, (dtype, shape) in base.header(name).items()}
    path = base.path(name)
    try:
        return layout_of(path)
    except (OSError, ValueError, RuntimeError) as error:
        raise BaseError(f"{path} cannot be read: {first_line(error)}; fetch it again") from error
