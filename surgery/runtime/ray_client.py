"""Ray: one that is started here for the time being, or a running cluster."""

import logging
import os
import secrets
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType

from surgery.compat import set_ray_switches
from surgery.errors import InputError, SurgeryError

_STARTS = 6


def require_serve() -> None:
    """Raise InputError where Ray Serve, FastAPI or prometheus_client is not installed."""
    absent = [name for name in ("ray", "fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if absent:
        raise InputError(f"serving needs {', '.join(absent)}: pip install 'pladis-surgery[ray]'")


def ray_errors() -> tuple[type[Exception], ...]:
    """The exceptions by which Ray and Serve say that something of theirs is gone."""
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    return (RayError, RayServeException, ConnectionError)


@contextmanager
def pool_cluster(address: str | None, cpus: int) -> Iterator[ModuleType]:
    """Yield the module ray, connected for a pool of workers: a connection that is there already is used and stays.

    address: of a running cluster; None starts one on this machine with at least so many CPUs. Raises InputError where
    Ray is not installed or there is no connection.
    """
    try:
        import ray
    except ImportError as error:
        raise InputError(
            "drawing on several workers needs Ray: pip install 'pladis-surgery[ray]'; --workers 1 needs nothing"
        ) from error
    if ray.is_initialized():
        yield ray
        return
    set_ray_switches(on_loopback=False)
    hint = "RAY_AUTH_TOKEN if the cluster asks for one"
    ray = _connected(address, cpus, "a Ray cluster on this machine", hint)
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def serve_cluster(address: str | None = None, cpus: int = 1) -> Iterator[dict[str, float]]:
    """Yield what the cluster has, {"CPU": 8.0, "GPU": 2.0, ...}; a Ray that was started here is ended on leaving.

    address: of a running cluster, "auto" or ray://host:10001; None starts one on this machine with at least so many
    CPUs, reachable from this machine alone. Raises InputError where that cannot be done.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # or a thread that asks Ray something after its end starts another
    if address is None:
        set_ray_switches(on_loopback=True)
        os.environ["FORWARDED_ALLOW_IPS"] = ""  # or Serve's proxy takes anyone's word on this machine for X-Forwarded-*
        if "RAY_AUTH_MODE" not in os.environ:
            # Other users of this machine reach the loopback ports, and Serve's replicas have one each on every
            # interface all the same: all of them ask for this token, which Ray's processes inherit and nobody sees.
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    on_terminate = signal.getsignal(signal.SIGTERM)
    ray = _connected(address, cpus, "Ray on this machine", "RAY_AUTH_MODE=token where the cluster asks for a token")
    try:
        signal.signal(signal.SIGTERM, on_terminate)  # Ray has put its own in its place
        yield {name: float(count) for name, count in ray.cluster_resources().items()}
    finally:
        ray.shutdown()


def _connected(address, cpus, own, hint):
    """The module ray; own, hint: how errors name a cluster of ours, and what else to look at with an address."""
    import ray

    if not address:
        # For its first process Ray waits 30 s, unless this says more; the 30 s for its node are fixed (2.60).
        os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "120")
        # By default its workers have a niceness of 15: beside anything else that computes here they all but stand
        # still, and whoever waits for their images waits for those of this command.
        os.environ.setdefault("RAY_worker_niceness", "0")
    resources = {} if address else {"num_cpus": max(os.cpu_count() or 1, cpus), "include_dashboard": False}
    for left in reversed(range(_STARTS)):
        try:
            # "local": without it Ray joins whatever cluster runs on this machine, such as a server's
            ray.init(address=address or "local", logging_level=logging.ERROR, log_to_driver=False, **resources)
            break
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            where = f"the Ray cluster at {address}" if address else own
            hint = f"; check the address, and {hint}" if address else ""
            raise InputError(f"{where} cannot be used: {str(error).splitlines()[0]}{hint}") from error
        except Exception as error:
            if type(error) is not Exception:  # that is what Ray raises where its processes are not up in its 30 s
                raise
            ray.shutdown()
            reason = str(error).splitlines()[0] if str(error) else "it does not say why"
            if not left:
                text = f"{own} did not start, {_STARTS} times ({reason}); the machine may be too busy: try again later"
                raise SurgeryError(text) from error
            print(f"surgery: {own} did not start ({reason}); once more", file=sys.stderr, flush=True)
    return ray
