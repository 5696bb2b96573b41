"""`surgery studio`: a page to play with a model on, until it is told to stop."""

import argparse
import sys

from surgery.errors import InputError

from .given import check_threads, dtype_of
from .show import print_json


def run_studio(arguments: argparse.Namespace) -> None:
    """Open the model, say where the page is, serve it until SIGTERM or SIGINT."""
    from surgery.machine import backend_version

    if backend_version("gradio") is None:  # before what takes seconds to import
        raise InputError("the studio needs gradio: pip install 'pladis-surgery[ui]'")
    check_threads(arguments)
    if arguments.port is not None and not 1 <= arguments.port <= 65535:
        raise InputError(f"--port must be 1 to 65535, not {arguments.port}")
    from surgery.studio.opening import recipe_named

    recipe_named(arguments.model)
    from surgery.studio.serving import LOCAL, studio, wait_for_signal

    if arguments.host not in LOCAL or arguments.share:
        where = "through a tunnel of Gradio's" if arguments.share else f"listening on {arguments.host}"
        text = "whoever reaches the page may draw, vote and save recipes: there is no authentication"
        print(f"surgery studio: {where}: {text}", file=sys.stderr)
    if arguments.threads:
        import torch

        torch.set_num_threads(arguments.threads)
    given = {name: getattr(arguments, name) for name in ("host", "port", "share", "revision", "device")}
    with studio(arguments.model, arguments.out, dtype=dtype_of(arguments.dtype), **given) as url:
        if arguments.json:
            print_json({"schema_version": 1, "url": url})
        else:
            print(f"{url}: {arguments.model}; recipes and votes go to {arguments.out}")
        sys.stdout.flush()
        wait_for_signal()
