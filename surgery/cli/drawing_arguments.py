"""The arguments of the verbs that draw pictures, which arguments.py lists with the others."""

from argparse import ArgumentParser, ArgumentTypeError

from surgery.recipe.metric_names import FIDELITY_METRICS

from .engine_arguments import dtype_argument, running_arguments


def _prompt(text):
    """A prompt of the command line; argparse reports what can be none."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ArgumentTypeError("a prompt must be UTF-8 text") from None
    if len(text) > 10_000:
        raise ArgumentTypeError(f"{len(text):,} characters are too long for a prompt (at most 10,000)")
    return text


def _force_argument(parser):
    parser.add_argument("--force", action="store_true", help="replace the file that --out names")


def sampling_arguments(parser: ArgumentParser) -> None:
    """How images are sampled."""
    parser.add_argument("--steps", type=int, help="sampling steps; the recipe's unless given")
    parser.add_argument("--guidance-scale", type=float, help="classifier-free guidance; the recipe's unless given")
    parser.add_argument("--height", type=int, help="pixels")
    parser.add_argument("--width", type=int, help="pixels")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; the best there is unless given")


def checkpoint_argument(parser: ArgumentParser) -> None:
    """Where metrics' checkpoints lie."""
    parser.add_argument(
        "--checkpoint",
        dest="checkpoints",
        action="append",
        default=[],
        metavar="METRIC.PART=PATH",
        help="take a metric's checkpoint from this machine; may be given more than once",
    )


def generate_arguments(parser: ArgumentParser) -> None:
    """Of `surgery generate`."""
    parser.add_argument("model", metavar="MODEL", help="an artifact or pipeline: a folder, or a Hub repository")
    parser.add_argument("prompts", nargs="+", type=_prompt, metavar="PROMPT", help="one or more prompts")
    parser.add_argument("--revision", help="branch, tag or commit of the Hub repository")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="a PNG, of videos an mp4, WebP or GIF; out/images.png or out/videos.mp4 unless given; each alone in a "
        "folder of that name",
    )
    _force_argument(parser)
    parser.add_argument("--images", type=int, default=2, metavar="N", help="images per prompt (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the first image's seed; the next ones count up")
    sampling_arguments(parser)
    parser.add_argument("--num-frames", type=int, help="of a video; the recipe's unless given")
    parser.add_argument("--fps", type=int, help="frames a second of a video; the recipe's unless given")
    parser.add_argument("--negative-prompt", type=_prompt, metavar="TEXT", help="what the images should lack")
    parser.add_argument(
        "--region",
        action="append",
        default=[],
        metavar="BOX=PROMPT",
        help="a part of the image with a prompt of its own, of a model with the operation regions: "
        "LEFT,TOP,RIGHT,BOTTOM as parts of 1, or a mask's file; repeatable",
    )
    parser.add_argument("--scale", type=float, help="of the patched attention, in place of the artifact's")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=NUMBER", help="any hyperparameter of it; repeatable"
    )
    dtype_argument(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="of a CPU; torch's own choice unless given")
    parser.add_argument("--image", metavar="FILE", help="draw from this image")
    parser.add_argument("--mask", metavar="FILE", help="what of --image is drawn anew: where this image is white")
    parser.add_argument(
        "--strength", type=float, help="how far from --image, above 0 to 1; the pipeline's unless given"
    )
    parser.add_argument("--control-image", metavar="FILE", help="what the ControlNet follows: edges, depth, a pose")
    parser.add_argument("--controlnet", metavar="MODEL", help="a folder or Hub repository; of a pipeline without one")
    parser.add_argument(
        "--argument",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other argument of the pipeline, as controlnet_conditioning_scale=0.5; repeatable",
    )
    parser.add_argument(
        "--guidance", metavar="METHOD", help="apg, seg, ... or '{method: seg, scale: 2.0}', as a recipe's"
    )
    running_arguments(parser)
    parser.add_argument("--verify", action="store_true", help="check the sha256 of the weights too")


def studio_arguments(parser: ArgumentParser) -> None:
    """Of `surgery studio`."""
    model = "a recipe, an artifact or a pipeline: a file, a name, a folder, or a Hub repository"
    parser.add_argument("model", metavar="MODEL", help=model)
    parser.add_argument("--revision", help="branch, tag or commit of the Hub repository")
    out = "for recipes, votes, and the artifact of a recipe (%(default)s)"
    parser.add_argument("--out", metavar="FOLDER", default="out/studio", help=out)
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on; this machine alone unless given")
    parser.add_argument("--port", type=int, help="7860, or the next free one, unless given")
    parser.add_argument("--share", action="store_true", help="through Gradio's tunnel: for anybody with the address")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; the best there is unless given")
    dtype_argument(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="of a CPU; torch's own choice unless given")


def attention_maps_arguments(parser: ArgumentParser) -> None:
    """Of `surgery attention-maps`."""
    parser.add_argument("model", metavar="MODEL", help="an artifact or pipeline: a folder, or a Hub repository")
    parser.add_argument(
        "prompt", type=_prompt, metavar="PROMPT", help="the prompt, a map for each of whose words is drawn"
    )
    parser.add_argument("--revision", help="branch, tag or commit of the Hub repository")
    parser.add_argument("--out", metavar="FILE", help="the PNG to write; out/attention.png unless given")
    _force_argument(parser)
    parser.add_argument("--words", metavar="WORDS", help="words of the prompt with commas between; all unless given")
    parser.add_argument("--special", action="store_true", help="also maps of the start, end and padding tokens")
    parser.add_argument("--layers", nargs="+", metavar="SELECTOR", help="down, mid, up, or patterns; all unless given")
    parser.add_argument(
        "--by",
        choices=("mode", "step", "block"),
        default="mode",
        help="rows: dense, sparse and the model's own attention; or its own alone by step or block (%(default)s)",
    )
    parser.add_argument(
        "--npy",
        action="store_true",
        help="write each mode's maps beside the PNG too: (words, steps, modules, frames, height, width)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the image (%(default)s)")
    sampling_arguments(parser)
    parser.add_argument("--verify", action="store_true", help="check the sha256 of the weights too")


def invert_arguments(parser: ArgumentParser) -> None:
    """Of `surgery invert`."""
    parser.add_argument("model", metavar="MODEL", help="an artifact or pipeline: a folder, or a Hub repository")
    parser.add_argument(
        "images", nargs="*", metavar="IMAGE", help="image files; resized and cropped to the model's size"
    )
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="a caption for all images, or given once for each"
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="captions instead, one for each image; a .jsonl of {file, prompt} names the images too, from its folder",
    )
    parser.add_argument("--revision", help="branch, tag or commit of the Hub repository")
    parser.add_argument("--out", metavar="FILE", help="the PNG to write; out/inversion.png unless given")
    _force_argument(parser)
    parser.add_argument(
        "--preset",
        choices=("gag",),
        help="a paper's choice of sides, steps, guidance, metrics and of what inverts, for all that is not given",
    )
    parser.add_argument(
        "--operators",
        metavar="NAMES",
        help="the sides, with commas between; the model's own operation where it has the operator; "
        "dense,sparse,pladis,gag unless given",
    )
    parser.add_argument(
        "--inverted-by",
        choices=("same", "dense"),
        help="what carries an image to noise: the side's own operator (same), which it is unless given, or dense "
        "attention for all",
    )
    parser.add_argument("--steps", type=int, help="DDIM steps to noise, and as many back; 50 unless given")
    parser.add_argument("--guidance-scale", type=float, help="classifier-free guidance of the way back; 1 unless given")
    parser.add_argument("--height", type=int, help="pixels")
    parser.add_argument("--width", type=int, help="pixels")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; the best there is unless given")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images at once (%(default)s)")
    parser.add_argument(
        "--metrics",
        nargs="+",
        metavar="METRIC",
        help=f"{', '.join(FIDELITY_METRICS)}; ssim and psnr unless given",
    )
    checkpoint_argument(parser)
    parser.add_argument("--verify", action="store_true", help="check the sha256 of the weights too")
