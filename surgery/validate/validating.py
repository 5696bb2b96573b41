"""Score an artifact against its untouched base: draw the pairs, measure them, write scores.json and the report."""

from dataclasses import dataclass
from pathlib import Path

from surgery.artifact.manifest import write_json
from surgery.artifact.scores import NAME, Scores

from .drawing import sides_of
from .drawing.store import locked
from .report import write_report
from .scoring import score
from .session import open_session
from .settings import report_folder, work_folder


@dataclass(frozen=True)
class Validation:
    """What a validation came to. folder: of the images and values; report: report.html, with pairs.csv beside it.

    scores_file: scores.json, in the artifact where that is a folder, else beside the report.
    """

    folder: Path
    scores: Scores
    scores_file: Path
    report: Path


def validate(
    model,
    *,
    revision=None,
    prompts=None,
    limit=None,
    images_per_prompt=None,
    seed=None,
    metrics=None,
    reference=None,
    out=None,
    drawing=None,
    checkpoints=None,
    recipe_folder=None,
    announce=None,
):
    """Score an artifact (a folder or a Hub repository) against its base, and return the Validation.

    prompts: a set's name, a file, or a list; what is None is as the artifact's recipe says under `validate`.
    out: the work folder, DIR-validation unless given; a run that was cut short goes on from what it holds.
    drawing: a Drawing. checkpoints: {"metric.part": path} on this machine. recipe_folder: where the recipe's own file
    names start. announce: called with (images there, images to draw, batch) before drawing.
    scores.json goes into the artifact's folder, and beside the report.
    Raises InputError, ArtifactError, SurgeryError; what was drawn and scored by then is kept.
    """
    given = {"prompts": prompts, "limit": limit, "images_per_prompt": images_per_prompt, "seed": seed}
    given |= {"metrics": metrics, "reference": reference}
    session = open_session(
        model,
        None,
        given,
        revision=revision,
        drawing=drawing,
        checkpoints=checkpoints,
        recipe_folder=recipe_folder,
    )
    work = work_folder(model, out)
    base, patched = sides_of(session.manifest, session.folder, session.environment)
    with locked(work):
        images, kept, batch = session.draw(work, (base, patched), announce)
        sides = [(side.key, images[side.name]) for side in (base, patched)]
        all_prompts = session.settings.prompts.prompts
        measured = [(scorer.info, *score(scorer, work, *sides, kept, all_prompts)) for scorer in session.scorers]
        scores = Scores(**session.facts(kept, batch), metrics=[metric for _, metric, _ in measured])
        # A work folder may be shared by artifacts of one base, so each has its report in a folder of its own.
        reports = report_folder(work, session.manifest.hash)
        report = write_report(reports, session.manifest, scores, kept, all_prompts, images, measured)
        written = [reports / NAME, *([session.home / NAME] if session.home else [])]
        for path in written:
            write_json(path, scores.model_dump(mode="json"))
    return Validation(work, scores, written[-1], report)
