"""A Plan becomes a folder: the base's files linked, a small shard of buffers, and the text that ties them together."""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

from surgery.compat import own_config
from surgery.console import progress_bar
from surgery.errors import BaseError, InputError
from surgery.hub import sha256_of, sha256_of_all
from surgery.hub.listing import SOURCE, index_of, specs_of
from surgery.hub.tensors import layout_of, read_header
from surgery.nn.backbones import backbone_of
from surgery.recipe.plan import Planned, needs_weights

from .loras import lora_deltas
from .manifest import MANIFEST, SCHEMA_VERSION, Manifest, write_json
from .staging import check_space, check_target, existing_parent, staged_folder
from .weights import (
    buffer_shard_name,
    check_tensors,
    index_name,
    index_text,
    write_buffers,
    write_converted,
)

_REWRITTEN = ("converted", "fused")
_FETCHED_AT_ONCE = 4


@dataclass(frozen=True)
class Artifact:
    """An artifact folder as it was written."""

    folder: Path
    manifest: Manifest
    seconds: dict  # "total" and, within it, "hashing"
    linked_bytes: int
    copied_bytes: int


def write_artifact(
    planned: Planned,
    out: str | Path,
    force: bool = False,
    card: Callable[[Manifest], str] | None = None,
    thin: bool = False,
) -> Artifact:
    """Write the artifact of a Planned to `out`, whole or not at all.

    card: function from the Manifest to the text of README.md. thin: without weights, which are not fetched either:
    their names, sizes and sha256 are those of the Hub's listing, their tensors' those of the files' headers.
    Raises InputError where `out` may not be written to or a thin artifact needs the weights, BaseError where a weight
    file is damaged or does not fit the model, SurgeryError for a full disk.
    """
    started = time.monotonic()
    check_target(out, force)
    plan = planned.plan
    if thin and (reason := needs_weights(planned)):
        raise InputError(reason)
    sources = _fetch(planned, thin)
    check_space(out, _bytes_to_write(planned, sources, out))
    with staged_folder(out, force) as folder:
        layouts = _checked_layouts(planned, sources)
        linked, copied = _place_files(planned, sources, layouts, folder)
        for component in plan.denoisers:
            _write_denoiser(planned, component, layouts, folder)
        _write_scheduler(planned, folder)
        _write_index(planned, folder)
        (folder / "recipe.yaml").write_text(planned.recipe_file.applied_text, encoding="utf-8")
        before_hashing = time.monotonic()
        hashes = _hash_files(folder, {file.path: file.sha256 for file in plan.files if file.sha256}, sources)
        hashing = time.monotonic() - before_hashing
        single_file = _single_file(planned, sources)
        manifest = _manifest(planned, folder, hashes, thin, single_file)
        if card:
            text = card(manifest)
            (folder / "README.md").write_text(text, encoding="utf-8")
            hashes["README.md"] = sha256_of(folder / "README.md")
            manifest = _manifest(planned, folder, hashes, thin, single_file)
        write_json(folder / MANIFEST, manifest.model_dump(mode="json"))
    seconds = {"total": round(time.monotonic() - started, 2), "hashing": round(hashing, 2)}
    return Artifact(Path(os.path.abspath(out)), manifest, seconds, linked, copied)


def _fetch(planned, thin):
    """{artifact path: (local path of what it is made from, expected sha256)}; fetches from the Hub what is missing."""
    wanted = [file for file in planned.plan.files if file.origin.kind != "surgery"]
    if thin:  # whatever is in large file storage has its sha256 in the listing, and need not be fetched for it
        wanted = [file for file in wanted if not file.weights and file.sha256 is None]
    with progress_bar("fetching", len(wanted), "files") as advance, ThreadPoolExecutor(_FETCHED_AT_ONCE) as pool:

        def fetch(source):
            base, name = source
            path = base.path(name)
            advance(1)
            return path, base.files[name].sha256

        places = {file.path: planned.sources[file.path] for file in wanted}
        once = {(base.name, base.commit, name): (base, name) for base, name in places.values()}
        found = dict(zip(once, pool.map(fetch, once.values()), strict=True))
        sources = {path: found[base.name, base.commit, name] for path, (base, name) in places.items()}
        for base, name, _ in chain(*planned.loras.values()):
            base.path(name)
    return sources


def _checked_layouts(planned, sources):
    """{artifact path: {tensor: (dtype, shape)}} of the denoisers' weight files; BaseError unless they fit the models.

    Of a file that was not fetched the header alone is read, over the network.
    """
    for source in dict.fromkeys(sources[file.path] for file in planned.plan.files if file.origin.kind in _REWRITTEN):
        _check_download(*source)
    own = {component: _denoiser_files(planned, component) for component in planned.plan.denoisers}
    layouts = {}
    with progress_bar("reading headers", sum(map(len, own.values())), "files") as advance:
        for file in chain(*own.values()):
            layouts[file.path] = _layout_of(planned, file.path, sources)
            advance(1)
    for component, files in own.items():
        origins = ", ".join(dict.fromkeys(f"{f.origin.source}/{f.origin.path}" for f in files))
        # The base's own files may hold more than the model loads; weights that a recipe brings must be this model's.
        held = [layouts[file.path] for file in files]
        check_tensors(held, planned.shapes[component], origins, allow_unknown=_is_the_bases(planned, files))
    return layouts


def _layout_of(planned, path, sources):
    if path in planned.conversions:
        return planned.conversions[path].layout
    if path in sources:
        return layout_of(sources[path][0])
    base, name = planned.sources[path]
    return base.header(name)


def _is_the_bases(planned, files):
    return all(planned.sources[file.path][0] is planned.base for file in files)


def _denoiser_files(planned, component):
    return [file for file in planned.plan.files if file.weights and file.path.startswith(f"{component}/")]


def _bytes_to_write(planned, sources, out):
    """What the artifact will take on its disk: all that is rewritten, and weights that lie on another disk."""
    disk = os.stat(existing_parent(out)).st_dev
    total = 1 << 20  # the text, and the buffers
    for file in planned.plan.files:
        if file.weights and file.path in sources:
            source, _ = sources[file.path]
            linkable = file.origin.kind not in _REWRITTEN and os.stat(source).st_dev == disk
            total += 0 if linkable else file.size
    return total


def _place_files(planned, sources, layouts, folder):
    linked = copied = 0
    for file in planned.plan.files:
        if file.path not in sources:
            continue
        source, _ = sources[file.path]
        target = folder / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.origin.kind in _REWRITTEN:
            continue
        if file.weights and file.path not in layouts and Path(source).suffix == ".safetensors":
            read_header(source)  # a file that was cut short is found here, not when it is loaded
        if not file.weights:
            shutil.copyfile(source, target)  # a link would let an edit of the artifact's config change the base's
        elif _link_or_copy(source, target):
            linked += target.stat().st_size
        else:
            copied += target.stat().st_size
    return linked, copied + _rewrite_weights(planned, sources, layouts, folder)


def _rewrite_weights(planned, sources, layouts, folder):
    """Write the files that are converted or fused; returns bytes."""
    rewritten = [file for file in planned.plan.files if file.origin.kind in _REWRITTEN]
    if not rewritten:
        return 0
    deltas = {component: _deltas(planned, component) for component in planned.plan.denoisers}
    with progress_bar("writing weights", sum(file.size for file in rewritten)) as advance:
        for file in rewritten:
            added = deltas[file.path.partition("/")[0]] if file.path in layouts else {}
            conversion = planned.conversions.get(file.path)
            write_converted(sources[file.path][0], folder / file.path, added, advance, conversion)
    return sum((folder / file.path).stat().st_size for file in rewritten)


def _deltas(planned, component):
    """What the recipe's LoRAs add to a denoiser's tensors."""
    loras = planned.loras[component]
    for base, name, _ in loras:
        _check_download(base.path(name), base.files[name].sha256)
    config = planned.base.read_json(f"{component}/config.json")
    found = [(base.path(name), scale) for base, name, scale in loras]
    return lora_deltas(found, component, planned.plan.base["pipeline_class"], config, planned.shapes[component])


def _check_download(path, expected):
    """Raise BaseError if a file that is about to be rewritten is not the one that the Hub lists."""
    if expected:
        with progress_bar(f"checking {Path(path).name}", os.stat(path).st_size) as advance:
            if sha256_of(path, advance) != expected:
                raise _damaged(path, expected)


def _damaged(path, expected):
    return BaseError(
        f"{path} is damaged: its sha256 is not the one that the Hub lists ({expected[:12]}...). "
        "Delete that file and run the same command again"
    )


def _link_or_copy(source, target):
    """Hard-link `target` to the file, or copy it where links do not work; True if linked."""
    source = os.path.realpath(source)  # a Hub cache holds symbolic links to its blobs
    try:
        os.link(source, target)
        return True
    except OSError:  # another disk, a filesystem without links, a file of somebody else's
        shutil.copyfile(source, target)
        return False


def _write_denoiser(planned, name, layouts, folder):
    """The config, code and buffers of a patched denoiser, and the index of the weights, which others may need too."""
    files = sorted(_denoiser_files(planned, name), key=lambda file: file.path)
    contents = {Path(file.path).name: (list(layouts[file.path]), _size(folder / file.path, file)) for file in files}
    index = folder / name / index_name(list(contents))
    if name in planned.plan.patched:
        contents |= _write_patched(planned, name, list(contents), folder)
    elif len(contents) == 1 or index.exists():
        return
    index.write_text(index_text(contents), encoding="utf-8")


def _write_patched(planned, name, names, folder):
    """{name of the shard of buffers: (its tensors' names, its size)}; names: of the weight files."""
    from surgery.nn.shipped import module_name, shipped_source

    patched, operations = backbone_of(planned.plan.denoisers[name]).patched, planned.plan.patched[name]
    assert patched is not None
    component = folder / name
    component.mkdir(exist_ok=True)
    config = planned.base.read_json(f"{name}/config.json")
    config = {
        **patched.refused_by_stock_class(own_config(config)),
        "_class_name": patched.__name__,
        "auto_map": patched.auto_map(),
        "pladis": operations,
    }
    write_json(component / "config.json", config)
    code = component / f"{module_name(patched.__name__)}.py"
    code.write_text(shipped_source(patched.__name__), encoding="utf-8")

    shard = buffer_shard_name(names)
    buffers = write_buffers(component / shard, operations)
    return {shard: (buffers, (component / shard).stat().st_size)}


def _write_scheduler(planned, folder):
    scheduler = planned.plan.scheduler
    if not scheduler:
        return
    import diffusers

    config = planned.base.read_json("scheduler/scheduler_config.json")
    overrides = {key: value for key, value in scheduler.items() if key != "class"}
    try:
        made = getattr(diffusers, scheduler["class"]).from_config(config, **overrides)
    except (TypeError, ValueError) as error:
        raise BaseError(f"{scheduler['class']} cannot be made from the base's scheduler config: {error}") from error
    (folder / "scheduler").mkdir(exist_ok=True)
    made.save_config(folder / "scheduler")


def _write_index(planned, folder):
    name = index_of(planned.base.files)
    assert name is not None  # or it could not have been planned
    write_json(folder / name, _index(planned))


def _index(planned):
    """The index of the artifact's pipeline, which names the patched classes."""
    index = own_config(planned.index)
    classes = {name: backbone_of(planned.plan.denoisers[name]).patched for name in planned.plan.patched}
    named = {name: [patched.__module__, patched.__name__] for name, patched in classes.items()}
    scheduler = ["diffusers", planned.plan.scheduler["class"]] if planned.plan.scheduler else None
    if specs := specs_of(index):  # a modular pipeline, whose components say themselves where they come from
        for name, spec in specs.items():
            index[name] = [*index[name][:2], _spec(planned, name, spec)]
        made = {name: (kind, [None, None]) for name, kind in named.items()}  # AutoModel finds what has no hint
        for name, (kind, hint) in (made | ({"scheduler": (scheduler, scheduler)} if scheduler else {})).items():
            index[name] = [*kind, {**_spec(planned, name, specs.get(name, {})), "type_hint": hint}]
        return index
    if scheduler:
        index["scheduler"] = scheduler
    # AutoModel reads the component's own only where there is no such index.
    return {**index, **named, "auto_map": next(iter(classes.values())).auto_map()}


def _spec(planned, name, spec):
    """Where a component of a modular artifact comes from: the artifact, or what of the base is on the Hub."""
    files = [file for file in planned.plan.files if file.path.startswith(f"{name}/")]
    variant = planned.plan.base["variant"]
    variant = variant if any(file.weights and f".{variant}" in file.path for file in files) else None
    elsewhere = name not in planned.plan.patched and all(file.origin.kind == "base" for file in files)
    place, path = planned.sources[files[0].path] if files and elsewhere else (planned.base, f"{name}/")
    if not elsewhere or place.kind != "hub":
        return {**spec, SOURCE: None, "subfolder": name, "variant": variant, "revision": None}
    there = {SOURCE: place.name, "subfolder": path.rpartition("/")[0], "revision": place.commit}
    return {**spec, **there, "variant": variant}


def _size(path, file):
    """The size of a file of the artifact, or, where it was not fetched, the listing's."""
    return path.stat().st_size if path.exists() else file.size


def _hash_files(folder, listed, sources):
    """{path: sha256} of every file, as it was written; of what was not fetched, the listing's.

    Raises BaseError where a fetched file is not the one that is listed.
    """
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    hashes = sha256_of_all(folder, paths, "hashing")
    for path, expected in listed.items():
        if hashes.setdefault(path, expected) != expected:
            raise _damaged(sources[path][0], expected)
    return hashes


def _single_file(planned, sources):
    """The sha256 of the single-file checkpoint on disk that the artifact is made of, as a mapping; {} without one."""
    path = next(iter(planned.conversions), None)
    if path is None or planned.plan.base["single_file_sha256"]:
        return {}
    return {"single_file_sha256": sha256_of(sources[path][0])}


def _manifest(planned, folder, hashes, thin, single_file):
    from surgery.machine import versions

    plan, recipe = planned.plan, planned.recipe_file.recipe
    planned_files = {file.path: file for file in plan.files}
    files = {}
    for path, digest in sorted(hashes.items()):
        file = planned_files.get(path)
        origin = asdict(file.origin) if file else {"kind": "surgery"}
        weights = file.weights if file else False
        size = _size(folder / path, file)
        files[path] = {"size": size, "sha256": digest, "weights": weights, "origin": origin}
    patched = {
        name: {"code": code, "buffers": f"{name}/{buffer_shard_name(_weight_names(planned, name))}"}
        for name, code in plan.code.items()
    }
    component = next(iter(patched))
    data = {
        "schema_version": SCHEMA_VERSION,
        "hash": "",
        "name": plan.name,
        "summary": recipe.summary,
        "plan_hash": plan.hash,
        "recipe_hash": plan.recipe_hash,
        "base": {**plan.base, **single_file, "license": _license(plan, recipe)},
        "component": component,
        **patched.pop(component),
        "further": patched,
        "operations": [dict(operation) for operation in plan.carried],
        "skipped": plan.skipped,
        "sampling": planned.sampling,
        "files": files,
        "versions": versions() | {"python": ".".join(map(str, sys.version_info[:3]))},
        "weights": "thin" if thin else "copy",
        "index": _index(planned) if specs_of(planned.index) else None,
    }
    manifest = Manifest.model_validate(json.loads(json.dumps(data)))
    return manifest.model_copy(update={"hash": manifest.computed_hash()})


def _weight_names(planned, component):
    return sorted(Path(file.path).name for file in _denoiser_files(planned, component))


def _license(plan, recipe):
    return plan.base["license"] if recipe.publish.license == "inherit" else recipe.publish.license
