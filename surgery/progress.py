"""Progress bars on standard error; nothing is shown where that is no terminal."""

import sys
from contextlib import contextmanager


@contextmanager
def progress_bar(description, total, unit="bytes"):
    """Yield `advance(count)` for a bar over `total` bytes (or other units); the bar goes away when it is done."""
    if not sys.stderr.isatty() or not total:
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    count = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(description, total=total)
        yield lambda amount: progress.advance(task, amount)
