"""A conversation as a prompt: the chat template up to the next turn, and what ends that turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from trimode.errors import RequestError

_STAND_IN = "\N{OBJECT REPLACEMENT CHARACTER}"
_OTHER_STAND_IN = "\N{INTERLINEAR ANNOTATION ANCHOR}"
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
    tokenizer = _with_template(tokenizer)
    if "prompt" in options:
        raise RequestError("prompt is given beside messages; allowed: one of them")
    plain = _checked(messages)
    # The answer and one more message, so that it shows what comes between the two.
    turns = [{"role": "assistant", "content": _STAND_IN}, {"role": "user", "content": _STAND_IN}]
    parts = _render(tokenizer, [*plain, *turns]).rsplit(_STAND_IN, 2)
    if len(parts) < 3:
        raise RequestError("the chat template leaves out what assistant or user say")
    prompt = _encode(tokenizer, _render(tokenizer, plain, add_generation_prompt=True))
    return {**options, "prompt": prompt} | _ended_by(tokenizer, parts[1], options)


def asking(
    tokenizer: PreTrainedTokenizerBase | None,
    options: Mapping[str, Any],
    *,
    system: str | None = None,
) -> dict[str, Any]:
    """Arguments of `TriModeLM.generate` that have the model write the user's first message.

    Args:
        tokenizer: With a chat template.
        options: Other arguments.
        system: The system message; None leaves it to the template.

    Returns:
        As `answering`: the prompt is the template up to where the message begins, and the end of
        the user's turn ends the text.

    Raises:
        RequestError: No chat template, or one that does not show where the message begins or ends.

    Source:
        Magpie (Xu et al. 2024, arXiv 2406.08464).
    """
    tokenizer = _with_template(tokenizer)
    before = [] if system is None else [{"role": "system", "content": system}]
    found = set()
    for user, assistant in ((_STAND_IN, _OTHER_STAND_IN), (_OTHER_STAND_IN, _STAND_IN)):
        turns = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        opening, _, rest = _render(tokenizer, [*before, *turns]).partition(user)
        ending = rest.partition(assistant)[0]
        found.add((opening, ending if rest and user not in rest else ""))
    opening, ending = found.pop()
    if found or not opening or not ending.strip():
        raise RequestError(
            "the chat template does not show where the user's message begins and ends, so the"
            " model cannot write one; give it prompts"
        )
    prompt = _encode(tokenizer, opening)
    return {**options, "prompt": prompt} | _ended_by(tokenizer, ending, options)


def _with_template(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None or not tokenizer.chat_template:
        raise RequestError(
            "a conversation needs a tokenizer with a chat template, and this model has none; give "
            "a model that was tuned on conversations, or a LoRA that was"
        )
    return tokenizer


def _ended_by(
    tokenizer: PreTrainedTokenizerBase, ending: str, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The options that end a text where the template ends the turn; none if nothing marks that."""
    marker = _first_special(tokenizer, ending)
    if marker is not None:
        return {"stop_token_ids": _with(options.get("stop_token_ids"), marker)}
    if ending.strip():
        return {"stop": _with(options.get("stop"), ending.strip().splitlines()[0])}
    return {}


def _checked(messages: Messages) -> list[dict[str, str]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise RequestError(f"messages is a {type(messages).__name__}; allowed: a list of mappings")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            kind = type(message).__name__
            raise RequestError(f"message {number} is a {kind}; allowed: a mapping")
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES or not isinstance(content, str):
            raise RequestError(
                f"message {number} has role {role!r} and content of type "
                f"{type(content).__name__}; allowed: {', '.join(_ROLES)}, and a string"
            )
        if any("\ud800" <= sign <= "\udfff" for sign in content):
            raise RequestError(f"message {number} is not valid Unicode; convert it first")
    if not messages or messages[-1]["role"] == "assistant":
        raise RequestError("there is nothing to answer: the last message must not be assistant's")
    return [dict(message) for message in messages]


def _first_special(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    """The special token that a text begins with, white space aside; None if it is other text."""
    added = tokenizer.added_tokens_decoder
    for token_id in _encode(tokenizer, text):
        if token_id in added and added[token_id].special:
            return token_id
        if tokenizer.decode([token_id]).strip():
            return None
    return None


def _with(values: Any, one: Any) -> Any:
    """A caller's list with one more; what is no list stays as it is, for `generate` to refuse."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if values is None or isinstance(values, str):
        return [one] if values is None else [values, one]
    return [*values, one] if isinstance(values, Sequence) else values


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **options: bool
) -> str:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # a template is a program of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RequestError(f"the chat template refuses the conversation: {reason}") from error
    assert isinstance(text, str)
    return text


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Special tokens are all the template's; as in transformers, those a message spells count."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
