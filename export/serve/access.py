"""Who may use a server, and from which pages: names, keys, origins, and the proxies whose word is taken."""

import hashlib
import hmac
import ipaddress
import os
import re
import socket
import stat
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from surgery.errors import InputError

from .refusal import Refusal
from .store import PATH as FILES

if TYPE_CHECKING:
    from starlette.datastructures import Headers

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s\[\]:/?#@\\]+)(?::[0-9]{1,5})?")
_LEAST_KEY = 16
_MOST_KEYS = 1 << 20  # bytes of a file of them
_OPEN_PATHS = ("/live", "/health")  # without a key: they tell nothing


@dataclass(frozen=True)
class Access:
    """hosts: the names beside an address and localhost that requests may call the server by, "*" for any.

    keys: the sha256 of each key, one of which a request must have where there are any. admins: likewise, of which a
    request must have one to have a model loaded anew. origins: those of pages that may call it, "*" for any. proxies:
    networks whose X-Forwarded-* is believed. log: the path of a file to which each request's line of JSON is added;
    log_prompts: with the prompt, and in the spans if it is `traced`.
    """

    hosts: tuple[str, ...] = ()
    keys: tuple[bytes, ...] = ()
    admins: tuple[bytes, ...] = ()
    origins: tuple[str, ...] = ()
    proxies: tuple[str, ...] = ()
    log: str | None = None
    log_prompts: bool = False
    traced: bool = False

    def check(self) -> None:
        """Raise InputError for what cannot be, naming its option."""
        if set(self.keys).intersection(self.admins):
            raise InputError("a key of --admin-key-file is in --api-key-file too, so that every client would have it")
        for origin in self.origins:
            parts = urlsplit(origin)
            if origin != "*" and (parts.scheme not in ("http", "https") or not parts.netloc or parts.path):
                raise InputError(f"--cors-origin {origin}: write it as https://app.example, or *")
        for proxy in self.proxies:
            try:
                ipaddress.ip_network(proxy)
            except ValueError as error:
                raise InputError(f"--trust-proxy {proxy}: write an address, or a network such as 10.0.0.0/8") from error
        if self.log_prompts and not self.log and not self.traced:
            raise InputError("--log-prompts goes with --access-log or --otel")
        if self.log:
            try:
                with open(self.log, "a"):
                    pass
            except OSError as error:
                raise InputError(f"--access-log {self.log} cannot be written: {error.strerror}") from error

    def is_proxy(self, client: str | None) -> bool:
        """Whether what a client at an address says of others is believed."""
        try:
            address = ipaddress.ip_address(client or "")
        except ValueError:
            return False
        return any(address in ipaddress.ip_network(proxy) for proxy in self.proxies)

    def allows_origin(self, origin: str) -> bool:
        """Whether pages of another origin may call the server."""
        return "*" in self.origins or origin in self.origins

    def refusal(self, path: str, headers: "Headers") -> Refusal | None:
        """The Refusal of a request by its headers, or None. headers: starlette's."""
        return wrong_sender(headers, self) or self._wrong_key(path, headers)

    def _wrong_key(self, path, headers):
        if not self.keys or path in _OPEN_PATHS or path.startswith(FILES):
            return None
        if _has_one(headers, (*self.keys, *self.admins)):
            return None
        told = "authorization" in headers
        text = "the API key is wrong" if told else "an API key is needed: Authorization: Bearer KEY"
        return Refusal(401, text, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def check_admin(self, headers: "Headers") -> None:
        """Raise Refusal for a request without one of the admins' keys."""
        if not self.admins:
            text = "it takes a key of an administrator: start the server with --admin-key-file, or send SIGHUP"
            raise Refusal(403, text, "no_admin")
        if not _has_one(headers, self.admins):
            text = "this takes one of the keys of --admin-key-file"
            raise Refusal(401, text, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _has_one(headers, known):
    """Whether a request has one of the keys; all are compared, so that the time tells nothing."""
    kind, _, key = headers.get("authorization", "").partition(" ")
    digest = hashlib.sha256(key.strip().encode()).digest()
    return bool(sum(hmac.compare_digest(digest, one) for one in known)) and kind.lower() == "bearer"


def read_keys(path: str | Path, option: str = "--api-key-file") -> tuple[bytes, ...]:
    """The sha256 of each key of a file, which has one a line; # begins a comment. Raises InputError by its option."""
    try:
        with open(path, "rb") as file:
            lines = file.read(_MOST_KEYS).decode("utf-8-sig").splitlines()
            mode = os.fstat(file.fileno()).st_mode
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise InputError(f"{option} {path} cannot be read: {reason}") from error
    if stat.S_ISREG(mode) and mode & stat.S_IROTH:
        text = "can be read by everyone on this machine; chmod 600 keeps it to you"
        print(f"surgery serve: {option} {path} {text}", file=sys.stderr)
    keys = dict.fromkeys(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not keys:
        raise InputError(f"{option} {path} has no key: write one a line")
    for number, key in enumerate(keys, 1):
        if len(key) < _LEAST_KEY or not key.isascii() or not key.isprintable() or " " in key:
            what = f"must have {_LEAST_KEY} characters of ASCII or more, and no space; openssl rand -hex 32 makes one"
            raise InputError(f"{option} {path}: key {number} {what}")
    return tuple(hashlib.sha256(key.encode()).digest() for key in keys)


def wrong_sender(headers: "Headers", access: Access) -> Refusal | None:
    """The Refusal for a request by its Host and Origin, or None."""
    told = headers.getlist("host")
    found = _HOST.fullmatch(told[0]) if len(told) == 1 else None
    if found is None:
        return Refusal(400, "the request must have one Host header", "invalid_host")
    name = found.group(1).lower()
    known = ("localhost", socket.gethostname().lower(), *access.hosts)
    if not ("*" in access.hosts or name in known or _is_address(name)):
        text = f"{name[:100]} is no name of this server; start it with --allow-host for another"
        return Refusal(403, text, "forbidden_host")
    for origin in headers.getlist("origin"):
        if _netloc(origin) != told[0].lower() and not access.allows_origin(origin):
            text = "requests of other origins' pages are refused; --cors-origin allows one"
            return Refusal(403, text, "forbidden_origin")
    return None


def _netloc(origin):
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:  # "http://["
        return None


def _is_address(name):
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def as_forwarded(scope: dict[str, Any], access: Access) -> dict[str, Any]:
    """An ASGI scope with the host, scheme and address that a proxy tells of its client, where its word is taken."""
    client = scope.get("client")
    if not access.proxies or not access.is_proxy(client[0] if client else None):
        return scope
    names = {b"x-forwarded-for": "for", b"x-forwarded-proto": "proto", b"x-forwarded-host": "host"}
    told = {names[name]: value.decode("latin-1") for name, value in scope["headers"] if name in names}
    scope = dict(scope)
    if told.get("proto") in ("http", "https"):
        scope["scheme"] = told["proto"]
    if "host" in told:
        kept = [(name, value) for name, value in scope["headers"] if name != b"host"]
        scope["headers"] = [*kept, (b"host", _last(told["host"]).encode("latin-1"))]
    if "for" in told and (address := _client(told["for"], access)):
        scope["client"] = (address, 0)
    return scope


def _last(listed: str) -> str:
    return listed.rpartition(",")[2].strip()


def _client(listed: str, access: Access) -> str | None:
    """The nearest address that is no trusted proxy: what stands further to the left anyone may have written."""
    addresses: Sequence[str] = [one.strip() for one in listed.split(",")]
    return next((one for one in reversed(addresses) if _is_address(one) and not access.is_proxy(one)), None)
