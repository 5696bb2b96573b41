"""Why a request was not answered with images, in the form that OpenAI's clients read."""


class Refusal(Exception):
    """An answer other than 200: its status, and what the client is told."""

    def __init__(self, status, message, code, param=None, headers=None):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}

    def body(self):
        """{"error": {message, type, param, code}}."""
        kind = "invalid_request_error" if 400 <= self.status < 500 and self.status != 429 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
