"""The exceptions that become an HTTP status and one line, `{"error": "…"}`."""


class Refusal(Exception):
    """A request that is not answered. The message is one line, `WHERE: what is wrong: the remedy`.

    Attributes:
      status: the HTTP status.
      retry_after: seconds after which the same request may succeed; None if it will not.
    """

    status = 500
    retry_after: int | None = None


class NotFound(Refusal):
    """What a path names is not there."""

    status = 404


class Overloaded(Refusal):
    """The queue is full: the request was not taken."""

    status, retry_after = 429, 1


class NotReady(Refusal):
    """The searcher is not open yet, the server is ending, or the request waited longer than its deadline."""

    status, retry_after = 503, 1


class Invalid(Refusal):
    """A parameter has a value that is not allowed."""

    status = 422
