"""Why a job ended without a text, in the words of its request."""

from __future__ import annotations

import re

from trimode.errors import CapacityError, ContextError
from trimode.serving.draining import SHUTTING_DOWN
from trimode.serving.jobs import Failed, Job

ABORTS = {
    "cancelled": SHUTTING_DOWN,
    "deadline": Failed(status=504, code="deadline", message="the request's time was up"),
    "non_finite": Failed(
        status=500, code="internal_error", message="the network gave non-finite numbers"
    ),
    "no_token": Failed(
        status=400,
        code="invalid_request",
        message="what was asked for (grammar, logit_bias, ...) leaves no token to go on with",
    ),
}
TOO_SLOW = Failed(status=408, code="too_slow", message="events came faster than they were read")
BROKEN = Failed(status=500, code="internal_error", message="the model broke down; see the log")
GIVEN_UP = Failed(
    status=503,
    code="unavailable",
    message="the model broke down and takes no requests; see the log, and start the server anew",
    retry_after_s=5,
)

_JSON = {"None": "null", "True": "true", "False": "false"}


def no_room(job: Job, error: CapacityError) -> Failed:
    """The end of a job that does not fit, now or ever."""
    message = _in_words_of(job, error)
    if error.retry_after_s is None:
        return Failed(status=413, code="too_large", message=message, param=_param(job, message))
    return Failed(status=429, code="overloaded", message=message, retry_after_s=error.retry_after_s)


def refused(job: Job, error: Exception) -> Failed:
    """The end of a job that is not valid."""
    message = _in_words_of(job, error)
    param = _param(job, message)
    if isinstance(error, ContextError):  # clients shorten a prompt by this code, or by these words
        message += f"; this model's maximum context length is {error.context_len} tokens"
        return Failed(status=400, code="context_length_exceeded", message=message, param=param)
    return Failed(status=400, code="invalid_request", message=message, param=param)


def _in_words_of(job: Job, error: Exception) -> str:
    """A message that speaks of arguments in Python, by the request's fields and in JSON."""
    given = {*job.options, *({*job.options.get("chat_template_kwargs", ())} & {"enable_thinking"})}
    words = {**_JSON, **{name: job.names[name] for name in given if name in job.names}}
    return re.sub(rf"\b({'|'.join(words)})\b", lambda found: words[found[0]], str(error))


def _param(job: Job, message: str) -> str | None:
    """The first field of the request that a message names, else what the text is made from."""
    fields = {job.names.get(name, name) for name in job.options} | {"end_think_token_id"}
    named = (word for word in re.findall(r"\w+", message) if word in fields)
    return next(named, job.names.get("inputs"))
