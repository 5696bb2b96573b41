"""Reloading a model: what asks for it, in the gateway's event loop, and what carries it out meet here.

The process that started the server carries it out, since it read and checked the model before; it asks for the next
wish again and again, so that a server whose starter is gone can say so.
"""

import asyncio
from typing import Any

from .refusal import Refusal

_PATIENCE = 20.0


class Reloads:
    """One reload at a time. All methods are called in one event loop.

    patience: seconds after which nobody is there who looks for wishes.
    """

    def __init__(self, patience: float = _PATIENCE) -> None:
        self.patience = patience
        self._wish, self._wished, self._taken = 0, asyncio.Event(), asyncio.Event()
        self._done: asyncio.Future[dict[str, Any]] | None = None

    async def ask(self, index: int) -> dict[str, Any]:
        """Have the model at a place of the server's list loaded anew; what its client is told, or a Refusal.

        The reload goes on when this is cancelled.
        """
        if self._done is not None:
            raise Refusal(409, "a reload is under way; ask again when it is done", "reload_under_way")
        done = self._done = asyncio.get_running_loop().create_future()
        self._wish = index
        self._wished.set()
        try:
            async with asyncio.timeout(self.patience):
                await self._taken.wait()
        except TimeoutError:
            self._wished.clear()
            self._done = None
            text = "the command that started this server carries reloads out, and it is not there: deploy it anew"
            raise Refusal(503, text, "no_reload") from None
        return await asyncio.shield(done)

    async def next(self, seconds: float) -> int | None:
        """The place of a model that is to be loaded anew; None where nobody asks for one in so many seconds.

        It is the same until `tell`, since an answer may be lost on its way.
        """
        try:
            async with asyncio.timeout(seconds):
                await self._wished.wait()
        except TimeoutError:
            return None
        self._taken.set()
        return self._wish

    def tell(self, answer: dict[str, Any] | str) -> None:
        """Tell who asked: what the model is now, or why it serves as before."""
        self._wished.clear()
        self._taken.clear()
        done, self._done = self._done, None
        if done is None or done.done():
            return
        if isinstance(answer, str):
            done.set_exception(
                Refusal(422, f"it serves as before, for the new one is refused: {answer}", "reload_failed")
            )
            done.exception()  # whoever asked may have left
        else:
            done.set_result(answer)
