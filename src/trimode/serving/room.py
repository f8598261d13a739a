"""Whether a prompt and its new tokens fit the context."""

from __future__ import annotations

from trimode.errors import ContextError


def check_room(context: int, num_prompt: int, num_new: int | None = None) -> None:
    """Look at a prompt alone, which needs room for a token, or with a number of new tokens.

    Raises:
        ContextError: They are more than the context has.
    """
    room = context - num_prompt
    if room < (num_new != 0):
        raise ContextError(
            f"the prompt has {num_prompt} tokens, beyond the context of {context}; allowed: at"
            f" most {context - 1}",
            context_len=context,
        )
    if num_new is not None and num_new > room:
        raise ContextError(
            f"prompt of {num_prompt} tokens + max_new_tokens={num_new} ="
            f" {num_prompt + num_new}, beyond the context of {context}; allowed:"
            f" max_new_tokens of at most {room}",
            context_len=context,
        )
