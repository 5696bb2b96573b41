"""What is to be served and where, checked before Ray is started."""

import socket
from dataclasses import dataclass, replace

from surgery.dtypes import DTYPES
from surgery.errors import InputError

from .cluster import require_ray
from .served import served_model
from .settings import Order, check_seconds
from .work import Setting

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
