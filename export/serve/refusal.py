"""An answer other than 200, in OpenAI's form."""

from typing import Any


class Refusal(Exception):
    """An answer other than 200: its status, and what the client is told."""

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """{"error": {message, type, param, code}}."""
        kind = "invalid_request_error" if 400 <= self.status < 500 else "server_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, kind)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def wrong(param: str, reason: str) -> Refusal:
    """The Refusal of a parameter's value."""
    return Refusal(400, f"{param} {reason}", "invalid_value", param)
