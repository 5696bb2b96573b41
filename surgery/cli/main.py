"""The parser of all verbs, and what becomes of an error: one message, an honest exit status, a traceback on --debug."""

import argparse
import gc
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Iterable
from importlib import import_module

from surgery.console import quiet_notices
from surgery.errors import SurgeryError
from surgery.machine import collect_seldom, share_the_cpu

from . import light
from .arguments import ARGUMENTS

# title -> {verb: (the module that has it, which is imported only when it is called; one line)}
GROUPS = {
    "make": {
        "new": ("recipes", "a recipe for a model, with every key explained, to start from"),
        "plan": ("look", "what apply would do: modules, weights, sizes; writes nothing, needs config files only"),
        "apply": ("apply", "carry out a recipe: write the patched pipeline as an artifact"),
        "sweep": ("score", "scores over any settings of a recipe, beside the base: tables and plots"),
    },
    "draw": {
        "generate": ("generate", "images; of an artifact, base and patched side by side"),
        "studio": ("studio", "a page to play on: base beside patched, sliders, guidance, attention maps, blind votes"),
        "attention-maps": ("draw", "maps of attention to each word: dense, sparse and the model's own, as a PNG"),
        "invert": ("draw", "images to noise by DDIM inversion and back, by each operator: scores, and a PNG"),
    },
    "measure": {
        "validate": ("score", "scores of an artifact beside its untouched base, with intervals and a report"),
        "study": ("study", "a blind page of base and patched images, of one model or several, and what its votes say"),
        "time": ("time", "seconds an image and peak memory, base beside operators, eager and compiled, in one run"),
        "diagnose": ("look", "what sparse attention does while a model draws, by layer and step"),
        "reproduce": ("reproduce", "a table or figure of the papers, drawn again, with their figures beside"),
    },
    "hand on": {
        "export": ("export", "compiled engines of an artifact, each checked against eager before it is kept"),
        "serve": ("serve", "a model behind HTTP, with OpenAI's routes, on Ray Serve"),
        "push": ("apply", "publish an artifact on the Hub: one commit, weights by reference, a card"),
        "verify": ("look", "whether a model is what it says: weights the base's, code a release's, scores its own"),
    },
    "look up": {
        "recipes": ("recipes", "the recipes that ship, or the text of one"),
        "schema": ("recipes", "the JSON schema of a recipe, for editors"),
        "inspect": ("look", "a model's attention modules, and whether surgery fits it"),
        "doctor": ("doctor", "what this machine can run"),
    },
}
VERBS = {verb: entry for group in GROUPS.values() for verb, entry in group.items()}
_SHORT = {"--out": "-o", "--seed": "-s", "--device": "-d", "--limit": "-n", "--images": "-n", "--force": "-f"}
_SHORT |= {"--set": "-S", "--verbose": "-v"}


class _Parser(argparse.ArgumentParser):
    """A parser whose common options have a letter too, the same in every verb."""

    def add_argument(self, *names, **settings):
        letter = _SHORT.get(names[0]) if names else None
        if letter == "-n" and settings.get("type") is not int:  # --images of `reproduce` is a file
            letter = None
        return super().add_argument(*([letter] if letter else []), *names, **settings)


class _Overview(_Parser):
    """The parser of all verbs, whose help has them in groups."""

    def format_help(self) -> str:
        lines, width = ["usage: surgery VERB ...", "", self.description or ""], shutil.get_terminal_size().columns - 2
        for title, verbs in GROUPS.items():
            lines += ["", f"{title}:"]
            for verb, (_, line) in verbs.items():
                lines += textwrap.wrap(line, width, initial_indent=f"  {verb:<15} ", subsequent_indent=" " * 18)
        lines += ["", "`surgery VERB --help` has a verb's options; `surgery --version` the version;"]
        return "\n".join([*lines, "`surgery --print-completion bash` (zsh, tcsh) what completes them in a shell.", ""])


def build_parser() -> argparse.ArgumentParser:
    """The argparse parser of the command."""
    parser = _Overview(prog="surgery", description="Training-free surgery on diffusion pipelines.")
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.add_argument("--print-completion", choices=("bash", "zsh", "tcsh"), help="print a shell's completion script")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=_Parser)
    for verb, (_, line) in VERBS.items():
        sub = verbs.add_parser(verb, help=line, description=line[0].upper() + line[1:] + ".")
        ARGUMENTS[verb](sub)
        sub.add_argument("--json", action="store_true", help="print JSON on standard output, and nothing else there")
        sub.add_argument("--debug", action="store_true", help="show a traceback when something fails")
    return parser


def _without_verb(parser, arguments) -> int:
    """What `surgery` does that is given no verb."""
    if arguments.version:
        import surgery

        print(f"surgery {surgery.__version__}")
    elif arguments.print_completion:
        import shtab

        print(shtab.complete(parser, arguments.print_completion))
    else:
        print(parser.format_help(), end="")
    return 0


def _check_is_there(arguments):
    """Refuse a recipe, or a folder, that is not there: before what takes seconds to import."""
    model = None if arguments.verb == "studio" else getattr(arguments, "model", None)
    recipe = model if str(model).endswith((".yaml", ".yml")) else getattr(arguments, "recipe", None)
    if recipe:
        from surgery.recipe.reading import find_recipe

        find_recipe(recipe)
    elif model:
        from surgery.hub.base import local_folder

        local_folder(model)


def main(argv: Iterable | None = None) -> int:
    """Run the command; returns its exit status."""
    is_own_process = argv is None
    argv = sys.argv[1:] if argv is None else [str(argument) for argument in argv]
    try:
        parser = build_parser()
        arguments = parser.parse_args(argv)
    except SystemExit as stop:
        if stop.code and "--json" in argv:
            print('{"schema_version": 1, "error": "the command line is wrong; see standard error", "problems": []}')
        raise
    if arguments.verb is None:
        return _without_verb(parser, arguments)
    quiet_notices()
    share_the_cpu()
    collect_seldom()
    # a prompt or a path may hold what is no Unicode
    sys.stdout.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    # A terminated run unwinds like an interrupted one, so that it leaves nothing half-done.
    signal.signal(signal.SIGTERM, _terminate)
    try:
        _check_is_there(arguments)
        if is_own_process:
            light.begin(arguments)
        module = import_module(f"surgery.cli.{VERBS[arguments.verb][0]}")
        status = getattr(module, f"run_{arguments.verb.replace('-', '_')}")(arguments)
        sys.stdout.flush()
    except SurgeryError as error:
        light.again(error)
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
        light.again(error)
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
