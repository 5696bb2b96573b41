"""Make the pipeline of this folder from nothing: python recipes/shapes/train.py --out DIR [--workers 2 | --device cuda]

Draws captioned scenes of coloured shapes, trains autoencoder, text encoder and UNet on them, and writes DIR/pipeline.
A stage whose result is in DIR is not run again, and one that was interrupted goes on from its last checkpoint, so that
the same command continues. With --exchanged the captions are noisy, as those of pictures on the web are: that share of
the scenes has a caption that is another's; with --start a trained pipeline is trained on, on the latents of its own
autoencoder.
"""

import argparse
import platform
import sys
from dataclasses import asdict, replace
from pathlib import Path

from training.loop import Training
from training.scenes import Scenes
from training.workers import run_workers

from surgery.artifact.manifest import write_json

SCENES = 60_000
SEED = 1  # of the scenes
STAGES = {  # in their order
    "text": Training(samples=19_200, rate=1e-3, seed=2),
    "autoencoder": Training(samples=51_200, rate=2e-3, batch=32, decay=0.5, average=0.995, seed=3),
    "latents": None,
    "denoiser": Training(samples=230_400, rate=1e-3, decay=0.25, seed=4),
}
_WITH_START = ("latents", "denoiser")  # the stages that are left when a trained pipeline is trained on


def main():
    """Run the stages that are left, then write the pipeline."""
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    stages = [stage for stage in STAGES if stage in options.stages]
    for stage in stages:
        if (options.out / f"{stage}.json").exists():
            print(f"{stage}: done before")
            continue
        run_workers(_run_stage, options.workers, options.device, stage, options)
    if all((options.out / f"{stage}.json").exists() for stage in _all_stages(options)):
        from training.packing import is_packed, pack

        if not is_packed(options.out, _all_stages(options)):
            pack(options.out, _all_stages(options), Scenes(options.scenes, SEED))
        print(f"pipeline: {options.out / 'pipeline'}")


def _run_stage(workers, stage, options):
    from training import autoencoder, denoiser, text
    from training.tokenizer import shapes_tokenizer

    folder, training, scenes = options.out, STAGES[stage], Scenes(options.scenes, SEED)
    if training and options.samples.get(stage):
        training = replace(training, samples=options.samples[stage])
    seconds = None
    if stage == "text":
        seconds = text.train_text_encoder(workers, scenes, shapes_tokenizer(), training, folder)
    elif stage == "autoencoder":
        seconds = autoencoder.train_autoencoder(workers, scenes, training, folder)
    elif stage == "latents":
        autoencoder.write_latents(workers, scenes, folder, options.start)
    elif stage == "denoiser":
        noise = {"exchanged": options.exchanged, "start": options.start}
        seconds = denoiser.train_denoiser(workers, scenes, shapes_tokenizer(), training, folder, **noise)
    workers.wait()
    if workers.is_first:
        facts = {"workers": workers.count, "device": options.device, "machine": platform.machine()}
        if training:
            facts |= {**asdict(training), "seconds": round(seconds)}
        if stage == "denoiser":
            facts["exchanged"] = options.exchanged
        write_json(folder / f"{stage}.json", facts)


def _all_stages(options):
    return _WITH_START if options.start else tuple(STAGES)


def _options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where checkpoints and pipeline go")
    parser.add_argument("--workers", type=int, default=1, help="processes that share each batch, on a CPU one a core")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--samples", type=_samples, nargs="+", default=[], metavar="STAGE=N", help="train a stage on N samples instead"
    )
    parser.add_argument("--scenes", type=int, default=SCENES, metavar="N", help="how many are drawn (%(default)s)")
    parser.add_argument("--exchanged", type=float, default=0.0, metavar="SHARE", help="share of exchanged captions")
    parser.add_argument("--start", type=Path, metavar="PIPELINE", help="train this pipeline's UNet on")
    parser.add_argument("--stages", nargs="+", choices=STAGES, metavar="STAGE", help=f"only these: {', '.join(STAGES)}")
    options = parser.parse_args()
    options.samples = dict(options.samples)
    options.stages = options.stages or _all_stages(options)
    if options.workers > 1 and options.device != "cpu":
        parser.error("--workers is for a CPU; one process keeps a GPU busy with a model of this size")
    if any(stage not in STAGES or not STAGES[stage] for stage in options.samples):
        parser.error(f"--samples is for {', '.join(stage for stage in STAGES if STAGES[stage])}")
    if not 0 <= options.exchanged <= 1:
        parser.error("--exchanged is a share from 0 to 1")
    if options.start and not (options.start / "unet").is_dir():
        parser.error(f"--start {options.start}: no folder of a pipeline (it has no unet folder)")
    return options


def _samples(text):
    stage, _, count = text.partition("=")
    return stage, int(count)


if __name__ == "__main__":
    sys.exit(main())
