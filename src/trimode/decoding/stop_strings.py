"""Strings that end a text, looked for as it grows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


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
    """

    def __init__(self, stop: Sequence[str], text: Growing | None) -> None:
        if text is None:
            raise AssertionError("stop strings need a text")
        self._stop = stop
        self._text = text
        self._longest = max(map(len, stop))
        self._tail = ""  # of the settled text
        self._num_before = 0  # characters before the tail

    def push(self, token_id: int) -> int | None:
        """Take the next token.

        Returns:
            Where the first string begins that the text now holds, in characters; None without one.
        """
        self._tail += self._text.push([token_id])
        shown = self._tail + self._text.rest
        found = [at for stop in self._stop if (at := shown.find(stop)) >= 0]
        if found:
            return self._num_before + min(found)
        num_done = max(len(self._tail) - self._longest + 1, 0)
        self._tail = self._tail[num_done:]
        self._num_before += num_done
        return None
