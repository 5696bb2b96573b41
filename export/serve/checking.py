"""What is to be served and where, checked before Ray is started."""

import math
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from surgery.artifact import read_manifest, verify_artifact
from surgery.artifact.fetch import model_folder
from surgery.artifact.manifest import MANIFEST
from surgery.engines.record import USUAL_BATCH, Profile
from surgery.errors import InputError
from surgery.hub import HubBase
from surgery.hub.base import LocalBase, local_folder, native_resolution, read_index
from surgery.hub.listing import components_of, index_of
from surgery.machine import DTYPES
from surgery.models.denoisers import denoiser_of
from surgery.models.videos import draws_videos, number_of_frames
from surgery.recipe.schema import OPERATORS
from surgery.runtime.loras import check_loras, lora_source
from surgery.runtime.ray_client import require_serve
from surgery.runtime.video import require_mp4
from surgery.runtime.worker import WorkerConfig

from .access import Access
from .profile import check_profile, served_profile
from .request import BatchKey, recorded_scale
from .tracing import Tracing, tracing_of


@dataclass(frozen=True)
class Limits:
    """What a server takes on. Times are in seconds; `max_pixels` is of one image or frame, `max_frames` of a video.

    max_batch: 4 unless given, of a model of videos 1. queue: requests that are accepted and not finished, over all
    replicas. batch_wait: how long an image waits for others of its settings while a replica is idle. hosts: further
    names that requests may call the server by. strict: refuse fields that are not known, which are warned of otherwise.
    keep_seconds, keep_bytes: of images that are answered as a url.
    """

    max_batch: int | None = None
    batch_wait: float = 0.05
    queue: int = 64
    timeout: float = 300.0
    max_images: int = 10
    max_pixels: int | None = None
    max_frames: int | None = None
    hosts: tuple[str, ...] = ()
    strict: bool = False
    keep_seconds: float = 3600.0
    keep_bytes: int = 256 * 1024 * 1024

    def check(self) -> None:
        """Raise InputError for a number out of range, naming its option."""
        least_of = {"max_batch": 1, "queue": 1, "max_images": 1, "max_pixels": 64, "max_frames": 1, "keep_bytes": 1}
        for name, least in least_of.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{option(name)} must be at least {least}, not {value}")
        check_seconds("batch_wait", self.batch_wait, zero=True)
        check_seconds("timeout", self.timeout)
        check_seconds("keep_seconds", self.keep_seconds)

    @property
    def batch(self) -> int:
        """How many images are drawn at once."""
        return self.max_batch or USUAL_BATCH

    def of(self, served: "ServedModel") -> "Limits":
        """The limits with what follows from the model where it was not given."""
        own = served.width * served.height if served.width and served.height else None
        largest = served.profile.images.high if served.profile else USUAL_BATCH
        if own and self.max_pixels and own > self.max_pixels:
            own = f"{served.width}x{served.height}"
            raise InputError(f"--max-pixels {self.max_pixels} is below the model's own {own}")
        if served.frames and self.max_frames and served.frames > self.max_frames:
            raise InputError(f"--max-frames {self.max_frames} is below the model's own {served.frames}")
        return replace(
            self,
            max_batch=self.max_batch or min(1 if served.is_video else USUAL_BATCH, largest),
            max_pixels=self.max_pixels or 2 * (own or 1024 * 1024),
            max_frames=self.max_frames or (2 * served.frames if served.frames else None),
        )


def check_seconds(name: str, value: float, zero: bool = False) -> None:
    """Raise InputError for what is no time to wait."""
    if not (math.isfinite(value) and (value >= 0 if zero else value > 0)):
        raise InputError(f"{option(name)} must be a number of seconds {'of 0 or more' if zero else 'above 0'}")


def option(name: str) -> str:
    """ "--max-batch" for "max_batch"."""
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True)
class ServedModel:
    """A model as its clients see it.

    sampling: what its manifest records. width, height: of an image whose request names no size, None where the configs
    do not tell; frames: likewise, of a model of videos. operations: as the UNet's config has them; empty for a plain
    pipeline. profile: the sizes that its engines draw, None where it runs eagerly. aliases: names in place of its own.
    schedulers: the classes that a request may choose; loras: the names of the LoRAs.
    """

    name: str
    artifact_hash: str | None
    sampling: Mapping[str, Any]
    width: int | None = None
    height: int | None = None
    operations: tuple[dict, ...] = ()
    is_video: bool = False
    frames: int | None = None
    profile: Profile | None = None
    aliases: tuple[str, ...] = ()
    schedulers: tuple[str, ...] = ()
    loras: tuple[str, ...] = ()

    def names(self) -> tuple[str, ...]:
        """What a request may call it by; the first is what answers call it."""
        return self.aliases or (self.name,)

    def sizes(self) -> str:
        """The sizes that its engines draw, as a request writes them."""
        assert self.profile is not None
        width, height = self.profile.width, self.profile.height
        low, high = f"{width.low}x{height.low}", f"{width.high}x{height.high}"
        return low if low == high else f"{low} to {high}"

    def hyperparameters(self) -> dict[str, list[float]]:
        """{name: the value of each operation} of those that every operation has; a request may set these."""
        names = [name for name in self._fields(self.operations[0]) if name != "unit"] if self.operations else []
        # An older artifact's operations have not every name that the table has now.
        shared = [name for name in names if all(name in operation for operation in self.operations)]
        return {name: [operation[name] for operation in self.operations] for name in shared}

    def scheduled(self) -> set[str]:
        """The hyperparameters that a schedule of the recipe sets at every step, so that a request cannot."""
        return {name for operation in self.operations for name in operation.get("schedule") or () if name in operation}

    @staticmethod
    def _fields(operation):
        return [name for name in OPERATORS[operation["operator"]].model_fields if name != "operator"]


def served_model(
    model: Path | str, revision: str | None = None, here: bool = True, as_repository: bool = False
) -> tuple[ServedModel, str, str | None]:
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
    if index_of(base.files) is None:
        raise InputError(f"{folder or name} holds no pipeline: it has no model_index.json")
    index = read_index(base)
    component, _ = denoiser_of(index)
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
        is_video=draws_videos(index.get("_class_name")),
        frames=number_of_frames(index.get("_class_name"), sampling),
        schedulers=_schedulers(base, index),
    )


def _schedulers(base, index):
    """Names of the scheduler classes that fit a pipeline beside its own."""
    import diffusers

    _, own = components_of(index).get("scheduler", (None, ""))
    kind: Any = getattr(diffusers, str(own), None)
    if not hasattr(kind, "compatibles") or "scheduler/scheduler_config.json" not in base.files:
        return ()
    made = kind.from_config(_config(base, "scheduler"))
    return tuple(sorted(one.__name__ for one in made.compatibles))


def _config(base, component):
    name = f"{component}/{'scheduler_config' if component == 'scheduler' else 'config'}.json"
    return base.read_json(name) if name in base.files else {}


_WARM_STEPS = 2
_CHOICES = {"device": ("cpu", "cuda", "mps"), "dtype": DTYPES}


@dataclass(frozen=True)
class ServerConfig:
    """Where and how widely a server runs. start_timeout: seconds until all replicas must be up; tls_...: PEM files."""

    replicas: int = 1
    host: str = "127.0.0.1"
    port: int = 8000
    address: str | None = None
    start_timeout: float = 1800.0
    tls_cert: str | None = None
    tls_key: str | None = None

    @property
    def url(self) -> str:
        """Where a client on the same machine finds it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)
        scheme = "https" if self.tls_cert else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host and not host.startswith('[') else host}:{self.port}"


@dataclass(frozen=True)
class Serving:
    """All that a server is started with.

    warm: what a replica draws before it is ready. again(): the same model, as it is by then. further: other models.
    tracing: where spans are sent, if they are.
    """

    served: ServedModel
    server: ServerConfig
    limits: Limits
    worker: WorkerConfig
    warm: BatchKey
    again: Callable[[], "Serving"]
    access: Access = field(default_factory=Access)
    further: tuple["Serving", ...] = ()
    tracing: Tracing | None = None

    def models(self) -> tuple["Serving", ...]:
        """Itself for its model, and one for each other."""
        return (self, *self.further)


def checked_models(
    models: Sequence[str],
    revision: str | None,
    server: ServerConfig,
    limits: Limits,
    running: Mapping[str, Any],
    access: Access | None = None,
    names: Sequence[str] = (),
    loras: Sequence[str] = (),
    otel: bool = False,
) -> Serving:
    """As `checked`, of several models on one port.

    names, loras: of the model, if it is the only one. otel: whether spans are wanted, whatever the environment says.
    """
    tracing = tracing_of(otel)
    access = replace(access or Access(), traced=tracing is not None)
    for_one = {"--revision": revision, "--served-model-name": names, "--lora": loras}
    if len(models) > 1 and any(for_one.values()):
        raise InputError(f"{next(name for name, given in for_one.items() if given)} goes with one model, not several")
    access.check()
    _check_server(server)
    first, *further = (checked(model, revision, server, limits, running, names, loras) for model in models)
    named = [one.served.name for one in (first, *further)]
    if twice := next((name for name in named if named.count(name) > 1), None):
        raise InputError(f"two of the models are called {twice}, so that a request could not tell which it means")
    access = replace(access, hosts=first.limits.hosts)
    return replace(first, access=access, further=tuple(further), tracing=tracing)


def _check_server(server):
    check_seconds("start_timeout", server.start_timeout)
    if server.replicas < 1:
        raise InputError(f"--replicas must be at least 1, not {server.replicas}")
    if not 1 <= server.port <= 65535:
        raise InputError(f"--port must lie in 1 to 65535, not {server.port}")
    if bool(server.tls_cert) != bool(server.tls_key):
        raise InputError("--tls-cert and --tls-key go together")
    if server.tls_cert and server.tls_key:
        import ssl

        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(server.tls_cert, server.tls_key)
        except (OSError, ssl.SSLError) as error:
            told = error.strerror or error
            text = f"--tls-cert {server.tls_cert} is no certificate with the key in --tls-key {server.tls_key}: {told}"
            raise InputError(text) from error
    require_serve()
    if server.address is None:
        _check_port(server.host, server.port)


def checked(
    model: str,
    revision: str | None,
    server: ServerConfig,
    limits: Limits,
    running: Mapping[str, Any],
    names: Sequence[str] = (),
    loras: Sequence[str] = (),
) -> Serving:
    """What is to be served, with all that can be known before Ray is started.

    running: the fields of the WorkerConfig that the user chooses. names: in place of the model's own. loras: as
    `lora_source` reads them. Raises InputError for anything that cannot be served.
    """
    limits.check()
    if running.get("threads") is not None and running["threads"] < 1:
        raise InputError(f"--threads must be at least 1, not {running['threads']}")
    for name, values in _CHOICES.items():
        if running.get(name) not in (None, *values):
            raise InputError(f"--{name} must be {', '.join(values[:-1])} or {values[-1]}, not {running[name]}")
    again = partial(checked, model, revision, server, limits, running, names, loras)
    here, engine = server.address is None, running.get("engine")
    served, opened, revision = served_model(model, revision, here, as_repository=engine is not None)
    if engine and served.artifact_hash is None:
        raise InputError(f"{model} is no artifact, so it has no engines; leave --engine out")
    if engine and here:
        profile = served_profile(opened, revision, running)
        if profile is not None:
            check_profile(profile, served, limits)
            served = replace(served, profile=profile)
    sources = tuple(map(lora_source, loras))
    if twice := {one.name for one in sources if sum(one.name == other.name for other in sources) > 1}:
        raise InputError(f"--lora {twice.pop()} is given twice: give each a name of its own")
    if here and sources:
        check_loras(model_folder(opened, revision), sources)
    served = replace(served, aliases=tuple(names), loras=tuple(one.name for one in sources))
    hosts = tuple(name.lower() for name in (server.host, *limits.hosts))
    limits = replace(limits, hosts=hosts).of(served)
    if served.is_video:
        require_mp4()
    sampling = served.sampling
    steps = min(sampling.get("steps") or _WARM_STEPS, _WARM_STEPS)
    warm = BatchKey(
        steps,
        None,
        recorded_scale(sampling),
        served.width,
        served.height,
        num_frames=sampling.get("num_frames"),
    )
    worker = WorkerConfig(opened, revision, served.artifact_hash, sampling, loras=sources, **running)
    return Serving(served, server, limits, worker, warm, again)


def _check_port(host, port):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"cannot listen on {host}:{port}: {reason}; choose another --port") from error
