"""`surgery study`: a page that people vote on, and what their votes amount to."""

import argparse
from pathlib import Path

from surgery.errors import InputError

from .show import print_json, relative, size


def run_study(arguments: argparse.Namespace) -> None:
    """Write the page and its key; with --votes, say what the votes amount to."""
    from surgery.analysis.study import choose_exhibits, read_sources, write_study
    from surgery.analysis.study.sources import ROWS, report_of

    folders = [Path(folder) for folder in arguments.folders]
    if arguments.out:
        page = Path(arguments.out)
    elif len(folders) > 1:
        page = Path("out") / "study.html"
    else:
        page = (folders[0] if (folders[0] / ROWS).is_file() else report_of(folders[0])) / "study.html"
    key = page.with_name(f"{page.stem}-key.json")
    if arguments.votes:
        _analyse(arguments, key)
        return
    sides = arguments.sides and [side.strip() for side in arguments.sides.split(",") if side.strip()]
    if sides == []:
        raise InputError("--sides names none; give two or three with commas between them")
    sources = read_sources(folders, sides)
    exhibits = choose_exhibits(sources, arguments.pairs, arguments.seed, arguments.pairwise)
    models = {source.model: source.origin for source in sources}
    study = write_study(exhibits, page, key, models=models, title=arguments.title, seed=arguments.seed)
    if arguments.json:
        print_json(study.to_json())
        return
    several = f" from {len(models)} models" if len(models) > 1 else ""
    at_once = 2 if arguments.pairwise else len(study.sides)
    print(
        f"{study.items} times {at_once} images of {', '.join(study.sides)}{several}, two questions each: "
        f"{relative(page.absolute())} ({size(study.page_bytes)})"
    )
    print(f"the key, which says whose each image is: {relative(key.absolute())}; keep it from those who vote")
    if study.identical:
        print(f"note: in {study.identical} of them two images are the same, pixel for pixel")
    out = f" --out {arguments.out}" if arguments.out else ""
    print(f"when they have sent their files: surgery study {' '.join(arguments.folders)}{out} --votes votes-*.json")


def _analyse(arguments, key):
    from surgery.analysis.study import analyse, read_key, read_votes, render

    opened = read_key(key)
    result = analyse(read_votes(arguments.votes, opened), opened)
    if arguments.json:
        print_json(result.to_json())
    else:
        print(render(result))
