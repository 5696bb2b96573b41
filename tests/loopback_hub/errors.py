"""What handlers answer: a Response, or a HubError that becomes one as the Hub words its errors."""

import json
from dataclasses import dataclass, field


@dataclass
class Response:
    """An answer; `body` is bytes, or `chunks` yields `length` bytes."""

    status: int = 200
    body: bytes = b""
    headers: dict = field(default_factory=dict)
    chunks: object = None
    length: int | None = None

    @property
    def size(self):
        """The number of bytes of the body."""
        return len(self.body) if self.length is None else self.length


class HubError(Exception):
    """A refusal, with the X-Error-Code and X-Error-Message that huggingface_hub turns into its exceptions."""

    def __init__(self, status, message, code=None, body=None, **headers):
        super().__init__(message)
        self.status, self.message, self.code, self.body, self.headers = status, message, code, body, headers

    def response(self):
        """The Response that reports the error."""
        headers = {"X-Error-Message": self.message.replace("\n", " "), **self.headers}
        if self.code:
            headers["X-Error-Code"] = self.code
        return answer(self.body or {"error": self.message}, self.status, **headers)


def answer(value, status=200, **headers):
    """A Response with a JSON body."""
    return Response(status, json.dumps(value).encode(), {"Content-Type": "application/json; charset=utf-8", **headers})
