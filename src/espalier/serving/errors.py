"""Errors that end a request without a prediction."""


class RequestError(Exception):
    """Ends a request with an HTTP status and one sentence: what was given, what is allowed."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class ClientGoneError(Exception):
    """The client closed its connection; nobody is left to answer."""
