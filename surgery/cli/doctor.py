"""`surgery doctor`: what this machine can run."""

from surgery.doctor import diagnose

from .show import print_json, size, table


def run(arguments):
    """Print versions, devices, compiler and Hub access."""
    found = diagnose()
    if arguments.json:
        print_json(found)
        return
    system = found["system"]
    print(
        f"{system['platform']}, Python {system['python']}, {system['cpu_count']} CPUs, {size(system['memory_bytes'])}"
    )
    packages = [[n, p["version"] or "not installed", p["for"]] for n, p in found["packages"].items()]
    table("packages", ["package", "version", "for"], packages)
    devices = [[d["name"], d["description"], size(d["memory_bytes"])] for d in found["devices"]]
    table("devices", ["device", "what", "memory"], devices)
    compiler, hub = found["compiler"], found["hub"]
    headers = "" if compiler["python_headers"] else ", but Python's headers are missing (Debian: python3-dev)"
    torch_compile = f"{compiler['cxx']}{headers}" if compiler["cxx"] else "none found (Debian: g++)"
    rows = [
        ["C++ compiler, for the CPU attention kernel and torch.compile", torch_compile],
        ["Hub login", "yes" if hub["logged_in"] else "no; `hf auth login` for gated models and publishing"],
        ["Hub offline mode", "on (HF_HUB_OFFLINE)" if hub["offline"] else "off"],
        ["Hub cache", hub["cache"]],
        ["free disk here", size(found["out"]["free_bytes"])],
    ]
    table("surroundings", None, rows)
    rows = [
        [backend, f"not here: {reason}" if reason else "builds and runs"]
        for backend, reason in found["engines"].items()
    ]
    table("compiled engines", None, rows)
