"""A Hub on loopback that this very process uses, a base on it of 200 kB, and an artifact of that base."""

import pytest

from ..frozen.make import tiny_pipeline
from ..loopback_hub import WRITE_TOKEN, hub_server

BASE = "owner/base"
RECIPE = """
schema: 1
name: tiny-pladis
summary: A tiny pipeline, patched.
base: {{pipeline: {base}}}
operations: [{{replace: cross-attention, with: {{operator: pladis, alpha: 1.5, scale: {scale}}}}}]
sampling: {{steps: 2, height: 16, width: 16}}
publish: {{license: {license}, tags: [tiny]}}
"""


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """The folder of a tiny pipeline in fp16."""
    import torch

    folder = tmp_path_factory.mktemp("base") / "tiny"
    tiny_pipeline().to(dtype=torch.float16).save_pretrained(folder)
    return folder


@pytest.fixture
def use_hub(monkeypatch, tmp_path):
    """use_hub(server, home="home", token=WRITE_TOKEN): this process talks to that server, with that cache."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _cache_assets

    def use(server, home="home", token=WRITE_TOKEN, offline=False):
        folder = tmp_path / home
        values = {
            "ENDPOINT": server.url,
            "HF_HUB_OFFLINE": offline,
            "HF_HOME": str(folder),
            "HF_HUB_CACHE": str(folder / "hub"),
            "HF_ASSETS_CACHE": str(folder / "assets"),
            "HF_TOKEN_PATH": str(folder / "token"),
            "HF_HUB_DISABLE_XET": True,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        }
        for name, value in values.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(_cache_assets, "HF_ASSETS_CACHE", str(folder / "assets"))
        monkeypatch.setenv("HF_TOKEN", token or "")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")

    return use


@pytest.fixture
def no_waiting(monkeypatch):
    """Neither the client nor this package sleeps before another try."""
    import time

    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture
def hub(use_hub, tiny_base):
    """A server with the base on it, used by this process; the user is "me" and may write."""
    with hub_server() as server:
        server.create(BASE, tiny_base, card={"license": "apache-2.0"})
        use_hub(server)
        yield server


@pytest.fixture
def write_recipe(tmp_path):
    """write_recipe(base=..., scale=..., license=...): the path of a recipe."""

    def write(base=BASE, scale=1.0, license="inherit", name="tiny.yaml", more=""):
        path = tmp_path / name
        path.write_text(RECIPE.format(base=base, scale=scale, license=license) + more)
        return path

    return write


@pytest.fixture
def artifact(hub, write_recipe, tmp_path):
    """The folder of an artifact of the base on the Hub."""
    import surgery

    return surgery.apply(write_recipe(), tmp_path / "out").folder
