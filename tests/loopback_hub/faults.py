"""Faults that a test asks for: which request misbehaves, and how."""

import socket
import struct
from dataclasses import dataclass

KINDS = ("500", "503", "429", "drop", "lost", "lost500", "cut", "reset", "flip")


@dataclass
class Fault:
    """The `at`-th request from now (1-based), and `times` in a row, misbehave; others are counted only if they match.

    500, 503, 429 answer so without acting; drop and reset end the connection without acting; lost acts and then ends
    it, lost500 acts and answers 500; cut sends half of a GET's body (and is lost for other requests); flip changes
    one bit of a GET's body. `method` and `path` (a part of it) restrict which requests are counted.
    """

    at: int
    kind: str
    times: int = 1
    method: str | None = None
    path: str = ""
    seen: int = 0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"unknown fault {self.kind!r}")

    def strikes(self, method, path):
        """Count this request; the kind of fault that it meets, or None."""
        if self.method not in (None, method) or self.path not in path:
            return None
        self.seen += 1
        return self.kind if self.at <= self.seen < self.at + self.times else None


def flip_bit(chunks, position):
    """The chunks, with one bit of the byte at `position` changed."""
    for chunk in chunks:
        if 0 <= position < len(chunk):
            chunk = chunk[:position] + bytes([chunk[position] ^ 1]) + chunk[position + 1 :]
        position -= len(chunk)
        yield chunk


def close_abruptly(handler, reset):
    """End the handler's connection: with a reset, or as a server that goes away does."""
    handler.close_connection = True
    if reset:
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.rfile.close()
        handler.connection.close()
