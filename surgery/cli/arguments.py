"""The arguments of every verb. Nothing of what the verbs do is imported here, so that --help is quick."""

from surgery.recipe.metric_names import METRIC_NAMES

from .drawing_arguments import (
    attention_maps_arguments,
    checkpoint_argument,
    generate_arguments,
    invert_arguments,
    sampling_arguments,
    studio_arguments,
)
from .engine_arguments import dtype_argument, export_arguments, serve_arguments


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


def _plan_arguments(parser):
    _recipe_arguments(parser)
    parser.add_argument("--verbose", action="store_true", help="a row for each module")


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
    parser.add_argument(
        "--no-validate", action="store_true", help="leave out the scoring that the recipe asks for under `validate`"
    )
    parser.add_argument(
        "--no-export", action="store_true", help="leave out the engines that the recipe asks for under `export`"
    )


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
    parser.add_argument(
        "--allow-regression",
        action="store_true",
        help=f"{when}publish although it scores significantly worse than its base; the card says so at its top",
    )
    parser.add_argument(
        "--no-handler",
        action="store_true",
        help=f"{when}without handler.py and requirements.txt, by which it runs on Hugging Face Inference Endpoints",
    )
    space = f"{when}a Gradio Space with the page of `surgery studio` on it, of the same name unless given"
    parser.add_argument("--space", nargs="?", const="", metavar="OWNER/NAME", help=space)
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
    parser.add_argument("--verbose", action="store_true", help="a row for each module")


def _validate_arguments(parser):
    parser.add_argument("model", metavar="DIR", help="an artifact, as `surgery apply` writes it, or a Hub repository")
    parser.add_argument("--revision", help="branch, tag or commit of the Hub repository")
    _scoring_arguments(parser, "the recipe's unless given")
    _sample_arguments(parser)
    parser.add_argument("--out", metavar="FOLDER", help="images, values and report; DIR-validation unless given")
    parser.add_argument(
        "--videos",
        metavar="FOLDER",
        help="of videos: both sides as mp4, named as VBench and FVD's tools ask",
    )
    _drawing_arguments(parser)


def _sample_arguments(parser):
    parser.add_argument("--images-per-prompt", type=int, metavar="N", help="the recipe's unless given")
    parser.add_argument("--reference", metavar="PATH", help="for fid and kid: a folder of real images, or an .npz")


def _scoring_arguments(parser, otherwise):
    parser.add_argument(
        "--prompts",
        metavar="SET",
        help=f"drawbench, hpd, pick-a-pic, coco, geneval, geneval2, dpg-bench, shapes, empty, or a file; {otherwise}",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="so many of the prompts, evenly spaced")
    parser.add_argument("--seed", type=int, help="what the images' seeds are drawn from")
    parser.add_argument("--metrics", nargs="+", metavar="METRIC", help=f"{', '.join(METRIC_NAMES)}; {otherwise}")
    checkpoint_argument(parser)


def _drawing_arguments(parser):
    parser.add_argument("--batch", type=int, metavar="N", help="images drawn at once; chosen by memory unless given")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="draw on so many Ray workers (%(default)s)")
    parser.add_argument("--address", help="of a running Ray cluster, such as ray://host:10001; one here unless given")
    parser.add_argument("--device", help="cpu, cuda, mps; the best there is unless given")
    dtype_argument(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="threads of each worker on a CPU; 1 unless given")


def _sweep_arguments(parser):
    _recipe_arguments(parser)
    for axis, kind in (("alpha", float), ("scale", float), ("temperature", float), ("layers", str)):
        text = "down, mid, up, all, or patterns with commas between; " if axis == "layers" else ""
        parser.add_argument(
            f"--{axis}", nargs="+", type=kind, default=[], metavar="VALUE", help=f"{text}the recipe's unless given"
        )
    parser.add_argument(
        "--axis",
        dest="axes",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="any other: a hyperparameter (zeta, eta), unit, operator, guidance, guidance_scale, steps, or a recipe's "
        "key (sampling.height), its values as YAML writes them: --axis zeta=0,1; may be given more than once",
    )
    _scoring_arguments(parser, "the recipe's unless given")
    _sample_arguments(parser)
    parser.add_argument("--out", metavar="FOLDER", help="images and report; out/<recipe's name>-sweep unless given")
    _drawing_arguments(parser)


def _diagnose_arguments(parser):
    parser.add_argument("model", metavar="MODEL", help="an artifact or pipeline: a folder, or a Hub repository")
    parser.add_argument("--prompts", required=True, metavar="SET", help="a prompt set, or a file; an image of each")
    parser.add_argument("--limit", type=int, default=8, metavar="N", help="so many, evenly spaced (%(default)s)")
    parser.add_argument("--category", help="of the prompts only those of this category")
    parser.add_argument("--words", action="store_true", help="the weight of each word too: for prompts of one form")
    parser.add_argument("--base", action="store_true", help="draw by dense attention, and measure the maps on that")
    parser.add_argument("--alpha", type=float, help="of the sparse map that is measured; the model's own unless given")
    parser.add_argument("--layers", nargs="+", metavar="SELECTOR", help="down, mid, up, or patterns; all unless given")
    parser.add_argument("--revision", help="branch, tag or commit of the Hub repository")
    parser.add_argument(
        "--out", default="out/diagnostics", metavar="FOLDER", help="gets diagnostics.png and .json (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first image; the next ones count up (%(default)s)")
    sampling_arguments(parser)
    parser.add_argument("--verify", action="store_true", help="check the sha256 of the weights too")


def _time_arguments(parser):
    parser.add_argument(
        "model", metavar="RECIPE|DIR", help="a recipe, an artifact or pipeline in a folder, or a Hub repository"
    )
    parser.add_argument("--revision", help="branch, tag or commit of the Hub repository")
    parser.add_argument(
        "--operators",
        metavar="NAMES",
        help="with commas between, pladis,pladis:alpha=2,gag; the model's own unless given",
    )
    parser.add_argument("--prompts", metavar="SET", help="a set's name or a file, in turn; one prompt unless given")
    parser.add_argument("--limit", type=int, default=5, metavar="N", help="rounds of each side (%(default)s)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images at once (%(default)s)")
    sampling_arguments(parser)
    parser.add_argument("--num-frames", type=int, help="of a video; the recipe's unless given")
    dtype_argument(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="of a CPU; torch's own choice unless given")
    parser.add_argument(
        "--compile",
        nargs="?",
        const="regional",
        choices=("regional", "full", "max-autotune"),
        help="also with torch.compile, regional unless said otherwise",
    )
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory, on a CPU a process each")


def _study_arguments(parser):
    parser.add_argument(
        "folders",
        nargs="+",
        metavar="DIR",
        help="artifacts that were validated, folders of reports, or of sweeps; those of one base are compared at once, "
        "those of several are pooled",
    )
    parser.add_argument("--sides", metavar="NAMES", help="of a sweep those to show, two or three with commas between")
    parser.add_argument("--pairwise", action="store_true", help="show two sides at a time, not all at once")
    parser.add_argument("--pairs", type=int, default=50, metavar="N", help="how often images are shown (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="what the choice, the order and the sides are drawn from")
    parser.add_argument("--title", default="Which image is better?", help="the page's heading")
    parser.add_argument("--out", metavar="FILE", help="the page; study.html beside the report unless given")
    parser.add_argument("--votes", nargs="+", metavar="FILE", help="analyse these votes instead of writing a page")


def _reproduce_arguments(parser):
    parser.add_argument("table", nargs="?", metavar="TABLE", help="pladis-table-2, gag-figure-4, ...; all unless given")
    parser.add_argument("--plan", "--dry-run", action="store_true", help="say what it takes, and draw nothing")
    parser.add_argument("--limit", type=int, metavar="N", help="so many prompts of each set; the paper's unless given")
    parser.add_argument("--on", choices=("shapes",), help="the model that ships, in place of the paper's")
    parser.add_argument("--reference", metavar="PATH", help="for fid: a folder of real images, or an .npz")
    parser.add_argument("--prompts", metavar="FILE", help="in place of the table's own, such as VBench's")
    parser.add_argument("--images", metavar="FILE", help="a .jsonl of {file, prompt}: what gag-table-7 inverts")
    parser.add_argument("--out", metavar="FOLDER", help="images and tables, shared by all; out/papers unless given")
    checkpoint_argument(parser)
    _drawing_arguments(parser)


def _recipes_arguments(parser):
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this one as it ships; unless given list all")
    parser.add_argument("--out", metavar="FILE", help="copy it there instead, to change it")


def _new_arguments(parser):
    parser.add_argument("model", metavar="MODEL", help="a pipeline folder, or a Hub repository")
    parser.add_argument("--revision", help="branch, tag or commit of the Hub repository, whose commit is written down")
    parser.add_argument("--operator", default="pladis", help="pladis, gag, sparse or an anderson (%(default)s)")
    parser.add_argument("--out", metavar="FILE", help="the recipe to write; NAME.yaml unless given, - to print it")


ARGUMENTS = {
    "apply": _apply_arguments,
    "plan": _plan_arguments,
    "inspect": _inspect_arguments,
    "generate": generate_arguments,
    "studio": studio_arguments,
    "push": _push_arguments,
    "verify": _verify_arguments,
    "validate": _validate_arguments,
    "sweep": _sweep_arguments,
    "attention-maps": attention_maps_arguments,
    "diagnose": _diagnose_arguments,
    "invert": invert_arguments,
    "export": export_arguments,
    "serve": serve_arguments,
    "reproduce": _reproduce_arguments,
    "study": _study_arguments,
    "time": _time_arguments,
    "recipes": _recipes_arguments,
    "new": _new_arguments,
    "schema": lambda parser: parser.add_argument("--out", metavar="FILE", help="write it there; printed unless given"),
    "doctor": lambda parser: None,
}
