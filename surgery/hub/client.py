"""Calls to the Hub: which failures pass by themselves, and their text without anything secret in it."""

import re
import time
from collections.abc import Callable
from importlib import metadata
from typing import TYPE_CHECKING, TypeVar

from surgery.compat import never_connected, transport_error

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Result = TypeVar("Result")

_TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)
_WAITS = (1.0, 3.0)  # seconds before the second and the third try
# A signed link's query and a token open doors; neither may reach a terminal or a log.
_SECRETS = (
    (re.compile(r"(https?://[^\s'\"?]+)\?[^\s'\"]+"), r"\1"),
    (re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{8,}"), r"\1_***"),
    (re.compile(r"(?i)(bearer\s+)\S+"), r"\1***"),
)


def hub_api() -> "HfApi":
    """The client by which everything asks the Hub: it says who asks, with this machine's token where there is one."""
    from huggingface_hub import HfApi

    return HfApi(library_name="pladis-surgery", library_version=metadata.version("pladis-surgery"))


def bar_up_to(size: int | None) -> type:
    """A progress bar class for huggingface_hub, which raises OSError where more than `size` bytes arrive.

    The client itself compares a body's length with what is listed only after all of it has come.
    """
    from huggingface_hub.utils import tqdm

    class UpTo(tqdm):
        arrived = 0

        def update(self, n: float | None = 1) -> bool | None:
            self.arrived += n  # pyright: ignore[reportOperatorIssue]
            if size is not None and self.arrived > size:
                raise OSError(f"more than the {size} bytes that are listed arrive")
            return super().update(n)

    return UpTo


def is_transient(error: BaseException | None) -> bool:
    """Whether the same call may succeed a moment later: a server's 5xx, a rate limit, a connection that broke."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        status = status_of(error)
        if status is not None:
            return status in _TRANSIENT_STATUS
        # A file that exists: two processes, or threads, were fetching the same one.
        if isinstance(error, (transport_error(), ConnectionError, TimeoutError, FileExistsError)):
            return True
        error = error.__cause__ or error.__context__
    return False


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error of huggingface_hub carries, or None."""
    response = getattr(error, "response", None)
    return getattr(response, "status_code", None)


def retried(call: Callable[[], Result], retry_connecting: bool = True) -> Result:  # pyright: ignore[reportReturnType]
    """What `call()` returns, tried up to three times where a failure is transient; the last error else.

    retry_connecting: False gives up at once where no connection could be made at all, as on a machine without network.
    """
    for wait in (*_WAITS, None):
        try:
            return call()
        except Exception as error:
            if wait is None or not is_transient(error) or (never_connected(error) and not retry_connecting):
                raise
            time.sleep(wait)


def one_line(error: Exception | str) -> str:
    """An error's text in one line of at most 300 characters, without tokens or the queries of signed links."""
    text = " ".join(str(error).split())
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text[:300] or type(error).__name__
