"""The kinds that look into a model: |r| over the steps, a word's maps, images to noise and back."""

from pathlib import Path
from typing import Any

from surgery.artifact.manifest import replace_file, write_json
from surgery.errors import InputError

from .results import Measured
from .task import Drawn, Task, artifact_of, save_png


def draw_diagnostics(task: Task) -> Drawn:
    """The lengths of r and of GAG's step by module and denoising step, with their plot."""
    from surgery.analysis.diagnostics import diagnose, picture

    pipeline, sampling = _opened(task)
    found = diagnose(pipeline, task.texts(), sampling=sampling, seed=task.table.seed)
    replace_file(task.folder / "diagnostics.png", picture(found, task.patched.name))
    write_json(task.folder / "diagnostics.json", found.to_json())
    return Drawn(files=_files("diagnostics.png", "diagnostics.json"), facts={"images": len(found.prompts)})


def draw_attention_maps(task: Task) -> Drawn:
    """Each word's map by dense attention, by the sparse map and by the operator."""
    from surgery.analysis.attention_maps import compare_attention, sheet

    pipeline, sampling = _opened(task)
    prompt = task.texts()[0]
    found = compare_attention(pipeline, prompt, seed=task.table.seed, sampling=sampling)
    save_png(sheet(found), task.folder / "maps.png")
    return Drawn(files=_files("maps.png"), facts={"prompt": prompt})


def draw_inversion(task: Task) -> Drawn:
    """Images inverted, and reconstructed by each side; the differences are from dense attention."""
    from surgery.analysis.inversion import PRESETS, captioned_images, invert
    from surgery.analysis.inversion.pictures import sheet

    images, prompts = _scenes(task) if task.given.on else _given_images(task, captioned_images)
    pipeline, sampling = _opened(task)
    sides = {entry.operator or "dense": entry.name for entry in task.entries}
    ((prompts_name, part),) = task.sets.items()
    size = {name: sampling[name] for name in ("height", "width") if sampling.get(name)}
    metrics = [name for name in part.metrics if name in ("ssim", "lpips")]
    found = invert(
        pipeline,
        images,
        prompts,
        checkpoints=task.checkpoints(metrics),
        batch=task.given.drawing.batch or 1,
        **{**PRESETS["gag"], "operators": tuple(sides), "metrics": metrics, **size},
    )
    save_png(sheet(found), task.folder / "inversion.png")
    measured = {
        sides[side]: {
            (prompts_name, metric): Measured(mean.mean, mean.difference, mean.interval, len(found.prompts))
            for metric, mean in made.scores["image"].items()
        }
        for side, made in found.sides.items()
    }
    return Drawn(measured, _files("inversion.png"), facts={"images": len(found.prompts), **found.settings})


def _opened(task: Task) -> tuple[Any, dict[str, Any]]:
    """(the patched pipeline of the table's operator, its sampling) on the device that was chosen."""
    from surgery.runtime.load import open_model

    device = task.given.drawing.device
    pipeline, sampling, _ = open_model(str(artifact_of(task.patched, task.work)), None, device, False)
    return pipeline, sampling


def _given_images(task, captioned_images):
    given = task.given.images
    if given is None:
        raise InputError(
            f"{task.table.place} inverts real images with their captions: give --images FILE.jsonl, a line of "
            '{"file": "x.png", "prompt": "..."} for each'
        )
    images, prompts = captioned_images([], [], given)
    most = min(task.given.limit or len(images), *(part.prompts or len(images) for part in task.sets.values()))
    return images[:most], prompts[:most]


def _scenes(task):
    """(images, captions): scenes as the shapes model was trained on, in place of photographs."""
    import numpy
    from PIL import Image

    from surgery.recipes.shapes.scenes.scenes import captions, render, sample_scene

    random = numpy.random.default_rng(task.table.seed)
    ((_, part),) = task.sets.items()
    images, texts = [], []
    while len(images) < min(part.prompts or 1, task.given.limit or part.prompts or 1):
        scene = sample_scene(random)
        if said := captions(scene):
            images.append(Image.fromarray(render(scene.objects, scene.background)))
            texts.append(said[0])
    return images, texts


def _files(*names: str) -> dict[str, Path]:
    return {Path(name).stem if name.endswith(".png") else name: Path(name) for name in names}
