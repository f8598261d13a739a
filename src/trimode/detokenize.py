"""Tokens to text while they come: what is settled, and what a later token may still change."""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """Text of token ids, without special tokens."""
    return tokenizer.decode(
        list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


class GrowingText:
    """Text of a growing list of tokens, handed out once no later token can change it.

    What may change: a half character at the end (decoded as U+FFFD), and a run of single-byte
    tokens, which sentencepiece tokenizers decode as a whole. Only the newest tokens are decoded.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []  # the newest tokens, after some of known text for context
        self._num_known = 0  # tokens of the window, from its start, whose text is out
        self._num_shown = 0  # characters of the window's text that are out

    def push(self, token_ids: Sequence[int]) -> str:
        """Take the next tokens; returns the text they settle, possibly none."""
        if not token_ids:
            return ""
        self._window += token_ids
        text = decode(self._tokenizer, self._window)
        if _BYTE_TOKEN.fullmatch(str(self._tokenizer.convert_ids_to_tokens(self._window[-1]))):
            return ""
        if text.endswith("\ufffd"):
            piece = text[self._num_shown : -1]
            self._num_shown += len(piece)
            return piece
        piece = text[self._num_shown :]
        if piece:
            self._window = self._window[self._num_known :]
            self._num_known = len(self._window)
            self._num_shown = len(decode(self._tokenizer, self._window))
        return piece

    @property
    def rest(self) -> str:
        """Text of the tokens pushed so far that `push` did not hand out."""
        return decode(self._tokenizer, self._window)[self._num_shown :]


class StandingText:
    """Text of a growing list of tokens as a reader may have it: nothing that a later token can
    change, nothing that a stop string may yet take back.

    Args:
        tokenizer: Of the model.
        stop: The strings that end the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, stop: Sequence[str] = ()) -> None:
        self._text = GrowingText(tokenizer)
        self._stop = stop
        self._held = ""
        self._num_given = 0

    def push(self, token_ids: Sequence[int]) -> str:
        """Take the next tokens; returns the text that now stands, possibly none."""
        self._held += self._text.push(token_ids)
        length = free_len(self._held, self._stop)
        piece, self._held = self._held[:length], self._held[length:]
        self._num_given += length
        return piece

    def finish(self, text: str) -> str:
        """What of the final text, all of it, was not given yet."""
        rest, self._num_given = text[self._num_given :], len(text)
        return rest


def free_len(text: str, stop: Sequence[str]) -> int:
    """Characters of `text` that cannot belong to a stop string, whatever follows."""
    for start in range(len(text)):
        if any(string.startswith(text[start : start + len(string)]) for string in stop):
            return start
    return len(text)
