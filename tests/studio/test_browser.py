"""The page in a real browser that reaches loopback alone: every control of it, as a hand moves them."""

import time
from pathlib import Path

import pytest
import yaml

from surgery.analysis.study import analyse, read_key, read_votes

from .conftest import PROMPT

pytestmark = pytest.mark.slow


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """A Driver of the page of the shapes recipe, whose recipes and votes go to tmp_path."""
    pytest.importorskip("gradio", reason="the page is Gradio's: pip install '.[ui]'")
    pytest.importorskip("playwright", reason="the browser is driven by Playwright: pip install playwright")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from studio import driven, find_browser

    from surgery.studio.serving import studio

    if (browser := find_browser()) is None:
        pytest.skip("no Chromium on this machine (Debian: chromium)")
    with studio("shapes", tmp_path) as url, driven(url, browser) as driver:
        yield driver


def test_a_hand_on_every_control(driver, tmp_path):
    import surgery

    page = driver.page
    page.click("#draw")
    assert driver.wait("prompt must be text")
    driver.write("prompt", PROMPT)
    driver.write("steps", 4)
    driver.draw()
    base, patched = driver.image("base"), driver.image("patched")
    value = driver.slide("value-0-1", 0.9)  # live: the base stays, nobody pressed a button
    driver.wait_for_other("patched", patched)
    driver.wait("done")
    assert value > 5 and driver.image("base") == base

    driver.write("value-0-0", 7)
    assert "operations[0].with.alpha: is 7.0 but" in driver.wait("operations[0].with.alpha")
    driver.write("value-0-0", 1.5)
    patched = driver.image("patched")
    driver.choose("operator-0", "gag")
    driver.wait_for_other("patched", patched)
    driver.wait("done")
    assert page.locator("#value-0-4").inner_text().startswith("eta")

    page.get_by_role("button", name="guidance").click()
    patched = driver.image("patched")
    driver.choose("method", "seg")
    driver.wait_for_other("patched", patched)
    driver.wait("done")
    driver.write("guidance", "scal: 2")
    assert "did you mean" in driver.wait('guidance.scal: unknown key; did you mean "scale"?')
    driver.write("guidance", "scale: 2.0")
    driver.wait("done")

    driver.tab("Recipe")
    page.click("#save-recipe")
    path = driver.wait("recipe: ").split("recipe: ")[1].split("; next")[0]
    recipe = yaml.safe_load(Path(path).read_text())
    assert recipe["guidance"] == {"method": "seg", "scale": 2.0}
    assert recipe["operations"][0]["with"]["operator"] == "gag"
    assert surgery.plan(path).plan.totals["replaced"] == 7

    driver.write("steps", 400)
    page.click("#draw")
    page.wait_for_selector("#status progress")
    began = time.monotonic()
    page.click("#stop")
    assert "stopped at step" in driver.wait("stopped at step") and time.monotonic() - began < 10
    driver.write("steps", 4)

    driver.tab("Attention")
    page.click("#word label:has-text('blue')")
    page.wait_for_selector("#map img", timeout=60_000)
    driver.wait("done")

    driver.tab("Blind")
    page.click("#next-pair")
    page.wait_for_selector("#pair img", timeout=60_000)
    for number in range(2):
        page.wait_for_function(
            "n => document.querySelector('#asked textarea').value.startsWith(`${n}. `)", arg=number + 1, timeout=60_000
        )
        page.wait_for_timeout(500)
        page.click("#quality label:has-text('left')")
        page.click("#alignment label:has-text('no difference')")
        page.click("#vote")
    page.wait_for_function("document.querySelector('#asked textarea').value.startsWith('3. ')", timeout=60_000)
    page.click("#result")
    page.wait_for_function(
        "document.querySelector('#counted textarea').value.includes('image quality')", timeout=60_000
    )
    key = read_key(tmp_path / "votes/study-key.json")
    votes = read_votes(list((tmp_path / "votes").glob("votes-*.json")), key)
    assert analyse(votes, key).votes == 4 and len(key.items) == 3
    assert driver.asked == []
