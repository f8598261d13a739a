"""Every error this package raises on purpose. Nothing else lives here.

    TriModeError
    ├── ConfigError (ValueError)                a config, a file of the user, an argument of a run
    ├── CheckpointError                         weights or a checkpoint folder that cannot be used
    ├── RequestError (ValueError)               one generation request (HTTP 400)
    │   └── ContextError                        it is longer than the context
    ├── CapacityError                           it would not fit (HTTP 413 or 429)
    └── UnsupportedError (NotImplementedError)  valid, but not built

A message names the thing, the value and what is allowed, in one line. `assert` is for our own
mistakes.
"""


class TriModeError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(TriModeError, ValueError):
    """A configuration, or a file it names, is wrong."""


class CheckpointError(TriModeError):
    """A checkpoint is missing, damaged, or of another kind."""


class RequestError(TriModeError, ValueError):
    """A generation request asks for something that is not valid."""


class ContextError(RequestError):
    """A prompt, or a prompt and its new tokens, are longer than allowed.

    Args:
        message: Which numbers do not fit.
        context_len: Tokens that are allowed.
    """

    def __init__(self, message: str, *, context_len: int) -> None:
        super().__init__(message)
        self.context_len = context_len


class CapacityError(TriModeError):
    """A request is valid but does not fit.

    Args:
        message: What does not fit, and what would.
        retry_after_s: Seconds after which it may; None if it never will.
    """

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnsupportedError(TriModeError, NotImplementedError):
    """A request is valid but what it asks for is not built."""
