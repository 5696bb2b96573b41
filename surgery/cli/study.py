"""`surgery study`: a blind A/B page of a validation's images, and the analysis of the votes that it gathers."""

from pathlib import Path

from surgery.artifact import read_manifest
from surgery.artifact.manifest import MANIFEST
from surgery.artifact.scores import SCORES
from surgery.errors import InputError
from surgery.hub import sha256_of

from .show import print_json, relative, size


def run(arguments):
    """Write the page and its key; with --votes, say what the votes amount to."""
    folder = _report_of(Path(arguments.folder))
    page = Path(arguments.out) if arguments.out else folder / "study.html"
    key = page.with_name(f"{page.stem}-key.json")
    if arguments.votes:
        _analyse(arguments, key)
        return
    from surgery.analysis.study import write_study
    from surgery.analysis.study.page import choose_pairs

    pairs, artifact_hash = choose_pairs(folder, arguments.pairs, arguments.seed)
    study = write_study(pairs, page, key, artifact_hash=artifact_hash, title=arguments.title, seed=arguments.seed)
    if arguments.json:
        print_json(study.to_json())
        return
    print(f"{study.pairs} pairs, two questions each: {relative(page.absolute())} ({size(study.page_bytes)})")
    print(f"the key, which says whose each image is: {relative(key.absolute())}; keep it from those who vote")
    if study.identical:
        print(f"note: in {study.identical} pairs the two images are the same, pixel for pixel")
    print(f"when they have sent their files: surgery study {arguments.folder} --votes votes-*.json")


def _report_of(folder):
    """The folder of the report on an artifact, or the one report in a validation folder."""
    from surgery.validate.session import work_folder

    of_artifact = (folder / MANIFEST).is_file()
    work = work_folder(folder) if of_artifact else folder
    name = f"report-{read_manifest(folder).hash[:12]}-*" if of_artifact else "report-*"
    reports = sorted(path.parent for path in work.glob(f"{name}/pairs.csv"))
    if of_artifact and len(reports) > 1 and (folder / SCORES).is_file():
        own = sha256_of(folder / SCORES)
        reports = [path for path in reports if (path / SCORES).is_file() and sha256_of(path / SCORES) == own]
    if len(reports) > 1:
        names = ", ".join(map(str, reports))
        raise InputError(f"{work} holds {len(reports)} reports; name one of them: {names}")
    return reports[0] if reports else work


def _analyse(arguments, key):
    from surgery.analysis.study import analyse, read_key, read_votes, render

    opened = read_key(key)
    result = analyse(read_votes(arguments.votes, opened), opened)
    if arguments.json:
        print_json(result.to_json())
    else:
        print(render(result))
