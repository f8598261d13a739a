"""The bytes of every ordinary token, found by their beginnings."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Mapping
from functools import cached_property


class TokenBytes:
    """What the tokens of a vocabulary stand for inside of a text.

    Args:
        table: Id of every ordinary token -> its bytes, at least one. Control tokens and padded rows
            are not among them.
        hidden: Of these tokens, those that are not found by their bytes.
    """

    def __init__(self, table: Mapping[int, bytes], *, hidden: Collection[int] = ()) -> None:
        self._table = dict(table)
        self._shown = [(octets, i) for i, octets in self._table.items() if i not in hidden]
        ranked = sorted(self._shown)
        self._keys = [octets for octets, _ in ranked]
        self._ids = [token_id for _, token_id in ranked]
        self.longest = max(map(len, self._keys), default=0)
        """Bytes of the longest token."""

    def __contains__(self, token_id: int) -> bool:
        return token_id in self._table

    def __getitem__(self, token_id: int) -> bytes:
        return self._table[token_id]

    def spelling(self, octets: bytes) -> list[int]:
        """Tokens of just these bytes: one, as a rule, or none."""
        return self._ids[bisect_left(self._keys, octets) : bisect_left(self._keys, octets + b"\0")]

    def extending(self, octets: bytes) -> list[int]:
        """Tokens that begin with these bytes and go on."""
        first = bisect_left(self._keys, octets + b"\0")
        return self._ids[first : bisect_left(self._keys, self._behind(octets))]

    def beginning(self, octets: bytes) -> list[int]:
        """Tokens that begin with these bytes."""
        return [*self.spelling(octets), *self.extending(octets)]

    def ending(self, octets: bytes) -> list[int]:
        """Tokens that end with these bytes."""
        keys, ids = self._turned
        first = bisect_left(keys, octets[::-1])
        return ids[first : bisect_left(keys, self._behind(octets[::-1]))]

    @cached_property
    def _turned(self) -> tuple[list[bytes], list[int]]:
        """Bytes from the last to the first, sorted, and whose they are."""
        turned = sorted((octets[::-1], token_id) for octets, token_id in self._shown)
        return [octets for octets, _ in turned], [token_id for _, token_id in turned]

    def _behind(self, octets: bytes) -> bytes:
        """Greater than whatever begins with these bytes."""
        return octets + b"\xff" * (self.longest + 1)
