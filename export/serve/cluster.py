"""Ray: one that is started here for the time being and is reachable from this machine alone, or a running cluster."""

import json
import os
import re
import secrets
import signal
from contextlib import contextmanager

from surgery import errors
from surgery.errors import InputError
from surgery.machine import connect_to_ray

# What a Ray of our own is started with; read when ray is first imported. What the user has set stays.
_OWN = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the coming default; without it Ray warns
    # Ray's ports run code for whoever reaches them. Despite its name this switch puts them on the loopback interface,
    # as Ray does by default on Windows and macOS; elsewhere they would be open to the network.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}


def require_ray():
    """Raise InputError where Ray Serve, FastAPI or prometheus_client is not installed."""
    from importlib.util import find_spec

    absent = [name for name in ("ray", "fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if absent:
        raise InputError(f"serving needs {', '.join(absent)}: pip install 'pladis-surgery[ray]'")


def ray_errors():
    """The exceptions by which Ray and Serve say that something of theirs is gone."""
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    return (RayError, RayServeException, ConnectionError)


@contextmanager
def ray_cluster(address=None, cpus=1):
    """Yield what the cluster has, {"CPU": 8.0, "GPU": 2.0, ...}; a Ray that was started here is ended on leaving.

    address: of a running cluster, "auto" or ray://host:10001; None starts one on this machine with at least so many
    CPUs. Raises InputError where that cannot be done.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # or a thread that asks Ray something after its end starts another
    if address is None:
        for name, value in _OWN.items():
            os.environ.setdefault(name, value)
        if "RAY_AUTH_MODE" not in os.environ:
            # Other users of this machine reach the loopback ports, and Serve's replicas have one each on every
            # interface all the same: all of them ask for this token, which Ray's processes inherit and nobody sees.
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    on_terminate = signal.getsignal(signal.SIGTERM)
    ray = connect_to_ray(address, cpus, "Ray on this machine", "RAY_AUTH_MODE=token where the cluster asks for a token")
    try:
        signal.signal(signal.SIGTERM, on_terminate)  # Ray has put its own in its place
        yield ray.cluster_resources()
    finally:
        ray.shutdown()


_MARK = "surgery-start-failure "
_LINE = re.compile(rf"{_MARK}(\{{.*\}})\s*$", re.MULTILINE)


class StartFailure(RuntimeError):
    """An error, written in one line that `read` finds again."""

    @classmethod
    def of(cls, error, model):
        """The StartFailure for whatever kept a replica from loading a model."""
        if not isinstance(error, errors.SurgeryError):
            error = errors.SurgeryError(f"{model} cannot be loaded: {type(error).__name__}: {str(error).strip()}")
        return cls(_MARK + json.dumps({"kind": type(error).__name__, "message": str(error)}))


def read(text):
    """The SurgeryError that a text with a StartFailure in it tells of, or None."""
    found = _LINE.search(text)
    if found is None:
        return None
    told = json.loads(found.group(1))
    kind = getattr(errors, told["kind"], errors.SurgeryError)
    kind = errors.InputError if kind is errors.RecipeError else kind  # which is made of problems, not of a text
    return kind(told["message"])
