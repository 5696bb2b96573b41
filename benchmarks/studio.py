"""The pictures of docs/studio.md: the page of `surgery studio shapes`, driven in a browser that reaches loopback alone.

    python benchmarks/studio.py [--browser /usr/bin/chromium] [--out docs]

It needs the extra [ui], Playwright (pip install playwright) and a Chromium. Whatever the page asks of another host
fails the run.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROMPT = "a red circle to the left of a blue square"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH = 1360


def find_browser() -> str | None:
    """The path of a Chromium on this machine."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


class Driver:
    """One open page: what a hand does on it. asked: the addresses that the page asked for, of other hosts."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.url, self.asked = page, url, []
        page.on("request", self._seen)
        page.goto(url)
        page.wait_for_selector("#draw")

    def _seen(self, request):
        if not request.url.startswith((self.url, "data:", "blob:")):
            self.asked.append(request.url)

    def status(self) -> str:
        """The line under the buttons."""
        return self.page.inner_text("#status").strip()

    def wait(self, text: str, seconds: float = 60) -> str:
        """The status, once it holds a text."""
        script = "text => document.querySelector('#status').innerText.includes(text)"
        self.page.wait_for_function(script, arg=text, timeout=1000 * seconds)
        return self.status()

    def write(self, field: str, text: object) -> None:
        """A text or number into a field, and out of it again."""
        box = self.page.locator(f"#{field} textarea, #{field} input:not([type=range])").first
        box.fill(str(text))
        box.press("Tab")

    def draw(self) -> None:
        """Press the button, and wait for both sides."""
        self.page.click("#draw")
        self.page.wait_for_selector("#status progress")
        self.wait("done")

    def tab(self, name: str) -> None:
        """Turn to a tab."""
        self.page.get_by_role("tab", name=name).click()

    def choose(self, field: str, option: str) -> None:
        """An option of a dropdown."""
        self.page.click(f"#{field} input")
        self.page.get_by_role("option", name=option, exact=True).click()

    def slide(self, field: str, share: float) -> float:
        """A slider's handle to a share of its length; the value that it has then."""
        slider = self.page.locator(f"#{field} input[type=range]")
        slider.scroll_into_view_if_needed()
        box = slider.bounding_box()
        self.page.mouse.click(box["x"] + share * box["width"], box["y"] + box["height"] / 2)
        return float(slider.input_value())

    def image(self, side: str) -> str | None:
        """The address of a side's first image."""
        found = self.page.locator(f"#{side} img").first
        return found.get_attribute("src") if found.count() else None

    def wait_for_other(self, side: str, before: str | None, seconds: float = 60) -> None:
        """Until a side's first image is another."""
        script = (
            "([side, before]) => { const image = document.querySelector(`#${side} img`);"
            " return image && image.getAttribute('src') !== before; }"
        )
        self.page.wait_for_function(script, arg=[side, before], timeout=1000 * seconds)


@contextmanager
def driven(url: str, browser: str, height: int = 900) -> Iterator[Driver]:
    """A Driver of a page, in a browser that finds no other host than loopback."""
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=arguments)
        try:
            yield Driver(chromium.new_page(viewport={"width": WIDTH, "height": height}), url)
        finally:
            chromium.close()


def main() -> int:
    """Take the pictures; exit status 1 where the page asked something of another host."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--browser", default=find_browser())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs")
    arguments = parser.parse_args()
    if arguments.browser is None:
        print(f"no browser was found ({', '.join(BROWSERS)}); name one: --browser", file=sys.stderr)
        return 2
    from surgery.studio.serving import studio

    with tempfile.TemporaryDirectory() as folder, studio("shapes", folder) as url:
        with driven(url, arguments.browser) as driver:
            driver.write("prompt", PROMPT)
            driver.draw()
            before = driver.image("patched")
            driver.slide("value-0-1", 0.9)
            driver.wait_for_other("patched", before)
            driver.wait("done")
            driver.page.mouse.move(5, 5)
            driver.page.evaluate("window.scrollTo(0, 0)")
            driver.page.screenshot(path=arguments.out / "studio.png")
            driver.tab("Attention")
            driver.page.click("#word label:has-text('circle')")
            driver.page.wait_for_selector("#map img", timeout=120_000)
            driver.wait("done")
            driver.page.mouse.move(5, 5)
            driver.page.wait_for_timeout(500)
            driver.page.screenshot(path=arguments.out / "studio-attention.png")
        print(f"{arguments.out}/studio.png, studio-attention.png; asked of other hosts: {driver.asked or 'nothing'}")
        return 1 if driver.asked else 0


if __name__ == "__main__":
    raise SystemExit(main())
