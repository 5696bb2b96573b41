"""The page behind an address: on this machine alone unless asked, and with no request to any other host."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from surgery.errors import InputError, SurgeryError

from .answers import Answers
from .ballot import Ballot
from .opening import open_for_page
from .page import CSS, Page, import_gradio
from .session import Session

LOCAL = ("127.0.0.1", "::1", "localhost")
_PORT = 7860  # and the next free one, unless a port is asked for
_FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # no request for one
# What a browser may ask for: this server and nothing else, whatever Gradio's pages name.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "connect-src 'self'; object-src 'none'; base-uri 'self'; form-action 'self'"
)


class OwnOrigin:
    """ASGI middleware that adds the policy to each answer."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request as the app does."""

        async def sending(message):
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), (b"content-security-policy", POLICY.encode())]
                message = {**message, "headers": [*headers, (b"referrer-policy", b"no-referrer")]}
            await send(message)

        await self._app(scope, receive, sending)


def run_space(model: str, revision: str | None = None, gpu: Any = None) -> None:
    """Serve the page of a published model as a Space of the Hub has it, which keeps neither votes nor recipes.

    gpu: ZeroGPU's decorator of the functions that draw, None elsewhere.
    """
    _launched(Page(Answers(Session(open_for_page(model, revision))), gpu).blocks)


def _launched(blocks, **more):
    look = import_gradio().themes.Default(**_FONTS)
    return blocks.queue().launch(theme=look, css=CSS, ssr_mode=False, show_error=True, **more)


@contextmanager
def studio(
    model: str, out: str | Path, *, host: str = LOCAL[0], port: int | None = None, share: bool = False, **opening: Any
) -> Iterator[str]:
    """Serve the page of a model until the block is left; yields its address. opening: as of `open_for_page`.

    out: where recipes and votes go. share: through Gradio's tunnel, where anybody with the address may draw.
    Raises InputError where Gradio is not installed, the port is taken, or another studio has `out`.
    """
    import_gradio()
    ballot = Ballot(Path(out) / "votes")
    try:
        opened = open_for_page(model, out=out, **opening)
        blocks = Page(Answers(Session(opened), ballot, Path(out))).blocks
        with served(blocks, host, port, share) as url:
            yield url
    finally:
        ballot.close()


@contextmanager
def served(blocks: Any, host: str = LOCAL[0], port: int | None = None, share: bool = False) -> Iterator[str]:
    """Serve Gradio's Blocks, as `studio` does, until the block is left; yields their address."""
    from starlette.middleware import Middleware

    try:
        _, local, shared = _launched(
            blocks,
            server_name=host,
            server_port=port,
            share=share,
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            app_kwargs={"middleware": [Middleware(OwnOrigin)]},
        )
    except OSError as error:
        place = f"{host}, port {port or _PORT}"
        raise InputError(f"the page cannot be served at {place}: taken, or not this machine's; give --port") from error
    try:
        if share and not shared:
            raise SurgeryError("Gradio could not open its tunnel; check the connection, or leave --share out")
        yield (shared or local or "").rstrip("/")
    finally:
        blocks.close(verbose=False)


def wait_for_signal() -> None:
    """Until SIGTERM or SIGINT."""
    import signal

    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()
