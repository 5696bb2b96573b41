"""What is to be served and where, checked before Ray is started."""

import socket
from dataclasses import dataclass, replace
from pathlib import Path

from surgery.artifact import read_manifest, verify_artifact
from surgery.artifact.fetch import model_folder
from surgery.artifact.manifest import MANIFEST
from surgery.errors import InputError
from surgery.hub import HubBase
from surgery.hub.local import LocalBase
from surgery.hub.opening import local_folder
from surgery.hub.repository import native_resolution
from surgery.machine import DTYPES
from surgery.models.anatomy import denoiser_of
from surgery.recipe.schema import OPERATORS

from .cluster import require_ray
from .request import Setting
from .settings import Order, check_seconds


@dataclass(frozen=True)
class ServedModel:
    """A model as its clients see it.

    sampling: what its manifest records. width, height: of an image whose request names no size, None where the configs
    do not tell. operations: as the UNet's config has them; empty for a plain pipeline.
    """

    name: str
    artifact_hash: str | None
    sampling: dict
    width: int | None = None
    height: int | None = None
    operations: tuple[dict, ...] = ()

    def hyperparameters(self):
        """{name: the value of each operation} of those that every operation has; a request may set these."""
        names = [name for name in self._fields(self.operations[0]) if name != "unit"] if self.operations else []
        shared = [name for name in names if all(name in self._fields(operation) for operation in self.operations)]
        return {name: [operation[name] for operation in self.operations] for name in shared}

    def scheduled(self):
        """The hyperparameters that a schedule of the recipe sets at every step, so that a request cannot."""
        return {name for operation in self.operations for name in operation.get("schedule") or () if name in operation}

    @staticmethod
    def _fields(operation):
        return [name for name in OPERATORS[operation["operator"]].model_fields if name != "operator"]


def served_model(model, revision=None, here=True, as_repository=False):
    """(ServedModel, the model to open, its revision) of a folder or a Hub repository.

    here: the replicas run on this machine, so what comes from the Hub is fetched once, now, and opened as a folder.
    Otherwise, and with `as_repository` (for engines, which are fetched by key), they open the repository themselves, at
    the commit that it has now. Raises InputError for what is no pipeline, BaseError for what cannot be read,
    ArtifactError for an artifact that is not whole.
    """
    if local_folder(model) is not None:
        folder = Path(model_folder(model, revision)).absolute()
        return _described(LocalBase(folder), folder.name, folder), str(folder), None
    base = HubBase(str(model), revision)
    commit = base.commit or revision
    if not here:
        folder = base.path(MANIFEST).parent if MANIFEST in base.files else None
        return _described(base, str(model), folder), str(model), commit
    folder = Path(model_folder(model, revision)).absolute()
    served = _described(LocalBase(folder), str(model), folder)
    return (served, str(model), commit) if as_repository else (served, str(folder), None)


def _described(base, name, folder):
    """The ServedModel of a base; name: of a plain pipeline; folder: of an artifact's manifest."""
    if "model_index.json" not in base.files:
        raise InputError(f"{folder or name} holds no pipeline: it has no model_index.json")
    component, _ = denoiser_of(base.read_json("model_index.json"))
    config = _config(base, component)
    own = native_resolution(config, _config(base, "vae"))
    sampling, artifact_hash, operations = {}, None, tuple(config.get("pladis") or ())
    if MANIFEST in base.files:
        manifest = verify_artifact(folder) if isinstance(base, LocalBase) else read_manifest(folder)
        name, sampling, artifact_hash = manifest.name, manifest.sampling, manifest.hash
        operations = tuple(operation.model_dump() for operation in manifest.operations)
    for operation in operations:
        if operation.get("operator") not in OPERATORS:
            operator = operation.get("operator")
            raise InputError(f"{name} runs {operator!r}, an operator unknown here; pip install -U pladis-surgery")
    return ServedModel(
        name=name,
        artifact_hash=artifact_hash,
        sampling=sampling,
        width=sampling.get("width") or own,
        height=sampling.get("height") or own,
        operations=operations,
    )


def _config(base, component):
    name = f"{component}/config.json"
    return base.read_json(name) if name in base.files else {}


_WARM_STEPS = 2
_CHOICES = {"device": ("cpu", "cuda", "mps"), "dtype": DTYPES}


@dataclass(frozen=True)
class Place:
    """Where and how widely a server runs. start_timeout: seconds until all replicas must be up."""

    replicas: int = 1
    host: str = "127.0.0.1"
    port: int = 8000
    address: str | None = None
    start_timeout: float = 1800.0

    @property
    def url(self):
        """Where a client on the same machine finds it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host and not host.startswith('[') else host}:{self.port}"


def checked(model, revision, place, limits, order_with):
    """(ServedModel, Limits, Order) of what is to be served, with all that can be known before Ray is started.

    order_with: the fields of the Order that the user chooses. Raises InputError for anything that cannot be served.
    """
    limits.check()
    check_seconds("start_timeout", place.start_timeout)
    if place.replicas < 1:
        raise InputError(f"--replicas must be at least 1, not {place.replicas}")
    if not 1 <= place.port <= 65535:
        raise InputError(f"--port must lie in 1 to 65535, not {place.port}")
    if order_with.get("threads") is not None and order_with["threads"] < 1:
        raise InputError(f"--threads must be at least 1, not {order_with['threads']}")
    for name, values in _CHOICES.items():
        if order_with.get(name) not in (None, *values):
            raise InputError(f"--{name} must be {', '.join(values[:-1])} or {values[-1]}, not {order_with[name]}")
    require_ray()
    if place.address is None:
        _check_port(place.host, place.port)
    here, engine = place.address is None, order_with.get("engine")
    served, opened, revision = served_model(model, revision, here, as_repository=engine is not None)
    limits = _with_pixels(limits, served)
    sampling = served.sampling
    steps = min(sampling.get("steps") or _WARM_STEPS, _WARM_STEPS)
    warm = Setting(steps, None, sampling.get("guidance_scale"), served.width, served.height)
    order = Order(opened, revision, served.artifact_hash, warm, limits.max_batch, **order_with)
    return served, limits, order


def _check_port(host, port):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"cannot listen on {host}:{port}: {reason}; choose another --port") from error


def _with_pixels(limits, served):
    """The limits with `max_pixels`: unless given, twice those of the model's own size."""
    own = served.width * served.height if served.width and served.height else None
    if limits.max_pixels is None:
        return replace(limits, max_pixels=2 * own if own else 2 * 1024 * 1024)
    if own and own > limits.max_pixels:
        raise InputError(f"--max-pixels {limits.max_pixels} is below the model's own {served.width}x{served.height}")
    return limits
