"""A conversation as a prompt: the chat template up to the answer, and what ends the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from trimode.errors import RequestError

_ANSWER = "\N{OBJECT REPLACEMENT CHARACTER}"
_ROLES = ("system", "user", "assistant")

Messages = Sequence[Mapping[str, str]]


def answering(
    tokenizer: PreTrainedTokenizerBase | None, messages: Messages, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of `TriModeLM.generate` and `.stream` that answer a conversation.

    Args:
        tokenizer: With a chat template.
        messages: `{"role": ..., "content": ...}`, the last one not the assistant's.
        options: Other arguments.

    Returns:
        `options` with the `prompt` (token ids), and with the end of the assistant's turn among
        `stop_token_ids`, or among `stop` where no token marks it.

    Raises:
        RequestError: No chat template, or one that refuses the conversation.
    """
    if tokenizer is None or not tokenizer.chat_template:
        raise RequestError(
            "a conversation needs a tokenizer with a chat template, and this model has none; give "
            "a model that was tuned on conversations, or a LoRA that was"
        )
    for number, message in enumerate(messages, start=1):
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES or not isinstance(content, str):
            raise RequestError(
                f"message {number} has role {role!r} and content of type "
                f"{type(content).__name__}; allowed: {', '.join(_ROLES)}, and a string"
            )
    if not messages or messages[-1]["role"] == "assistant":
        raise RequestError("there is nothing to answer: the last message must not be assistant's")
    plain = [dict(message) for message in messages]
    prompt = _render(tokenizer, plain, add_generation_prompt=True)
    answered = _render(tokenizer, [*plain, {"role": "assistant", "content": _ANSWER}])
    _, _, rest = answered.rpartition(_ANSWER)
    ids = _encode(tokenizer, rest)
    added = tokenizer.added_tokens_decoder
    is_token = bool(ids) and ids[0] in added and added[ids[0]].special
    arguments = {**options, "prompt": _encode(tokenizer, prompt)}
    if is_token:
        arguments["stop_token_ids"] = [*(options.get("stop_token_ids") or ()), ids[0]]
    elif rest.strip():
        stop = options.get("stop") or ()
        arguments["stop"] = [*([stop] if isinstance(stop, str) else stop), rest.strip()]
    return arguments


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **options: bool
) -> str:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        raise RequestError(f"the chat template refuses the conversation: {error}") from error
    assert isinstance(text, str)
    return text


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Special tokens are all the template's; as in transformers, those a message spells count."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
