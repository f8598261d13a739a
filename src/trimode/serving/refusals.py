"""What goes wrong, as HTTP says it: one clear line in OpenAI's shape."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from trimode.serving.jobs import Failed

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refusal(Exception):
    """A request that gets no answer but this one.

    Args:
        failed: What is said.
        headers: Sent beside it.
    """

    def __init__(self, failed: Failed, *, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(failed.message)
        self.failed = failed
        self.headers = dict(headers or {})


def bad_request(message: str, *, param: str | None = None) -> Refusal:
    """400: the request itself is wrong."""
    return Refusal(Failed(status=400, code="invalid_request", message=message, param=param))


def error_body(failed: Failed) -> dict[str, Any]:
    """OpenAI's error object."""
    default = "server_error" if failed.status >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": failed.message,
            "type": _TYPES.get(failed.status, default),
            "param": failed.param,
            "code": failed.code,
        }
    }


def error_response(failed: Failed, *, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The answer to a request that failed before anything of it was sent."""
    sent = dict(headers or {})
    if failed.retry_after_s is not None:
        sent["Retry-After"] = str(max(math.ceil(failed.retry_after_s), 1))
    return JSONResponse(error_body(failed), status_code=failed.status, headers=sent)
