"""Conversations that come with the tokens that the model wrote, as `trimode selfgen` leaves them.

A text can be cut into tokens in more than one way, and a model does not always choose the
tokenizer's. What is learned from a model's own text must be the tokens that it chose.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerFast

from trimode.training.corrupt_records import CorruptRecordError

FIELDS = ("prompt_ids", "answer_ids")
"""Of a record: the tokens up to the last answer, and those of the answer."""

_CUT = "\ufffd"
"""Shown for the bytes of a character that an answer was cut in."""


def written_ids(
    fields: dict[str, Any],
    *,
    prompt_text: str,
    answer_text: str,
    stop: str | None,
    tokenizer: PreTrainedTokenizerFast,
) -> dict[str, list[int]] | None:
    """The tokens of a record by field, or None if it has none.

    Args:
        fields: The record.
        prompt_text: The conversation up to its last answer, as the template renders it.
        answer_text: The last answer.
        stop: The string that ends a turn; None where a special token does.
        tokenizer: What the tokens must spell these texts in.

    Raises:
        CorruptRecordError: One field without the other, no token ids, or those of another text or
            tokenizer.
    """
    given = [name for name in FIELDS if fields.get(name) is not None]
    if not given:
        return None
    if len(given) == 1:
        raise CorruptRecordError(f"`{given[0]}` is there, but {' and '.join(FIELDS)} go together")
    found: dict[str, list[int]] = {}
    for name in FIELDS:
        ids = fields[name]
        is_good = isinstance(ids, list) and bool(ids) and all(type(i) is int for i in ids)
        if not is_good or not 0 <= min(ids) <= max(ids) < len(tokenizer):
            raise CorruptRecordError(f"`{name}` holds no token ids of the tokenizer")
        found[name] = list(ids)
    prompt_ids, answer_ids = (found[name] for name in FIELDS)
    is_prompt = _is_same(_spelled(tokenizer, prompt_ids), prompt_text)
    if not is_prompt and not _is_encoded(tokenizer, prompt_text, prompt_ids):
        raise _other_text(FIELDS[0])
    if _is_marker(tokenizer, answer_ids[-1]):
        answer_ids = answer_ids[:-1]
    answer = _spelled(tokenizer, answer_ids)
    if stop is not None:
        answer = answer.partition(stop)[0]
    if not _is_same(answer, answer_text):
        raise _other_text(FIELDS[1])
    return found


def _is_same(text: str, wanted: str) -> bool:
    return text.rstrip(_CUT) == wanted.rstrip(_CUT)


def _is_marker(tokenizer: PreTrainedTokenizerFast, token_id: int) -> bool:
    """Whether a token is a special one, which ends an answer without being its text."""
    token = tokenizer.added_tokens_decoder.get(token_id)
    return token is not None and bool(token.special)


def _is_encoded(tokenizer: PreTrainedTokenizerFast, text: str, ids: list[int]) -> bool:
    """Whether the tokenizer cuts a text so; it may normalise what it cuts."""
    backend = tokenizer.backend_tokenizer
    before = backend.encode_special_tokens
    backend.encode_special_tokens = False
    try:
        return bool(backend.encode(text, add_special_tokens=False).ids == ids)
    finally:
        backend.encode_special_tokens = before


def _other_text(name: str) -> CorruptRecordError:
    return CorruptRecordError(
        f"`{name}` spells another text than the messages: another tokenizer or template wrote it "
        "(take_ids=false encodes the messages)"
    )


def _spelled(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text
