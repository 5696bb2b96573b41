"""What is compared: the base and one or more patched sides of it, each known by what its images depend on."""

import hashlib
import json
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from surgery.base.local import read_json_file
from surgery.versions import versions


@dataclass(frozen=True)
class Side:
    """A pipeline to draw with. operations: as the model's config has them, None for the untouched base.

    identity: {name: value} of all else that an image depends on: base, sampling, library versions, device and dtype.
    """

    name: str
    operations: list | None
    identity: dict

    @cached_property
    def key(self):
        """The hash that its images are kept under."""
        content = {"operations": self.operations, **self.identity}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sides_of(manifest, folder, environment):
    """(base Side, patched Side) of an artifact."""
    identity = identity_of(manifest, folder, environment)
    operations = [operation.model_dump() for operation in manifest.operations]
    return base_side(identity), patched_side("patched", operations, identity, operator_code(manifest, folder))


def identity_of(manifest, folder, environment):
    """What the images of an artifact's base depend on, by the names of `Side.identity`."""
    identity = {"base": base_identity(manifest, folder), "sampling": manifest.sampling, **environment}
    return {**identity, "guidance_code": _guidance_code()} if "guidance" in manifest.sampling else identity


@cache
def _guidance_code():
    """A hash of the code that guides."""
    import surgery.guidance

    folder = Path(surgery.guidance.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def base_side(identity):
    """The Side of the untouched base; identity: of base, sampling and environment."""
    return Side("base", None, identity)


def patched_side(name, operations, identity, code):
    """The Side of a base with operations, which depends on the code of the operators too; code: `operator_code`'s."""
    return Side(name, operations, {**identity, "code": code})


def operator_code(manifest, folder):
    """The name, by its content, of the code that this installation runs an artifact's operations with."""
    from surgery.nn.shipped import module_name

    return module_name(read_json_file(Path(folder) / manifest.component / "config.json")["_class_name"])


def environment(device, dtype, threads=None):
    """What of this machine an image depends on."""
    installed = {name: version for name, version in versions().items() if name != "pladis-surgery"}
    device = str(device).partition(":")[0]
    device = f"{device} x{threads}" if threads and threads > 1 else device
    return {"device": device, "dtype": dtype or "default", "versions": installed}


def base_identity(manifest, folder):
    """A hash of all of the artifact but the surgery, so that artifacts of one base share the base's images."""
    ours = {manifest.code, manifest.buffers, "model_index.json", f"{manifest.component}/config.json"}
    ours |= {path for path in manifest.needed if path.endswith(".json") and ".index." in path}
    files = {path: file.sha256 for path, file in manifest.needed.items() if path not in ours}
    config = read_json_file(Path(folder) / manifest.component / "config.json")
    config = {key: config[key] for key in config if key not in ("pladis", "auto_map") and not key.startswith("_")}
    index = read_json_file(Path(folder) / "model_index.json")
    index = {key: value for key, value in index.items() if key != manifest.component}
    content = [files, config, index, manifest.weight_variant()]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
