"""Whose requests are answered: not those that a web page has a visitor's browser send.

A page whose name is made to resolve to this machine (DNS rebinding) shows by the Host header, which names the page's
own; one that sends from elsewhere shows by Origin. Addresses in numbers are no one's name.
"""

import ipaddress
import re
import socket
from urllib.parse import urlsplit

from .refusal import Refusal

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s\[\]:/?#@\\]+)(?::[0-9]{1,5})?")


class Guard:
    """An ASGI application before another: HTTP requests that `wrong_sender` finds are refused here.

    find_hosts(): the names beside an address and localhost that the server goes by, "*" for any. refused(status): told
    of each refusal.
    """

    def __init__(self, app, find_hosts, refused):
        self.app, self.find_hosts, self.refused = app, find_hosts, refused

    async def __call__(self, scope, receive, send):
        """As ASGI has it."""
        from starlette.datastructures import Headers
        from starlette.responses import JSONResponse

        app = self.app
        if scope["type"] == "http" and (refusal := wrong_sender(Headers(scope=scope), self.find_hosts())):
            self.refused(refusal.status)
            app = JSONResponse(refusal.body(), refusal.status)
        await app(scope, receive, send)


def wrong_sender(headers, hosts):
    """The Refusal for a request by its Host and Origin, or None. headers: starlette's; hosts: as Guard's."""
    told = headers.getlist("host")
    found = _HOST.fullmatch(told[0]) if len(told) == 1 else None
    if found is None:
        return Refusal(400, "the request must have one Host header", "invalid_host")
    name = found.group(1).lower()
    if not ("*" in hosts or name in ("localhost", socket.gethostname().lower(), *hosts) or _is_address(name)):
        text = f"{name[:100]} is no name of this server; start it with --allow-host for another"
        return Refusal(403, text, "forbidden_host")
    for origin in headers.getlist("origin"):
        if urlsplit(origin).netloc.lower() != told[0].lower():
            return Refusal(403, "requests of other origins' pages are refused", "forbidden_origin")
    return None


def _is_address(name):
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
