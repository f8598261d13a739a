"""What `echo` asks for beside the prompt's text: the log-probabilities of its tokens."""

from __future__ import annotations

from typing import Any

from trimode.serving.refusals import bad_request
from trimode.serving.schemas import CompletionRequest


def add_echo(request: CompletionRequest, options: dict[str, Any]) -> None:
    """Change the arguments of `TriModeLM.generate` where a request sends its prompt back.

    Args:
        request: Checked.
        options: So far. Changed.

    Raises:
        Refusal: 400, naming the field.
    """
    if not request.echo:
        if request.max_tokens == 0:
            allowed = "at least 1, or 0 with echo true"
            raise bad_request(f"max_tokens is 0; allowed: {allowed}", param="max_tokens")
        return
    if request.logprobs is not None and request.heal:
        raise bad_request(
            "heal is true; allowed with echo and logprobs: false, since the answer has the"
            " prompt's own tokens",
            param="heal",
        )
    if request.max_tokens == 0:  # there is nothing to choose, whatever the mode
        options.pop("logprobs", None)
        options.pop("heal", None)
    if request.logprobs is not None or request.max_tokens == 0:
        options["prompt_logprobs"] = request.logprobs or 0
