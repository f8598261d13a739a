"""Tokens to text: always behind the text before them, and, while they come, what is settled.

A tokenizer's decoder may treat the beginning of a text in its own way (sentencepiece's drops one
space), and a token may be half a character. So new tokens are decoded together with some of the
prompt, and the prompt's characters are left out.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from trimode.vocabulary import Vocabulary

_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
_HALF = "\ufffd"


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """Text of token ids that begin a text, without special tokens."""
    return tokenizer.decode(
        list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


@dataclass(frozen=True, slots=True)
class TextBefore:
    """What stands before new tokens.

    Attributes:
        token_ids: That are decoded with them.
        num_chars: Characters of what comes out that are not new.
    """

    token_ids: tuple[int, ...] = ()
    num_chars: int = 0


def text_before(
    vocabulary: Vocabulary, prompt_ids: Sequence[int], taken_ids: Sequence[int] = ()
) -> TextBefore:
    """Of a prompt, back to its last token that decodes by itself: no control token, no single byte,
    no half character.

    Args:
        vocabulary: Of the tokenizer.
        prompt_ids: As fed.
        taken_ids: That stood behind and will be chosen anew.
    """
    context = _context(vocabulary, prompt_ids)
    return TextBefore(context, len(settled_text(vocabulary, context, taken_ids)))


def settled_text(
    vocabulary: Vocabulary, token_ids: Sequence[int], taken_ids: Sequence[int] = ()
) -> str:
    """Text of token ids that begin a text, without half a character at its end: what completes the
    character is new, and so is all of it.

    Args:
        vocabulary: Of the tokenizer.
        token_ids: That stay.
        taken_ids: That stand behind and will be chosen anew.
    """
    known = [*token_ids, *taken_ids]
    text = decode(vocabulary.tokenizer, known)
    if not _ends_in_half(vocabulary.bytes_of(known)):
        return text
    kept = list(known)
    while kept and _is_byte(vocabulary.tokenizer, kept[-1]):
        kept.pop()
    return text.removesuffix(_HALF) if kept == known else decode(vocabulary.tokenizer, kept)


def _context(vocabulary: Vocabulary, prompt_ids: Sequence[int]) -> tuple[int, ...]:
    start = len(prompt_ids)
    while start > 0 and _is_byte(vocabulary.tokenizer, prompt_ids[start - 1]):
        start -= 1
    single = prompt_ids[start:]
    num_whole = _num_whole(vocabulary.bytes_of(single))
    if num_whole and vocabulary.letter is not None:
        # Single bytes are decoded as a whole, so that new ones could change these characters.
        return (vocabulary.letter, *single[num_whole:])
    while start > 0:
        start -= 1
        if _stands_alone(vocabulary, prompt_ids[start]):
            break
    return tuple(prompt_ids[start:])


def _ends_in_half(octets: bytes) -> bool:
    """Whether bytes end in the beginning of a character."""
    decoder = codecs.getincrementaldecoder("utf-8")("ignore")
    decoder.decode(octets)
    return bool(decoder.getstate()[0])


def _num_whole(octets: bytes) -> int:
    """How many of the first bytes are whole characters, if the rest may become one."""
    for number in range(len(octets), max(len(octets) - 4, 0), -1):
        try:
            octets[:number].decode()
        except UnicodeDecodeError:
            continue
        return number
    return 0


def _is_byte(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bool:
    return bool(_BYTE_TOKEN.fullmatch(str(tokenizer.convert_ids_to_tokens(token_id))))


def _stands_alone(vocabulary: Vocabulary, token_id: int) -> bool:
    if token_id in vocabulary.control_ids or _is_byte(vocabulary.tokenizer, token_id):
        return False
    text = decode(vocabulary.tokenizer, [token_id])
    return bool(text) and _HALF not in text


class GrowingText:
    """Text of a growing list of tokens, handed out once no later token can change it.

    What may change: a half character at the end (decoded as U+FFFD), and a run of single-byte
    tokens, which sentencepiece tokenizers decode as a whole. Only the newest tokens are decoded.

    Args:
        tokenizer: Of the model.
        before: What stands before the tokens.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, before: TextBefore = TextBefore()
    ) -> None:
        self._tokenizer = tokenizer
        self._window = list(before.token_ids)  # the newest tokens, after some of known text
        self._num_known = len(self._window)  # tokens of the window, from its start, that are known
        self._num_shown = before.num_chars  # characters of the window's text that are known

    def push(self, token_ids: Sequence[int]) -> str:
        """Take the next tokens; returns the text they settle, possibly none."""
        if not token_ids:
            return ""
        self._window += token_ids
        text = decode(self._tokenizer, self._window)
        # Control tokens are not decoded, so the run of single bytes goes on behind them.
        last = next((i for i in reversed(self._window) if decode(self._tokenizer, [i])), None)
        if last is not None and _is_byte(self._tokenizer, last):
            return ""
        if text.endswith(_HALF):
            piece = text[self._num_shown : -1]
            self._num_shown += len(piece)
            return piece
        piece = text[self._num_shown :]
        if piece:
            self._window = self._window[self._num_known :]
            self._num_known = len(self._window)
            self._num_shown = len(decode(self._tokenizer, self._window))
        return piece

    def whole(self, token_ids: Sequence[int]) -> str:
        """All of it, of which nothing was pushed yet."""
        return decode(self._tokenizer, [*self._window, *token_ids])[self._num_shown :]

    @property
    def rest(self) -> str:
        """Text of the tokens pushed so far that `push` did not hand out."""
        return decode(self._tokenizer, self._window)[self._num_shown :]


class StandingText:
    """Text of a growing list of tokens as a reader may have it: nothing that a later token can
    change, nothing that a stop string may yet take back.

    Args:
        text: The same text, which nobody else pushes.
        stop: The strings that end it.
    """

    def __init__(self, text: GrowingText, *, stop: Sequence[str] = ()) -> None:
        self._text = text
        self._stop = stop
        self._held = ""
        self._num_given = 0

    def push(self, token_ids: Sequence[int], *, num_deaf: int = 0) -> str:
        """Take the next tokens; returns the text that now stands, possibly none.

        Args:
            token_ids: Some tokens.
            num_deaf: Characters of all the text, from its start, within which no string counts.
        """
        self._held += self._text.push(token_ids)
        length = free_len(self._held, self._stop, num_deaf=num_deaf - self._num_given)
        piece, self._held = self._held[:length], self._held[length:]
        self._num_given += length
        return piece

    def finish(self, text: str) -> str:
        """What of the final text, all of it, was not given yet."""
        rest, self._num_given = text[self._num_given :], len(text)
        return rest


def free_len(text: str, stop: Sequence[str], *, num_deaf: int = 0) -> int:
    """Characters of `text` that cannot belong to a stop string, whatever follows.

    Args:
        text: Some text.
        stop: The strings.
        num_deaf: Characters of `text`, from its start, within which no string counts.
    """
    for start in range(len(text)):
        if any(
            string.startswith(text[start : start + len(string)])
            for string in stop
            if start + len(string) > num_deaf
        ):
            return start
    return len(text)
