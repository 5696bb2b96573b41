"""`surgery push`: an artifact folder to the Hub, after showing what will move."""

from surgery.export.publish import Options, Pushed, prepare
from surgery.export.publish import publish as send

from .show import print_json, size, table

_SHOWN = {"copy": "copied on the Hub", "send": "sent", "keep": "there already", "delete": "removed"}


def run(arguments):
    """Publish the artifact of a folder."""
    publish(arguments.folder, options_of(arguments, arguments.repo), arguments.dry_run, arguments.json)


def options_of(arguments, repo):
    """The Options that a command line names."""
    return Options(
        repo=repo,
        private=arguments.private,
        create_pr=arguments.create_pr,
        revision=arguments.revision,
        tag=arguments.tag,
        weights=arguments.weights,
        overwrite=arguments.overwrite,
        allow_regression=arguments.allow_regression,
    )


def publish(folder, options, dry_run, as_json, extra=None, checked=None):
    """Push a folder and print what was done; extra: further keys of the JSON; checked: as `prepare` takes it."""
    publication = prepare(folder, options, checked)
    done = send(publication, dry_run=dry_run, announce=None if as_json else show_plan)
    if as_json:
        print_json({"schema_version": 1, **(extra or {}), **as_data(done)})
        return
    if not isinstance(done, Pushed):
        print("dry run: nothing was sent")
        return
    tag = f", tag {done.tag}" if done.tag else ""
    if done.pull_request:
        print(f"{'proposed' if done.made else 'proposed already'}: {done.pull_request}")
    else:
        print(
            f"{'published' if done.made else 'nothing to do, it is all there'}: {done.url} at {done.commit[:12]}{tag}"
        )


def as_data(done):
    """A Pushed or a PushPlan as plain data."""
    if not isinstance(done, Pushed):
        return {"dry_run": True, "plan": done.to_json()}
    named = ("repo", "url", "commit", "made", "pull_request", "tag")
    return {"dry_run": False, **{name: getattr(done, name) for name in named}, "plan": done.plan.to_json()}


def _short(source):
    """OWNER/NAME@0123456789ab of a copy's source: its path is mostly that of the file."""
    name, _, rest = source.partition("@")
    return f"{name}@{rest[:12]}" if source else ""


def show_plan(plan):
    """The plan's table on standard output: what moves, how much, and why."""
    totals = plan.totals
    where = f"{plan.repo}, branch {plan.branch}" + (" (a pull request)" if plan.create_pr else "")
    at = f"on top of {plan.head[:12]}" if plan.head else "a new repository"
    rows = [
        ["to", f"{where}, {'private' if plan.private else 'public'}, {at}"],
        ["artifact", plan.hash],
        ["licence", plan.license],
        [
            "weights",
            "thin: named by commit and sha256, not published" if plan.weights == "thin" else "in the repository",
        ],
        ["to send", size(totals["sent_bytes"])],
        ["copied on the Hub", size(totals["copied_bytes"])],
        ["there already", size(totals["kept_bytes"])],
    ]
    table(f"push {plan.hash[:12]}", None, rows)
    steps = [step for step in plan.steps if step.action != "keep"]
    rows = [[step.path, size(step.size), _SHOWN[step.action], _short(step.source) or step.why] for step in steps]
    if rows:
        table("one commit", ["file", "size", "how", "from, or why it has to be sent"], rows)
    for note in plan.notes:
        print(f"note: {note}")
