"""The page behind an address: built by Gradio, asked by its client, and by a browser in test_browser.py."""

from urllib.request import urlopen

import pytest

from surgery.studio.answers import Answers

from .conftest import QUICK


def test_the_extra_is_asked_for_where_it_is_not_installed(run):
    """Before anything heavy is imported."""
    code = (
        "import sys, time\nimport surgery.machine as machine\n"
        "machine.backend_version = lambda name: None\n"
        "from surgery.cli import main\nbegan = time.monotonic()\nstatus = main(['studio', 'shapes'])\n"
        "assert 'torch' not in sys.modules and time.monotonic() - began < 1, time.monotonic() - began\n"
        "raise SystemExit(status)\n"
    )
    done = run(python=code, fresh=True, check=2)
    assert "the studio needs gradio: pip install 'pladis-surgery[ui]'" in done.stderr


def test_the_page_draws_and_tells_what_is_wrong(session):
    """One smoke of all of it: served on loopback, asked as a browser asks."""
    pytest.importorskip("gradio", reason="the page is Gradio's: pip install '.[ui]'")
    from gradio_client import Client

    from surgery.studio.page import Page
    from surgery.studio.serving import served

    with served(Page(Answers(session)).blocks) as url:
        assert url.startswith("http://127.0.0.1:")
        with urlopen(url) as answer:
            assert "default-src 'self'" in answer.headers["content-security-policy"]
            assert "fonts.googleapis.com" not in answer.read().decode()
        client = Client(url, verbose=False, download_files=False, analytics_enabled=False)
        endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
        assert set(endpoints) == {"/draw", "/attention", "/recipe"}
        labels = [one["label"] for one in endpoints["/draw"]["parameters"]]
        values = [one.get("parameter_default") for one in endpoints["/draw"]["parameters"]]
        given = {"prompt": QUICK["prompt"], "steps": 2, "images": 1}
        values = [given.get(label, value) for label, value in zip(labels, values, strict=True)]
        job = client.submit(*values, api_name="/draw")
        status, base, patched, recipe = job.result(timeout=60)
        assert "done" in status and "seed 0" in str(base) and "seed 0" in str(patched)
        assert any("step" in answer[0] for answer in job.outputs()[:-1]) and "operator: pladis" in str(recipe)
        assert values[labels.index("alpha")] == 1.5
        values[labels.index("alpha")] = 7
        [wrong, *_] = client.predict(*values, api_name="/draw")
        assert "operations[0].with.alpha: is 7.0 but should be less than or equal to 2" in wrong
        [wrong, *_] = client.predict(*values, api_name="/recipe")
        assert "operations[0].with.alpha" in wrong
