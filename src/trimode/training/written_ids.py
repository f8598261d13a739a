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
    tokenizer: PreTrainedTokenizerFast,
) -> dict[str, list[int]] | None:
    """The tokens of a record by field, or None if it has none.

    Args:
        fields: The record.
        prompt_text: The conversation up to its last answer, as the template renders it.
        answer_text: The last answer.
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
    if answer_ids[-1] == tokenizer.eos_token_id:
        answer_ids = answer_ids[:-1]
    spelled = [_spelled(tokenizer, ids) for ids in (prompt_ids, answer_ids)]
    for name, text, wanted in zip(FIELDS, spelled, (prompt_text, answer_text), strict=True):
        if text.rstrip(_CUT) != wanted.rstrip(_CUT):
            raise CorruptRecordError(
                f"`{name}` spells another text than the messages: another tokenizer or template "
                "wrote it (take_ids=false encodes the messages)"
            )
    return found


def _spelled(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text
