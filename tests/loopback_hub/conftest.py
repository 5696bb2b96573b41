"""Clients of the tests' Hub: its user, somebody else, and nobody."""

import time

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import _http

from . import WRITE_TOKEN, hub_server

OTHER, READ = "hf_" + "o" * 34, "hf_" + "r" * 34


@pytest.fixture
def hub(monkeypatch):
    """A server; the client of this process may use it, without Xet and without waiting between tries."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")
    _http.close_session()
    with hub_server() as server:
        server.tokens[OTHER] = {"name": "you", "role": "write"}
        server.tokens[READ] = {"name": "me", "role": "read"}
        yield server
        _http.close_session()


@pytest.fixture
def api(hub):
    """The client of the user "me"."""
    return HfApi(endpoint=hub.url, token=WRITE_TOKEN)


@pytest.fixture
def other(hub):
    """The client of somebody else."""
    return HfApi(endpoint=hub.url, token=OTHER)


@pytest.fixture
def anonymous(hub):
    """A client without a token."""
    return HfApi(endpoint=hub.url, token=False)
