"""Strings that end a text, looked for as it grows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_HALF = "\ufffd"


class Growing(Protocol):
    """A text that grows by tokens: `trimode.detokenize.GrowingText`."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Take the next tokens; returns the text they settle, possibly none."""
        ...

    @property
    def rest(self) -> str:
        """Text of the tokens so far that `push` did not hand out."""
        ...


class StopStrings:
    """Follows one text.

    Args:
        stop: The strings, at least one.
        text: The same text, which nobody else pushes.

    Attributes:
        num_deaf: Characters of the text, from its start, within which no string counts.
    """

    def __init__(self, stop: Sequence[str], text: Growing | None) -> None:
        if text is None:
            raise AssertionError("stop strings need a text")
        self._stop = stop
        self._text = text
        self._longest = max(map(len, stop))
        self._tail = ""  # of the settled text
        self._num_before = 0  # characters before the tail
        self.num_deaf = 0

    def push(self, token_id: int, *, is_deaf: bool = False) -> int | None:
        """Take the next token.

        Args:
            token_id: The token.
            is_deaf: Whether strings that the text holds by now never count.

        Returns:
            Where the first string begins that the text now holds, in characters; None without one.
        """
        self._tail += self._text.push([token_id])
        shown = self._tail + self._text.rest
        if is_deaf:  # half a character has not come yet
            self.num_deaf = self._num_before + len(shown.rstrip(_HALF))
        deaf = self.num_deaf - self._num_before
        found = [
            at for stop in self._stop if (at := shown.find(stop, max(deaf - len(stop) + 1, 0))) >= 0
        ]
        if found and not is_deaf:
            return self._num_before + min(found)
        num_done = max(len(self._tail) - self._longest + 1, 0)
        self._tail = self._tail[num_done:]
        self._num_before += num_done
        return None
