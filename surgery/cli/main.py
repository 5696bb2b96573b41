"""The parser of all verbs, and what becomes of an error: one message, an honest exit status, a traceback on --debug."""

import argparse
import gc
import os
import signal
import sys
from collections.abc import Iterable
from importlib import import_module

from surgery.console import quiet_notices
from surgery.errors import SurgeryError

from .arguments import ARGUMENTS

# verb -> (the module that has it, which is imported only when it is called; one line)
VERBS = {
    "apply": ("apply", "carry out a recipe: write the patched pipeline as an artifact"),
    "plan": ("look", "what apply would do: modules, weights, sizes; writes nothing, needs config files only"),
    "inspect": ("look", "a model's attention modules, and whether surgery fits it"),
    "generate": ("draw", "images; of an artifact, base and patched side by side"),
    "validate": ("score", "scores of an artifact beside its untouched base, with intervals and a report"),
    "sweep": ("score", "a grid of alpha, scale, temperature and layers: plots, and what pays for what"),
    "attention-maps": ("draw", "per-word cross-attention maps: dense, sparse and the model's own, as a PNG"),
    "diagnose": (
        "look",
        "what sparse attention does while a model draws, by layer and step: support, norms, energies",
    ),
    "invert": ("draw", "images to noise by DDIM inversion and back, by each operator: scores, and a PNG"),
    "time": ("time", "seconds an image and peak memory, base beside operators, eager and compiled, in one run"),
    "reproduce": ("reproduce", "a table or figure of the papers, drawn again, with their figures beside"),
    "study": ("study", "a blind page of base and patched images, of one model or several, and what its votes say"),
    "export": ("export", "compiled engines of an artifact, each checked against eager before it is kept"),
    "serve": ("serve", "a model behind HTTP, with OpenAI's routes, on Ray Serve"),
    "push": ("apply", "publish an artifact on the Hub: one commit, weights by reference, a card"),
    "verify": ("look", "whether a model is what it says: weights the base's, code a release's, scores its own"),
    "recipes": ("look", "the recipes that ship"),
    "doctor": ("doctor", "what this machine can run"),
}


def build_parser() -> argparse.ArgumentParser:
    """The argparse parser of the command."""
    parser = argparse.ArgumentParser(
        prog="surgery",
        description="Training-free surgery on diffusers pipelines: PLADIS cross-attention as a loadable artifact.",
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, (_, line) in VERBS.items():
        sub = verbs.add_parser(verb, help=line, description=line[0].upper() + line[1:] + ".")
        ARGUMENTS[verb](sub)
        sub.add_argument("--json", action="store_true", help="print JSON on standard output, and nothing else there")
        sub.add_argument("--debug", action="store_true", help="show a traceback when something fails")
    return parser


def main(argv: Iterable | None = None) -> int:
    """Run the command; returns its exit status."""
    argv = sys.argv[1:] if argv is None else [str(argument) for argument in argv]
    try:
        arguments = build_parser().parse_args(argv)
    except SystemExit as stop:
        if stop.code and "--json" in argv:
            print('{"schema_version": 1, "error": "the command line is wrong; see standard error", "problems": []}')
        raise
    quiet_notices()
    # a prompt or a path may hold what is no Unicode
    sys.stdout.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    # A terminated run unwinds like an interrupted one, so that it leaves nothing half-done.
    signal.signal(signal.SIGTERM, _terminate)
    try:
        module = import_module(f"surgery.cli.{VERBS[arguments.verb][0]}")
        status = getattr(module, f"run_{arguments.verb.replace('-', '_')}")(arguments)
        sys.stdout.flush()
    except SurgeryError as error:
        return _failed(arguments, error, error.exit_code)
    except (KeyboardInterrupt, _Terminated) as stop:
        if arguments.debug:
            raise
        resumes = arguments.verb in ("push", "validate", "sweep", "reproduce") or getattr(arguments, "push", None)
        left = "the same command again finishes what is lacking" if resumes else "nothing half-done was left behind"
        print(f"\ninterrupted; {left}", file=sys.stderr)
        if arguments.json:
            print('{"schema_version": 1, "error": "interrupted", "problems": []}')
        return stop.code if isinstance(stop, _Terminated) else 130  # pyright: ignore[reportReturnType]
    except BrokenPipeError:  # the reader, such as `head`, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a disk that is full, a file that went away
        where = f": {str(error.filename)[:200]}" if error.filename else ""
        return _failed(arguments, error, 1, f"{error.strerror or error}{where}")
    except Exception as error:
        text = f"{type(error).__name__}: {error}\nThis is not an error that surgery knows; --debug shows where it arose"
        return _failed(arguments, error, 1, text)
    finally:
        if "triton" not in sys.modules:  # which prints pages on "leaks" where its objects are not collected
            gc.freeze()  # the interpreter's last collections would take a second over torch's modules
    return status or 0


class _Terminated(SystemExit):
    """Somebody ended the process."""


def _terminate(number, frame):
    raise _Terminated(128 + number)


def _failed(arguments, error, status, text=None):
    if arguments.debug:
        import traceback

        traceback.print_exception(error)
    print(f"surgery {arguments.verb}: {text or error}", file=sys.stderr)
    if arguments.json:
        import json

        problems = [str(problem) for problem in getattr(error, "problems", ())]
        print(json.dumps({"schema_version": 1, "error": str(error), "problems": problems}))
    return status
