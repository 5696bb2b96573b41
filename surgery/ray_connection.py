"""Ray: connected to where a cluster runs, or started on this machine."""

import os

from surgery.errors import InputError


def connect_to_ray(address, cpus, own, hint):
    """The module ray, connected to the cluster at `address`, or where that is None to one that is started here.

    cpus: that the latter has at least. own, hint: how errors name that one, and what else to look at where an address
    cannot be used. Raises InputError where there is no connection.
    """
    import ray

    resources = {} if address else {"num_cpus": max(os.cpu_count() or 1, cpus), "include_dashboard": False}
    try:
        # "local": without it Ray joins whatever cluster runs on this machine, such as a server's
        ray.init(address=address or "local", logging_level="ERROR", log_to_driver=False, **resources)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = f"the Ray cluster at {address}" if address else own
        hint = f"; check the address, and {hint}" if address else ""
        raise InputError(f"{where} cannot be used: {str(error).splitlines()[0]}{hint}") from error
    return ray
