"""The parser of all verbs, and what becomes of an error: one message, an honest exit status, a traceback on --debug."""

import argparse
import gc
import os
import signal
import sys
from importlib import import_module

from surgery.cli.show import quiet_notices
from surgery.errors import SurgeryError

# verb -> one line; each lives in the module of its name, which is imported only when it is called
VERBS = {
    "apply": "carry out a recipe: write the patched pipeline as an artifact",
    "plan": "what apply would do: modules, weights, sizes; writes nothing, needs config files only",
    "inspect": "a model's attention modules, and whether surgery fits it",
    "generate": "images; of an artifact, base and patched side by side",
    "push": "publish an artifact on the Hub: one commit, weights by reference, a card",
    "verify": "whether a model is what it says: weights the base's, code a release's, scores its own",
    "recipes": "the recipes that ship",
    "doctor": "what this machine can run",
}


def build_parser():
    """The argparse parser of the command."""
    parser = argparse.ArgumentParser(
        prog="surgery",
        description="Training-free surgery on diffusers pipelines: PLADIS cross-attention as a loadable artifact.",
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, line in VERBS.items():
        sub = verbs.add_parser(verb, help=line, description=line[0].upper() + line[1:] + ".")
        _ARGUMENTS[verb](sub)
        sub.add_argument("--json", action="store_true", help="print JSON on standard output, and nothing else there")
        sub.add_argument("--debug", action="store_true", help="show a traceback when something fails")
    return parser


def _recipe_arguments(parser):
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a recipe that ships")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a value of the recipe: --set operations.0.with.scale=1.5; may be given more than once",
    )


def _apply_arguments(parser):
    _recipe_arguments(parser)
    parser.add_argument("--out", metavar="DIR", help="the folder to write; out/<recipe's name> unless given")
    parser.add_argument("--force", action="store_true", help="replace the artifact that is there")
    parser.add_argument("--push", metavar="OWNER/NAME", help="publish it there; see `surgery push`")
    parser.add_argument(
        "--remote",
        action="store_true",
        help="with --push: never fetch the weights; the Hub copies them from the base into the new repository",
    )
    _publishing_arguments(parser, "with --push: ")


def _publishing_arguments(parser, when=""):
    parser.add_argument("--private", action="store_true", help=f"{when}make a new repository private")
    parser.add_argument("--create-pr", action="store_true", help=f"{when}propose it as a pull request")
    parser.add_argument("--revision", metavar="BRANCH", help=f"{when}the branch to commit to; main unless given")
    parser.add_argument("--tag", metavar="NAME", help=f"{when}a tag for the commit, such as v1")
    parser.add_argument(
        "--weights",
        choices=("copy", "thin"),
        default="copy",
        help=f"{when}put the base's weights into the repository, or name them by commit and sha256 alone (%(default)s)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help=f"{when}replace files in the repository that somebody else wrote"
    )
    parser.add_argument("--dry-run", action="store_true", help=f"{when}show what would move, and send nothing")


def _push_arguments(parser):
    parser.add_argument("folder", metavar="DIR", help="an artifact, as `surgery apply` writes it")
    parser.add_argument("--repo", required=True, metavar="OWNER/NAME", help="the repository; made if it is not there")
    _publishing_arguments(parser)


def _verify_arguments(parser):
    parser.add_argument("model", metavar="MODEL", help="an artifact: a folder, or a Hub repository")
    parser.add_argument("--revision", help="branch, tag or commit of the Hub repository")


def _inspect_arguments(parser):
    parser.add_argument("model", metavar="MODEL", help="a pipeline folder, an artifact, or a Hub repository")
    parser.add_argument("--revision", help="branch, tag or commit of the Hub repository")


def _generate_arguments(parser):
    parser.add_argument("model", metavar="MODEL", help="an artifact or pipeline: a folder, or a Hub repository")
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="one or more prompts")
    parser.add_argument("--revision", help="branch, tag or commit of the Hub repository")
    parser.add_argument("--out", default="out/images.png", metavar="FILE", help="the PNG to write (%(default)s)")
    parser.add_argument("--images", type=int, default=2, metavar="N", help="images per prompt (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the first image's seed; the next ones count up")
    parser.add_argument("--steps", type=int, help="sampling steps; the recipe's unless given")
    parser.add_argument("--guidance-scale", type=float, help="classifier-free guidance; the recipe's unless given")
    parser.add_argument("--height", type=int, help="pixels")
    parser.add_argument("--width", type=int, help="pixels")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; the best there is unless given")
    parser.add_argument("--verify", action="store_true", help="check the sha256 of the weights too")


_ARGUMENTS = {
    "apply": _apply_arguments,
    "plan": _recipe_arguments,
    "inspect": _inspect_arguments,
    "generate": _generate_arguments,
    "push": _push_arguments,
    "verify": _verify_arguments,
    "recipes": lambda parser: None,
    "doctor": lambda parser: None,
}


def main(argv=None):
    """Run the command; returns its exit status."""
    argv = sys.argv[1:] if argv is None else [str(argument) for argument in argv]
    try:
        arguments = build_parser().parse_args(argv)
    except SystemExit as stop:
        if stop.code and "--json" in argv:
            print('{"schema_version": 1, "error": "the command line is wrong; see standard error", "problems": []}')
        raise
    quiet_notices()
    # A terminated run unwinds like an interrupted one, so that it leaves nothing half-done.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        status = import_module(f"surgery.cli.{arguments.verb}").run(arguments)
        sys.stdout.flush()
    except SurgeryError as error:
        return _failed(arguments, error, error.exit_code)
    except KeyboardInterrupt:
        if arguments.debug:
            raise
        pushes = arguments.verb == "push" or getattr(arguments, "push", None)
        left = "the same command again finishes what is lacking" if pushes else "nothing half-done was left behind"
        print(f"\ninterrupted; {left}", file=sys.stderr)
        if arguments.json:
            print('{"schema_version": 1, "error": "interrupted", "problems": []}')
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        text = f"{type(error).__name__}: {error}\nThis is not an error that surgery knows; --debug shows where it arose"
        return _failed(arguments, error, 1, text)
    finally:
        if "triton" not in sys.modules:  # which prints pages on "leaks" where its objects are not collected
            gc.freeze()  # the interpreter's last collections would take a second over torch's modules
    return status or 0


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
