"""`surgery serve`: a model behind HTTP, until it is told to stop."""

import os
import signal
import sys
import threading
from argparse import Namespace
from contextlib import redirect_stdout
from pathlib import Path

from surgery.errors import InputError

from .given import fields_of, running
from .show import print_json

_LOOK = 1.0  # seconds between two looks at the replicas


def run_serve(arguments: Namespace) -> int:
    """Start the server, say when it is ready, serve until SIGTERM or SIGINT, finish what was accepted."""
    from surgery.export.serve.access import Access, read_keys
    from surgery.export.serve.checking import Limits, ServerConfig, check_seconds, checked_models
    from surgery.export.serve.serving import server

    check_seconds("drain", arguments.drain, zero=True)
    config = fields_of(ServerConfig, arguments)
    limits = fields_of(Limits, arguments, hosts=tuple(arguments.allow_host))
    chosen = {name: getattr(arguments, name) for name in ("device", "dtype", "threads")} | running(arguments)
    if chosen["engine"] == "none":
        chosen["engine"] = None
    for name in ("trust_engines", "fallback"):
        if chosen[name] and chosen["engine"] is None:
            raise InputError(f"--{name.replace('_', '-')} goes with --engine auto or a key")
    access = Access(
        keys=read_keys(arguments.api_key_file) if arguments.api_key_file else (),
        admins=read_keys(arguments.admin_key_file, "--admin-key-file") if arguments.admin_key_file else (),
        origins=tuple(arguments.cors_origin),
        proxies=tuple(arguments.trust_proxy),
        log=arguments.access_log and str(Path(arguments.access_log).absolute()),
        log_prompts=arguments.log_prompts,
    )
    names = arguments.served_model_name
    loras = arguments.lora
    serving = checked_models(
        arguments.models, arguments.revision, config, limits, chosen, access, names, loras, arguments.otel
    )
    if not access.keys and config.host not in ("127.0.0.1", "::1", "localhost"):
        text = "whoever reaches the port may use it: there is no authentication; give --api-key-file"
        print(f"surgery serve: listening on {config.host}: {text}", file=sys.stderr)
    out = sys.stdout
    # Ray prints there what its processes die of; standard output has one line, or one JSON object, that others read.
    with redirect_stdout(sys.stderr), server(serving) as up:
        signals = _Signals(up)
        with redirect_stdout(out):
            _announce(arguments.json, up, serving)
        _watch(up, signals)
        left = up.drain(arguments.drain)
        if signals.second.is_set():
            print("surgery serve: stopped at once; what was accepted is lost", file=sys.stderr)
            return 1
        if left:
            print(f"surgery serve: {left} requests were not done in {arguments.drain:g} s", file=sys.stderr)
    return 1 if left else 0


class _Signals:
    """SIGTERM and SIGINT: the first asks to finish, the second not to wait. SIGHUP: to load the models anew.

    SIGHUP for a terminal that is gone is as SIGTERM, unless it was ignored before, as by nohup.
    """

    def __init__(self, up):
        self.first, self.second = threading.Event(), threading.Event()
        self._up = up
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._received)
        if hangup := getattr(signal, "SIGHUP", None):  # which Windows has not
            self._ends_with_terminal = _has_terminal() and signal.getsignal(hangup) != signal.SIG_IGN
            signal.signal(hangup, self._hung_up)

    def _hung_up(self, number, frame):
        if self._ends_with_terminal and not _has_terminal():
            self._received(number, frame)
        else:
            self._up.ask_to_reload()

    def _received(self, _number, _frame):
        if self.first.is_set():
            self._up.hurried = True
            self.second.set()
        self.first.set()


def _has_terminal():
    try:
        os.close(os.open(os.ctermid(), os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _announce(as_json, up, serving):
    config = up.config
    if as_json:
        served = serving.served
        told = {"url": config.url, "model": served.names()[0], "artifact_hash": served.artifact_hash}
        told |= {"models": [name for one in serving.models() for name in one.served.names()]}
        print_json({"schema_version": 1, **told, "replicas": config.replicas, "limits": serving.limits})
    else:
        for served in (one.served for one in serving.models()):
            replicas = f"{config.replicas} replica{'s' if config.replicas > 1 else ''}"
            name = served.names()[0]
            named = f"{name} {served.artifact_hash[:12]}" if served.artifact_hash else name
            kind = "videos" if served.is_video else "images"
            print(f"{config.url}/v1/{kind}/generations: {named}, {replicas}")
    sys.stdout.flush()


def _watch(up, signals):
    """Until the first signal, say on standard error when replicas go down or come up."""
    meant = before = up.replicas()
    while not signals.first.wait(_LOOK):
        now = up.replicas()
        if now != before:
            print(f"surgery serve: {now} of {meant} replicas are up", file=sys.stderr, flush=True)
        before = now
