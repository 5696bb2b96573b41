"""AutoGuidance's worse checkpoint: named in a recipe, pinned by a plan, checked against the model, loaded beside it."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from weakref import WeakKeyDictionary

from pydantic import Field, model_serializer

from surgery.console import progress_bar
from surgery.errors import BaseError, InputError
from surgery.hub import HubBase, LocalBase, open_base, select_files, sha256_of
from surgery.hub.foreign import reading, size_problem
from surgery.models.denoisers import FIRST
from surgery.models.parts import Name, Part, Text

if TYPE_CHECKING:
    import torch

# What two checkpoints must have in common to take the same latents, text and time: entries of a denoiser's config.
_CHANNELS = (
    "in_channels",
    "out_channels",
    "joint_attention_dim",
    "pooled_projection_dim",
    "caption_channels",
    "text_dim",
    "text_embed_dim",
    "encoder_hid_dim",
    "addition_embed_type",
    "projection_class_embeddings_input_dim",
    "time_cond_proj_dim",
    "guidance_embeds",
)


_SCHEDULER = "scheduler/scheduler_config.json"


class WeakModel(Part):
    """Another checkpoint of the denoiser, worse than the model's: smaller, or trained less.

    pipeline: a Hub repository, or a folder, ./x beside the recipe. revision: a branch, tag or commit; a plan writes the
    commit. subfolder: where its config and weights lie, "unet" or "transformer" unless given. sha256: of a folder's
    files, written by a plan.
    """

    pipeline: Text
    revision: Text | None = None
    variant: Name | None = None
    subfolder: Name | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None

    @model_serializer(mode="wrap")
    def _without_what_is_not_said(self, handler):
        return {key: value for key, value in handler(self).items() if value is not None}

    def pinned(self, model: "torch.nn.Module", folder: Path = Path()) -> "WeakModel":
        """The same with its commit, or its folder's place and sha256; model: live or meta, which it has to fit.

        folder: where a relative one begins. Raises InputError where it does not fit or was altered, BaseError where it
        cannot be read.
        """
        files = _Files(self, folder)
        files.check_fits(model)
        base, subfolder = files.base, files.subfolder
        if isinstance(base, HubBase):
            return self.model_copy(update={"revision": base.commit, "subfolder": subfolder})
        place = {"pipeline": str(base.folder.resolve()), "subfolder": subfolder}
        return self.model_copy(update={**place, "sha256": files.checked_sha256()})


class _Files:
    """The files of a WeakModel where they lie. names: the config, then the weights and their index."""

    def __init__(self, weak: WeakModel, folder: Path = Path()) -> None:
        self.weak, self.base = weak, open_base(weak.pipeline, weak.revision, folder)
        self.subfolder = weak.subfolder or next((n for n in FIRST if f"{n}/config.json" in self.base.files), None)
        if f"{self.subfolder}/config.json" not in self.base.files:
            wanted = weak.subfolder or " or ".join(FIRST)
            raise InputError(f"{self.base.name} has no {wanted}/config.json; name its subfolder in guidance.weak")
        self.config: dict[str, Any] = self.base.read_json(f"{self.subfolder}/config.json")
        self.class_name = str(self.config.get("_class_name"))
        selected = select_files(self.base.files, {self.subfolder: ["diffusers", self.class_name]}, weak.variant)
        self.weights = selected[str(self.subfolder)].weights
        index = selected[str(self.subfolder)].index
        if not self.weights or not all(name.endswith(".safetensors") for name in self.weights):
            raise InputError(
                f"{self.base.name} has no .safetensors weights in {self.subfolder}/; others are not loaded"
            )
        self.names = (f"{self.subfolder}/config.json", *self.weights, *([index] if index else []))

    def check_fits(self, model: "torch.nn.Module") -> None:
        """Raise InputError where it cannot be called as `model` is, with what both have."""
        own, name = type(model).__name__.removeprefix("Pladis"), self.base.name
        if self.class_name != own:
            raise InputError(f"{name}/{self.subfolder} is a {self.class_name}, the model a {own}; name another of that")
        for key, theirs, ours in _differences(self.config, _config_of(model)):
            raise InputError(
                f"{name}/{self.subfolder}/config.json has {key} {theirs}, and the model has {ours}; name a checkpoint "
                "made for the same latents and text encoder"
            )
        if problem := size_problem(self.config):
            raise BaseError(f"{name}/{self.subfolder}/config.json cannot be right: {problem}; fetch it again")

    def check_predicts(self, scheduler: Any) -> None:
        """Raise InputError where its own scheduler takes its output for something else than a pipeline's does."""
        if _SCHEDULER not in self.base.files:
            return
        theirs, ours = (c.get("prediction_type") for c in (self.base.read_json(_SCHEDULER), scheduler.config))
        if theirs is not None and ours is not None and theirs != ours:
            raise InputError(f"{self.base.name} predicts {theirs}, and the model {ours}; name a checkpoint of that")

    def checked_sha256(self) -> str:
        """Of all the files together. A Hub's are each held against its listing, a folder's against `weak.sha256`."""
        digest = hashlib.sha256()
        total = sum(self.base.files[name].size for name in self.weights)
        with progress_bar("verifying the weak model", total) as advance:
            for name in self.names:
                found = sha256_of(self.base.path(name), advance if name in self.weights else None)
                if self.base.files[name].sha256 not in (None, found):
                    raise BaseError(f"{name} of {self.base.name} is not what the Hub lists; clear it from the cache")
                digest.update(f"{name.partition('/')[2]}\0{found}\n".encode())
        if isinstance(self.base, LocalBase) and self.weak.sha256 not in (None, digest.hexdigest()):
            raise BaseError(f"the weak model in {self.base.folder} was altered since the artifact was made of it")
        return digest.hexdigest()


def _config_of(model) -> Mapping[str, Any]:
    return model.config


def _differences(theirs, ours):
    """(entry, theirs, ours) of configs that differ in what their inputs and outputs are."""
    keys = _CHANNELS if "caption_channels" in ours else (*_CHANNELS, "cross_attention_dim")
    if ours.get("encoder_hid_dim") is not None:  # the text is projected first
        keys = _CHANNELS
    for key in keys:
        if _plain(theirs.get(key)) != _plain(ours.get(key)):
            yield key, theirs.get(key), ours.get(key)


def _plain(value):
    """A list of equal entries, one a block, as one of them."""
    entries = set(value) if isinstance(value, (list, tuple)) else {value}
    return entries.pop() if len(entries) == 1 else tuple(value)


# Beside each denoiser the checkpoint that was loaded last, since a pipeline is guided anew for every batch.
_LOADED: "WeakKeyDictionary[torch.nn.Module, tuple[WeakModel, torch.nn.Module]]" = WeakKeyDictionary()


def loaded(weak: WeakModel, model: "torch.nn.Module", scheduler: Any) -> "torch.nn.Module":
    """The checkpoint, in the dtype and on the device of `model`, beside which it is kept as long as that lives.

    scheduler: of the pipeline, which must take the output of both for the same. Each file's sha256 is checked; no code
    of the repository is run. Raises what `WeakModel.pinned` does, and BaseError for weights that do not fill the model.
    """
    kept = _LOADED.get(model)
    if kept is None or kept[0] != weak:
        kept = _LOADED[model] = (weak, _load(weak, model, scheduler))
    return kept[1].to(device=next(model.parameters()).device)


def _load(weak, model, scheduler):
    import diffusers

    files = _Files(weak)
    files.check_fits(model)
    files.check_predicts(scheduler)
    files.checked_sha256()
    folder = files.base.path(files.names[0]).parent.parent
    kind = getattr(diffusers, files.class_name)
    with reading(f"{files.base.name}/{files.subfolder} cannot be loaded", folder / str(files.subfolder), BaseError):
        made, told = kind.from_pretrained(
            folder,
            subfolder=files.subfolder,
            variant=weak.variant,
            dtype=next(model.parameters()).dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    if told["missing_keys"]:
        raise BaseError(
            f"{files.base.name}/{files.subfolder} lacks {len(told['missing_keys'])} weights that its config asks for, "
            f"such as {sorted(told['missing_keys'])[0]}; fetch it again"
        )
    return made.eval().requires_grad_(False)
