"""`surgery verify`: a table of what was looked at; exit status 0 only if all of it is as it should be."""

from surgery.artifact.verify import verify

from .show import print_json, table


def run(arguments):
    """Verify an artifact's folder or repository."""
    report = verify(arguments.model, arguments.revision)
    if arguments.json:
        print_json(report.to_json())
    else:
        at = f" at {report.commit[:12]}" if report.commit else ""
        rows = [[check.what, check.subject, check.status, check.detail] for check in report.checks]
        table(f"{report.model}{at}, artifact {report.hash[:12]}", ["what", "subject", "status", "detail"], rows)
        print("verified" if report.verified else "not verified")
    return 0 if report.verified else 1
