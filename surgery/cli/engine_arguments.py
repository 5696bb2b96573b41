"""The arguments of compiled engines and of the server, which arguments.py lists with the others."""

from argparse import ArgumentParser, ArgumentTypeError

from surgery.machine import DTYPES, SHORT_NAMES


def running_arguments(
    parser: ArgumentParser,
    engine: str = "auto, or keys of compiled engines; eager unless given",
    compiled: str = "torch.compile the denoiser in this process",
) -> None:
    """How a pipeline is run."""
    parser.add_argument("--engine", metavar="KEY", help=engine)
    parser.add_argument("--trust-engines", action="store_true", help="run engines that others built: they are code")
    parser.add_argument("--fallback", action="store_true", help="with --engine: eager, with a warning, where none fits")
    parser.add_argument("--compile", choices=("regional", "full", "max-autotune"), help=compiled)


def export_arguments(parser: ArgumentParser) -> None:
    """Of `surgery export`."""
    parser.add_argument("folder", metavar="DIR", help="an artifact, as `surgery apply` writes it")
    targets = ("inductor", "tensorrt", "onnx", "zerogpu")
    spaces = "the compiler; zerogpu: packages of blocks, as Spaces on ZeroGPU load them, by inductor into --out"
    parser.add_argument("--target", required=True, choices=targets, help=spaces)
    parser.add_argument(
        "--out", metavar="FOLDER", help="with zerogpu: where to, the content of a repository of its own"
    )
    parser.add_argument(
        "--component",
        nargs="+",
        metavar="NAME",
        help="unet, vae (its decoder), text_encoder ...; the patched denoiser unless given",
    )
    parser.add_argument(
        "--shapes",
        metavar="SHAPES",
        help="IMAGESxHEIGHTxWIDTH in pixels, 1x1024x1024 or 1..4x512..1024x512..1024; several with commas between span "
        "a range, tuned for the first; 1 to 4 images of the model's own size unless given",
    )
    dtype_argument(parser)
    parser.add_argument("--device", help="cpu, cuda, cuda:1; the best there is unless given")
    parser.add_argument(
        "--regional", action="store_true", help="inductor: compile each class of repeated block once, not the whole"
    )
    parser.add_argument(
        "--weights",
        choices=("artifact", "engine"),
        default="artifact",
        help="inductor: take the weights from the artifact, or hold them in the engine (%(default)s)",
    )
    parser.add_argument(
        "--decompose", action="store_true", help="inductor: the attention as plain operations, for use without Python"
    )
    parser.add_argument("--max-autotune", action="store_true", help="inductor: choose kernels by measuring them")
    parser.add_argument("--tolerance", type=float, help="of the largest difference from eager, over its output's RMS")


def dtype_argument(parser: ArgumentParser) -> None:
    """--dtype, by the same words in every verb."""
    short = ", ".join(SHORT_NAMES)
    parser.add_argument(
        "--dtype", type=_dtype, help=f"{', '.join(DTYPES)}, or {short}; float32 on a CPU, else the weights' own"
    )


def _dtype(text):
    name = SHORT_NAMES.get(text, text)
    if name not in DTYPES:
        raise ArgumentTypeError(f"{text!r} is none of {', '.join([*DTYPES, *SHORT_NAMES])}")
    return name


def serve_arguments(parser: ArgumentParser) -> None:
    """Of `surgery serve`."""
    models = "artifacts or pipelines: folders, or Hub repositories; several are told apart by a request's `model`"
    parser.add_argument("models", metavar="MODEL", nargs="+", help=models)
    parser.add_argument("--revision", help="branch, tag or commit of the Hub repository")
    alias = "a name by which requests may call the model, in place of its own; may be given again"
    parser.add_argument("--served-model-name", action="append", default=[], metavar="NAME", help=alias)
    lora = "a LoRA that requests may choose: NAME=FILE, or NAME=OWNER/NAME[/FILE]; may be given again"
    parser.add_argument("--lora", action="append", default=[], metavar="NAME=FILE", help=lora)
    parser.add_argument("--replicas", type=int, default=1, metavar="N", help="copies of each model (%(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on; this machine alone unless given")
    parser.add_argument("--port", type=int, default=8000, help="(%(default)s)")
    names = "a name, beside its address, by which clients call it, * for any; may be given again"
    parser.add_argument("--allow-host", action="append", default=[], metavar="NAME", help=names)
    parser.add_argument("--api-key-file", metavar="PATH", help="keys, one a line, of which a request must have one")
    parser.add_argument("--admin-key-file", metavar="PATH", help="likewise, of which a reload must have one")
    parser.add_argument("--tls-cert", metavar="PATH", help="a certificate (PEM), for https")
    parser.add_argument("--tls-key", metavar="PATH", help="its key")
    origins = "of pages that may call it, https://app.example, * for any; may be given again"
    parser.add_argument("--cors-origin", action="append", default=[], metavar="ORIGIN", help=origins)
    proxies = "an address or network whose X-Forwarded-* is believed; may be given again"
    parser.add_argument("--trust-proxy", action="append", default=[], metavar="ADDRESS", help=proxies)
    parser.add_argument("--access-log", metavar="PATH", help="add a line of JSON for each request to a file")
    parser.add_argument("--log-prompts", action="store_true", help="with the prompts, in traces too")
    otel = "send traces by OpenTelemetry, as OTEL_EXPORTER_OTLP_ENDPOINT says; without this where that is set"
    parser.add_argument("--otel", action="store_true", help=otel)
    parser.add_argument("--strict", action="store_true", help="refuse unknown fields, which are warned of else")
    engine = "auto, none, or a compiled engine's key; none unless given"
    running_arguments(parser, engine, compiled="compile the denoiser at start")
    parser.add_argument("--device", help="cpu, cuda, mps; the best there is unless given")
    dtype_argument(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="of each replica on a CPU; the cores, shared evenly")
    seconds = {"type": float, "metavar": "SECONDS"}
    parser.add_argument("--max-batch", type=int, metavar="N", help="drawn at once: 4 images or 1 video unless given")
    parser.add_argument(
        "--batch-wait", default=0.05, **seconds, help="that an image waits for others of its settings (%(default)s)"
    )
    parser.add_argument(
        "--queue", type=int, default=64, metavar="N", help="requests accepted and not finished; then 429 (%(default)s)"
    )
    parser.add_argument("--timeout", default=300.0, **seconds, help="for a request; then 504 (%(default)g)")
    parser.add_argument("--max-images", type=int, default=10, metavar="N", help="that a request may ask (%(default)s)")
    parser.add_argument(
        "--keep-seconds", default=3600.0, **seconds, help="that an image answered as a url is kept (%(default)g)"
    )
    parser.add_argument(
        "--keep-bytes", type=int, default=1 << 28, metavar="N", help="of such images, the oldest go first (%(default)s)"
    )
    parser.add_argument("--max-pixels", type=int, metavar="N", help="of an image; twice the model's own unless given")
    parser.add_argument("--max-frames", type=int, metavar="N", help="of a video; twice the model's own unless given")
    parser.add_argument("--drain", default=60.0, **seconds, help="to finish what was accepted when ended (%(default)g)")
    parser.add_argument("--start-timeout", default=1800.0, **seconds, help="for all replicas to be up (%(default)g)")
    parser.add_argument("--address", help="of a running Ray cluster: auto, ray://host:10001; one here unless given")
