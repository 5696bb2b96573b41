"""Every file of the artifact that a recipe makes of its base: size, origin, and what it is made from."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.errors import BaseError
from surgery.hub import open_base, open_weight_file, select_files
from surgery.hub.listing import ComponentFiles, Origin, components_of, index_of

from .places import Base, Places
from .reading import RecipeFile

if TYPE_CHECKING:
    from surgery.hub.deferred import Conversion

    from .single_file import SingleFileCheckpoint


@dataclass(frozen=True)
class PlannedFile:
    """One file of the artifact. size and sha256 are None where they are known only once it is written."""

    path: str
    size: int | None
    sha256: str | None
    origin: Origin
    weights: bool  # weights of the model, as against configs, code and text


class PlannedFiles:
    """The files of an artifact, as they are planned.

    planned: [PlannedFile]. sources: {path: (base, name in it)}. conversions: {path: Conversion}. loras: {denoiser:
    (base, file, scale) each}. index: the base pipeline's, with the recipe's VAE and without what is nowhere to be had.
    """

    def __init__(
        self,
        recipe_file: RecipeFile,
        base: Base,
        places: Places,
        model_index: dict[str, Any],
        denoisers: list[str],
        patched: list[str],
        single: "SingleFileCheckpoint | None",
    ) -> None:
        """Raise BaseError where a file that the recipe names is not there, or no weights are."""
        self.wanted, self.folder = recipe_file.recipe.base, recipe_file.folder
        self.base, self.places, self.patched = base, places, patched
        self.planned: list[PlannedFile] = []
        self.sources: dict[str, tuple[Base, str]] = {}
        self.conversions: dict[str, Conversion] = {}
        self.replacements = {
            name: open_weight_file(**weights.model_dump(), folder=self.folder)
            for name in denoisers
            if (weights := getattr(self.wanted.components, name))
        }
        self.loras = {
            name: tuple(
                (*open_weight_file(lora.repo, lora.file, lora.revision, self.folder), lora.scale)
                for lora in self.wanted.loras
                if (lora.component or denoisers[0]) == name
            )
            for name in denoisers
        }
        # A second denoiser that nothing is done to is taken as every other component is.
        altered = [name for name in denoisers if name in patched or name in self.replacements or self.loras[name]]
        self._single = single.source if single else None
        held = single.conversions(base, model_index) if single else {}
        lacking = [name for name in denoisers if single and name not in held and name not in self.replacements]
        if single and lacking:
            raise BaseError(
                f"{single.name} holds no {model_index[lacking[0]][1]}, which its config, {base.name}, has as "
                f"{lacking[0]}; name the `config` of the model that it is"
            )
        selected = select_files(places.files, model_index, self.wanted.variant)
        if single:
            model_index = _without_absent(model_index, selected, held, single.name)
        self.index = model_index
        for name, files in selected.items():
            if name not in components_of(model_index):
                continue
            if name == "vae" and self.wanted.vae:
                self._add_vae()
                continue
            self._add_configs(name, files)
            if name in altered:
                continue
            if name in held:
                self._add_conversion(name, held[name])
                continue
            for path in (*files.weights, *([files.index] if files.index else [])):
                self._add(*places.source_of(path, base), path, "base", path != files.index)
        if self.wanted.vae and "vae" not in components_of(model_index):
            raise BaseError(f"{base.name} has no component vae that base.vae could replace; leave it out")
        self.planned.append(PlannedFile(index_of(base.files) or "", None, None, Origin("surgery"), False))
        for name in altered:
            if name in held and name not in self.replacements:
                self._add_conversion(name, held[name])
            else:
                self._add_denoiser(name, selected[name])

    def _add(self, source, name, path, kind, weights, loras=()):
        """A file that is taken as it is, unless it is to be rewritten: then size and sha256 are known later."""
        entry = source.files[name]
        is_copy = kind in ("base", "component")
        origin = Origin(kind, source.name, source.commit, name, loras)
        self.planned.append(PlannedFile(path, entry.size, entry.sha256 if is_copy else None, origin, weights))
        self.sources[path] = (source, name)

    def _add_configs(self, component, files):
        rewritten = {f"{name}/config.json" for name in self.patched}
        rewritten |= {"scheduler/scheduler_config.json"} if self.wanted.scheduler else set()
        for path in files.config:
            if path in rewritten:
                self.planned.append(PlannedFile(path, None, None, Origin("surgery"), False))
            else:
                self._add(*self.places.source_of(path, self.base), path, "base", False)

    def _fused(self, component):
        loras = self.loras.get(component, ())
        return tuple({"source": b.name, "revision": b.commit, "path": f, "scale": scale} for b, f, scale in loras)

    def _add_conversion(self, component, conversion):
        path = f"{component}/{_weight_name(self.index[component][0], self.wanted.variant)}"
        loras = self._fused(component)
        kind = "fused" if loras else "converted"
        origin = Origin(kind, conversion.source, conversion.revision, conversion.path, loras)
        self.planned.append(PlannedFile(path, conversion.size, None, origin, True))
        assert self._single is not None
        self.sources[path] = self._single
        self.conversions[path] = conversion

    def _add_denoiser(self, component, files):
        if component in self.replacements:
            path = f"{component}/{_weight_name('diffusers', self.wanted.variant)}"
            sources, kind = [(*self.replacements[component], path)], "component"
        elif files.weights:
            sources = [(self.base, path, re.sub(r"\.bin$", ".safetensors", path)) for path in files.weights]
            kind = "base"
        else:
            raise BaseError(f"{self.base.name} has no weights for {component}")
        fused = self._fused(component)
        for source, name, path in sources:
            as_it_is = kind if name.endswith(".safetensors") else "converted"
            self._add(source, name, path, "fused" if fused else as_it_is, True, fused)

    def _add_vae(self):
        """The files of another VAE, under the names that the base's variant has it loaded by."""
        vae = self.wanted.vae
        assert vae is not None
        source = open_base(vae.repo, vae.revision, self.folder)
        room = f"{vae.subfolder.strip('/')}/" if vae.subfolder else ""
        where = f"{source.name}{f', {room}' if room else ''}"
        listed = {f"vae/{path.removeprefix(room)}": path for path in source.files if path.startswith(room)}
        if "vae/config.json" not in listed:
            hint = "give its subfolder" if "vae/config.json" in source.files else "name a folder of a diffusers VAE"
            raise BaseError(f"{where} has no config.json, so it is no VAE; {hint}")
        config, own = source.read_json(listed["vae/config.json"]), self.base.read_json("vae/config.json")
        class_name = str(config.get("_class_name"))
        if "Autoencoder" not in class_name:
            raise BaseError(f"{where} is no VAE but a {class_name}; name a folder of a diffusers VAE")
        channels = config.get("latent_channels"), own.get("latent_channels")
        if None not in channels and channels[0] != channels[1]:
            raise BaseError(
                f"the VAE in {where} has {channels[0]} latent channels, the base's {channels[1]}; name another"
            )
        files = select_files(listed, {"vae": ["diffusers", class_name]}, vae.variant)["vae"]
        if not files.weights:
            raise BaseError(f"{where} has no weights that load without a variant; name it, as variant: fp16")
        for path in files.config:
            self._add(source, listed[path], path, "component", False)
        for path in files.weights:
            name, is_whole = listed[path], len(files.weights) == 1
            path = f"vae/{_weight_name('diffusers', self.wanted.variant)}" if is_whole else path
            self._add(source, name, path, "converted" if is_whole and name.endswith(".bin") else "component", True)
        if files.index:
            self._add(source, listed[files.index], files.index, "component", False)
        self.index = {**self.index, "vae": ["diffusers", class_name]}


def _weight_name(library: str | None, variant: str | None) -> str:
    """The name of a component's one weight file, as diffusers and transformers look for it."""
    stem = "model" if library == "transformers" else "diffusion_pytorch_model"
    return f"{stem}{f'.{variant}' if variant else ''}.safetensors"


def _without_absent(
    model_index: Mapping, selected: Mapping[str, ComponentFiles], held: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """A model_index.json without the optional components that neither the file nor the config repository has.

    held: the components that the file has. Raises BaseError for one that the pipeline cannot do without.
    """
    import diffusers

    optional = getattr(getattr(diffusers, str(model_index.get("_class_name")), None), "_optional_components", [])
    kept = dict(model_index)
    for name, files in selected.items():
        is_model = f"{name}/config.json" in files.config
        if not is_model or files.weights or name in held:
            continue
        if name not in optional:
            raise BaseError(
                f"neither {source} nor the config has weights of the {name}; name a `config` that has them: a "
                "repository or folder of the whole model"
            )
        kept[name] = [None, None]
    return kept
