"""Images that were answered as a url: kept in memory for a while, and given to whoever has the signed address."""

import hashlib
import hmac
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable

from .refusal import Refusal

PATH = "/v1/images/files/"


class Store:
    """At most so many bytes for so many seconds; the oldest goes first. Its key is its own, so no address outlives it.

    clock: seconds since 1970.
    """

    def __init__(self, keep_bytes: int, keep_seconds: float, clock: Callable[[], float] = time.time) -> None:
        self._most, self._seconds, self._clock = keep_bytes, keep_seconds, clock
        self._files = OrderedDict()  # name -> (expires, content, media type), oldest first
        self._key = secrets.token_bytes(32)
        self.bytes = 0

    def put(self, content: bytes, media_type: str) -> str:
        """The path, with its query, at which a file is found; Refusal for one that is larger than the store."""
        if len(content) > self._most:
            text = f"the image has {len(content)} bytes, more than are kept; ask for b64_json"
            raise Refusal(507, text, "too_large", "response_format")
        self._drop_expired()
        while self.bytes + len(content) > self._most:
            self._drop(next(iter(self._files)))
        name, expires = secrets.token_urlsafe(16), int(self._clock() + self._seconds) + 1
        self._files[name] = expires, content, media_type
        self.bytes += len(content)
        return f"{PATH}{name}?expires={expires}&signature={self._signature(name, str(expires))}"

    def get(self, name: str, expires: str, signature: str) -> tuple[bytes, str]:
        """(content, media type) of a path's file; Refusal for a wrong signature, and for what is kept no more."""
        if not hmac.compare_digest(self._signature(name, expires).encode(), signature.encode()):
            raise Refusal(403, "the address is not one that this server signed", "invalid_signature")
        self._drop_expired()
        if name not in self._files:
            raise Refusal(404, "the image is not kept any more: draw it again from its seed", "expired")
        _, content, media_type = self._files[name]
        return content, media_type

    def _signature(self, name, expires):
        return hmac.new(self._key, f"{name} {expires}".encode(), hashlib.sha256).hexdigest()

    def _drop_expired(self):
        now = self._clock()
        while self._files and next(iter(self._files.values()))[0] <= now:
            self._drop(next(iter(self._files)))

    def _drop(self, name):
        _, content, _ = self._files.pop(name)
        self.bytes -= len(content)
