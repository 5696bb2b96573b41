"""`surgery validate`: an artifact's scores beside its base's, with intervals, and where the report lies."""

from surgery.errors import InputError

from .show import print_json, relative, table


def run(arguments):
    """Score an artifact; a run that was cut short goes on where it stopped."""
    from surgery.validate.validating import validate

    done = validate(
        arguments.model,
        revision=arguments.revision,
        prompts=arguments.prompts,
        limit=arguments.limit,
        images_per_prompt=arguments.images_per_prompt,
        seed=arguments.seed,
        metrics=arguments.metrics,
        reference=arguments.reference,
        out=arguments.out,
        drawing=drawing_of(arguments),
        checkpoints=checkpoints_of(arguments.checkpoints),
        announce=None if arguments.json else announce,
    )
    if arguments.json:
        print_json(
            {
                **done.scores.model_dump(mode="json"),
                "report": done.report,
                "scores_file": done.scores_file,
                "kept": done.kept,
            }
        )
    else:
        show(done)


def drawing_of(arguments):
    """The Drawing that a command line asks for."""
    from surgery.validate.session import Drawing

    names = ("batch", "workers", "address", "device", "dtype", "threads")
    return Drawing(**{name: getattr(arguments, name) for name in names})


def checkpoints_of(given):
    """{"metric.part": path} of --checkpoint METRIC.PART=PATH options."""
    pairs = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or not path:
            raise InputError(f"--checkpoint {text}: write METRIC.PART=PATH")
        pairs[name] = path
    return pairs


def announce(there, lacking, batch):
    """Say what is about to be drawn."""
    kept = f"; {there} are there already" if there else ""
    print(f"drawing {lacking} images, {batch} at once{kept}", flush=True)


def show(done):
    """Print a Validation: the table of metrics, what it means, where the report is."""
    rows = []
    for metric in done.scores.metrics:
        low, high = metric.interval
        signed = "+.4g" if metric.difference is not None else ".4g"
        rows.append(
            [
                metric.title or metric.name,
                "" if metric.base is None else f"{metric.base:.4g}",
                f"{metric.patched:.4g}",
                "" if metric.difference is None else f"{metric.difference:+.4g}",
                f"{low:{signed}} to {high:{signed}}",
                "" if metric.win_rate is None else f"{100 * metric.win_rate:.1f}%",
                metric.n,
                metric.verdict,
            ]
        )
    prompts = ", ".join(f"{part.count} of {part.name}" for part in done.scores.prompts)
    title = f"{prompts}, {done.scores.images_per_prompt} each; artifact {done.scores.artifact_hash[:12]}"
    table(title, ["metric", "base", "patched", "difference", "95% interval", "wins", "n", "verdict"], rows)
    if done.scores.excluded:
        print(f"left out: {done.scores.excluded} pairs in which a safety checker blackened an image")
    for metric in done.scores.regressions(done.scores.purpose):
        print(f"the patch makes the model significantly worse on {metric.title or metric.name}")
    if done.kept:
        print(
            f"the artifact's own scores.json was left as it is, because it measured {done.kept}: to replace it, delete "
            "it and run this again"
        )
    print(f"scores: {relative(done.scores_file.absolute())}")
    print(f"report: {relative(done.report.absolute())}")
