"""Score an artifact against its untouched base: draw the pairs, measure them, write scores.json and the report."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from surgery.artifact.manifest import list_files, read_manifest, write_json
from surgery.artifact.scores import SCORES, Scores, read_scores
from surgery.errors import ArtifactError, InputError
from surgery.runtime.video import require_mp4

from .jobs import Drawing, sides_of
from .report import write_report
from .scoring import score
from .session import SessionConfig, Settings, open_session, report_folder, work_folder
from .store import locked
from .video_folders import write_video_folders


@dataclass(frozen=True)
class Validation:
    """What a validation came to. folder: of the images and values; report: report.html, with pairs.csv beside it.

    scores_file: scores.json, in the artifact where that is a folder, else beside the report. kept: what an earlier
    scores.json of the artifact measured that this one does not, for which it was left there; None where there was none.
    """

    folder: Path
    scores: Scores
    scores_file: Path
    report: Path
    kept: str | None = None


def validate(
    model: Path | str,
    *,
    revision: str | None = None,
    prompts: str | Path | Sequence[str] | None = None,
    limit: int | None = None,
    images_per_prompt: int | None = None,
    seed: int | None = None,
    metrics: Sequence[str] | None = None,
    reference: Path | str | None = None,
    out: Path | str | None = None,
    drawing: Drawing | None = None,
    checkpoints: Mapping[str, Path | str] | None = None,
    recipe_folder: Path | None = None,
    settings: Settings | None = None,
    videos: Path | str | None = None,
    announce: Callable[[int, int, int], object] | None = None,
) -> Validation:
    """Score an artifact (a folder or a Hub repository) against its base, and return the Validation.

    prompts: a set's name, a file, or a list; what is None is as the artifact's recipe says under `validate`.
    out: the work folder, DIR-validation unless given; a run that was cut short goes on from what it holds.
    drawing: a Drawing. checkpoints: {"metric.part": path} on this machine. recipe_folder: where the recipe's own file
    names start. settings: of `check_recipe`, in place of all of these. videos: a folder for the videos of both sides as
    mp4, for other tools (`write_video_folders`).
    announce: called with (images there, images to draw, batch) before drawing.
    scores.json goes beside the report, and into the artifact's folder unless one is there that measured more.
    Raises InputError, ArtifactError, SurgeryError; what was drawn and scored by then is kept.
    """
    given = {"prompts": prompts, "limit": limit, "images_per_prompt": images_per_prompt, "seed": seed}
    given |= {"metrics": metrics, "reference": reference}
    work = work_folder(model, out)
    session = open_session(
        SessionConfig(
            model,
            work,
            given,
            revision=revision,
            drawing=drawing,
            checkpoints=checkpoints,
            recipe_folder=recipe_folder,
            settings=settings,
        )
    )
    if videos is not None:
        if not session.is_video:
            raise InputError(f"--videos {videos}: {session.manifest.name} draws images; leave it out")
        require_mp4()
    base, patched = sides_of(session.manifest, session.folder, session.environment)
    with locked(work):
        drawn = session.draw(work, (base, patched), announce)
        images = drawn.paired(base, patched)
        if videos is not None:
            drawn_of = {side: [getattr(pair, side) for pair in images.pairs] for side in ("base", "patched")}
            write_video_folders([pair.job.prompt.text for pair in images.pairs], drawn_of, videos)
        results = [score(scorer, work, images) for scorer in session.scorers]
        scores = Scores(**session.facts(drawn), metrics=[result.metric for result in results])
        # A work folder may be shared by artifacts of one base, and a small run must not overwrite a large one's report.
        reports = report_folder(work, session.manifest.hash, session.settings)
        reports.mkdir(parents=True, exist_ok=True)
        written, kept_scores = reports / SCORES, None
        write_json(written, scores.model_dump(mode="json"))
        if session.home:
            kept_scores = _what_it_would_lose(session.home, scores)
            if kept_scores is None:
                written = session.home / SCORES
                write_json(written, scores.model_dump(mode="json"))
                list_files(read_manifest(session.home), session.home, [SCORES])
        report = write_report(reports, session.manifest, scores, results)
    return Validation(work, scores, written, report, kept_scores)


def _what_it_would_lose(folder, scores):
    """What the scores.json of the same artifact measured that new Scores do not, in words; None if nothing.

    A small run on the side must not take the place of what the artifact is published with, or held back by.
    """
    try:
        before = read_scores(folder, scores.artifact_hash)
    except ArtifactError:
        return None  # of another artifact, or damaged
    now = {metric.name: metric.n for metric in scores.metrics}
    for metric in before.metrics if before else ():
        if metric.kind != "fidelity" and metric.n > now.get(metric.name, 0):
            return f"{metric.title or metric.name} on {metric.n} pairs"
    return None
