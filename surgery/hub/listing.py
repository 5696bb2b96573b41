"""Which files of a diffusers folder a pipeline loads: the config files of each component, and one set of weights.

diffusers and transformers choose by file name: safetensors before pickles, the asked-for variant before the plain
file, a single file or the shards of one index. The same choice is made here from a listing, so that a plan can name
the files before anything is fetched.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, model_validator
from pydantic.dataclasses import dataclass as validated_dataclass

from surgery.errors import BaseError, BaseNotFoundError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

_WEIGHTS = re.compile(
    r"^(?P<stem>diffusion_pytorch_model|model|pytorch_model)(?P<variant>\.[A-Za-z0-9_-]+?)?"
    r"(?P<shard>-\d{5}-of-\d{5})?(?P<late>\.[A-Za-z0-9_]+)?\.(?P<kind>safetensors|bin)$"
)
_INDEX = re.compile(
    r"^(?P<stem>diffusion_pytorch_model|model|pytorch_model)\.(?P<kind>safetensors|bin)\.index"
    r"(?P<variant>\.[A-Za-z0-9_]+)?\.json$"
)
INDEX, MODULAR_INDEX = "model_index.json", "modular_model_index.json"
SOURCE = "pretrained_model_name_or_path"  # of a component in the latter
_CONFIG_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm")


@dataclass(frozen=True)
class FileEntry:
    """One file of a base: its size in bytes, and its sha256 and git blob id (sha1) where the listing knows them."""

    size: int
    sha256: str | None = None
    blob: str | None = None


@validated_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Origin:
    """Where a file of an artifact comes from, as the plan has it and surgery.json keeps it.

    kind: "base" and "component" (byte for byte), "converted" (a .bin's tensors), "fused" (with LoRAs), or "surgery"
    (written anew).
    """

    kind: str
    source: str | None = None  # repository, or the folder as the recipe names it
    revision: str | None = None
    path: str | None = None
    loras: tuple[dict, ...] = ()  # of source, path, revision and scale

    @model_validator(mode="after")
    def _names_where_it_lies(self):
        if self.kind not in ("base", "component", "converted", "fused", "surgery"):
            raise ValueError(f"unknown kind {self.kind!r}")
        if self.kind != "surgery" and not (self.source and self.path):
            raise ValueError("a file of a base needs its source and its path")
        for lora in self.loras:
            texts = [lora.get("source"), lora.get("path"), lora.get("revision") or ""]
            if not all(isinstance(text, str) for text in texts) or not isinstance(lora.get("scale"), (int, float)):
                raise ValueError("a LoRA needs its source, path and scale")
        return self


@dataclass(frozen=True)
class ComponentFiles:
    """The files of one component folder that a load needs; paths start with the component's name."""

    config: tuple[str, ...]
    weights: tuple[str, ...]
    index: str | None


def entries_of(siblings: "Iterable[RepoSibling] | None") -> dict[str, FileEntry]:
    """{path: FileEntry} of what the Hub's model_info lists with files_metadata."""
    return {
        file.rfilename: FileEntry(
            file.size,  # pyright: ignore[reportArgumentType]
            file.lfs["sha256"] if file.lfs else None,
            file.blob_id,
        )
        for file in siblings or []
    }


def license_of(card: Mapping) -> tuple[str | None, str | None]:
    """(licence, its link) in a model card's front matter, each None where there is none or it is no text."""
    license = card.get("license")
    license = license[0] if isinstance(license, list) and len(license) == 1 else license
    license = card.get("license_name") if license == "other" else license
    link = card.get("license_link")
    name, place = (value.strip() if isinstance(value, str) and value.strip() else None for value in (license, link))
    return name, place


def index_of(paths: Iterable[str]) -> str | None:
    """Which of a folder's files says what pipeline it holds: MODULAR_INDEX where it has no INDEX; None without both."""
    paths = set(paths)
    return next((name for name in (INDEX, MODULAR_INDEX) if name in paths), None)


def components_of(index: Mapping) -> dict[str, tuple[str | None, str]]:
    """{component: (library, class)} of a pipeline's index, without the ones that are null."""
    found = {}
    for name, value in index.items():
        if not isinstance(value, list) or len(value) not in (2, 3):
            continue
        library, kind = value[:2]
        hint = value[2].get("type_hint") if len(value) == 3 and isinstance(value[2], dict) else None
        if kind is None and isinstance(hint, list) and len(hint) == 2:  # a modular one that was not loaded yet
            library, kind = hint
        if isinstance(kind, str):
            found[name] = (library, kind)
    return found


def specs_of(index: Mapping) -> dict[str, dict]:
    """{component: where a modular pipeline's index has it loaded from}; {} of any other pipeline's."""
    entries = {name: value for name, value in index.items() if isinstance(value, list) and len(value) == 3}
    return {name: value[2] for name, value in entries.items() if isinstance(value[2], dict)}


def select_files(paths: Iterable[str], index: Mapping, variant: str | None = None) -> dict[str, ComponentFiles]:
    """{component: ComponentFiles} for a pipeline, chosen from all `paths` of its folder by its index.

    Raises BaseError where a component has no file at all, or the variant exists in none of them.
    """
    selected = {name: _component_files(name, paths, variant) for name in components_of(index)}
    for name, files in selected.items():
        if not files.config and not files.weights:
            raise BaseError(f"the pipeline's index names the component {name}, but the base has no files under {name}/")
    if variant and not any(_has_variant(path, variant) for files in selected.values() for path in files.weights):
        found = {found for path in paths if (found := _variant_of(path))}
        hint = f"it has {', '.join(sorted(found))}" if found else "it has none"
        raise BaseNotFoundError(f"the base has no weights of variant {variant!r}; {hint}")
    return selected


def _component_files(component, paths, variant):
    inside = [p for p in paths if p.startswith(f"{component}/") and p.count("/") == 1]
    config, index_files, weights = [], [], []
    for path in sorted(inside):
        name = path.split("/")[1]
        if _INDEX.match(name):
            index_files.append(path)
        elif _WEIGHTS.match(name):
            weights.append(path)
        elif name.endswith(_CONFIG_SUFFIXES) and ".index." not in name and not name.startswith("openvino"):
            config.append(path)
    chosen = _chosen_weights(weights, variant)
    index = None
    if any(_match(path)["shard"] for path in chosen):
        kind, wanted = _match(chosen[0])["kind"], _variant_of(chosen[0])
        index = next((p for p in index_files if _index_fits(p, kind, wanted)), None)
        if index is None:
            raise BaseError(f"{component}/ has weight shards, such as {chosen[0]}, but no index file that names them")
    return ComponentFiles(tuple(config), tuple(chosen), index)


def _chosen_weights(weights, variant):
    for kind in ("safetensors", "bin"):
        for wanted in dict.fromkeys((variant or "", "")):
            chosen = [p for p in weights if _match(p)["kind"] == kind and _variant_of(p) == wanted]
            single = [p for p in chosen if not _match(p)["shard"]]
            if chosen:
                return single[:1] or chosen
    return []


def _match(path: str) -> "re.Match[str] | Any":
    return _WEIGHTS.match(path.split("/")[-1])


def _variant_of(path):
    """ "fp16" for model.fp16.safetensors, "" for model.safetensors, None for what is not a weight file."""
    match = _match(path)
    return (match["variant"] or match["late"] or "").lstrip(".") if match else None


def _has_variant(path, variant):
    return _variant_of(path) == variant


def _index_fits(path, kind, variant):
    match = _INDEX.match(path.split("/")[-1])
    return match["kind"] == kind and (match["variant"] or "").lstrip(".") == variant  # pyright: ignore[reportOptionalSubscript]
