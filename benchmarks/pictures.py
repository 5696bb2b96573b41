"""The pictures of pages in docs, from the commands that stand beside them.

    python benchmarks/pictures.py docs/gallery.md docs/terminal.md

The commands of a page run in order in one folder. A picture NAME.png that the page shows is out/NAME.png of theirs; a
picture NAME-80.svg is what the block before it prints in a terminal of 80 columns.
"""

import argparse
import fcntl
import io
import os
import pty
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

PART = re.compile(r"^```sh.*?\n(?P<block>.*?)^```$|!\[.*?\]\((?P<picture>.*?)\)", re.MULTILINE | re.DOTALL)
WIDTH = re.compile(r"-(\d+)\.svg$")
# rich's frame without its fonts, which it would fetch from another host
FRAME = """<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" /></clipPath>{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">{matrix}</g></g>
</svg>
"""


def main() -> None:
    """Draw the pictures of each page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", type=Path, nargs="+")
    for page in parser.parse_args().pages:
        with tempfile.TemporaryDirectory() as folder:
            draw(page, Path(folder))


def draw(page: Path, folder: Path) -> None:
    """Run a page's blocks in `folder`, and write its pictures beside it."""
    parts, block, wanted = list(PART.finditer(page.read_text(encoding="utf-8"))), "", {}
    for part in parts:
        if part["block"]:
            block = part["block"]
        elif WIDTH.search(part["picture"]):
            wanted.setdefault(block, []).append(part["picture"])
    for text in [part["block"] for part in parts if part["block"]]:
        for picture in wanted.get(text, [None]):
            width = int(WIDTH.search(picture)[1]) if picture else 80
            shutil.rmtree(folder / "out", ignore_errors=True) if picture and "apply" in text else None
            shown = "".join(f"$ {line}\n{in_terminal(line, folder, width)}\n" for line in text.splitlines())
            print(shown, flush=True)
            if picture:
                write_svg(page.parent / picture, shown, width)
    for part in parts:
        if part["picture"] and part["picture"].endswith(".png"):
            shutil.copyfile(folder / "out" / Path(part["picture"]).name, page.parent / part["picture"])


def in_terminal(line: str, folder: Path, width: int) -> str:
    """What a command prints in a terminal so wide; standard error, where bars come and go, is not one, and follows."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(width)}
    command = [sys.executable, "-m", *shlex.split(line)]
    with tempfile.TemporaryFile() as errors:
        running = subprocess.Popen(command, cwd=folder, env=environment, stdin=theirs, stdout=theirs, stderr=errors)
        os.close(theirs)
        said = b""
        while True:
            try:
                said += os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
        running.wait()
        os.close(ours)
        errors.seek(0)
        return (said.replace(b"\r\n", b"\n") + errors.read()).decode().rstrip()


def write_svg(path: Path, shown: str, width: int) -> None:
    """A picture of a terminal with this text."""
    from rich.console import Console
    from rich.text import Text

    console = Console(record=True, width=width, file=io.StringIO(), highlight=False)
    console.print(Text.from_ansi(shown.rstrip()), overflow="fold")
    path.parent.mkdir(exist_ok=True)
    console.save_svg(str(path), title="", code_format=FRAME, unique_id="terminal")


if __name__ == "__main__":
    main()
