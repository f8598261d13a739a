"""Who owns which K/V row, and what lies in those that nobody owns: prefixes to start from.

A row that is given back keeps its cells. A sequence whose first tokens are those of another's, and
whose K/V are there, starts behind them: all committed K/V were written in the same view, causally
with the adapter off, so they depend on nothing but the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Ids
from dataclasses import dataclass

from trimode.decoding import Sequence

LEAST_REUSE = 8
"""A shorter prefix is fed again; copying it would gain nothing."""


@dataclass(slots=True)
class _Row:
    """One row.

    Attributes:
        owner: None if it is free.
        left_ids: Tokens whose K/V lie in its first cells, if it is free.
        freed_at: Order in which rows became free.
    """

    owner: Sequence | None
    left_ids: list[int]
    freed_at: int

    @property
    def ids(self) -> list[int]:
        return self.left_ids if self.owner is None else self.owner.committed_ids


class Rows:
    """The rows of a cache.

    Args:
        num_rows: How many there are.
        copy_prefix: Copies the first cells of one row to another: from row, to row, number.
    """

    def __init__(self, num_rows: int, *, copy_prefix: Callable[[int, int, int], None]) -> None:
        self._rows = [_Row(None, [], number) for number in range(num_rows)]
        self._num_freed = num_rows
        self._copy_prefix = copy_prefix

    @property
    def num_free(self) -> int:
        return sum(row.owner is None for row in self._rows)

    def take(self, seq: Sequence, token_ids: Ids[int]) -> int:
        """Give a free row to a sequence, and set its length to what of its prefix is there.

        Args:
            seq: Its length is 0.
            token_ids: What it is about to feed. The last of them is always fed, and those whose
                answers score the prompt.

        Returns:
            The row.
        """
        assert seq.length == 0
        most = None if seq.scores is None else seq.scores.most_reused
        source, num_shared = self._longest_shared(list(token_ids[:-1])[:most])
        target = self._oldest_free()
        if source is not None:
            found = self._rows[source]
            # One that would lose most of what it holds goes on being there for others.
            if found.owner is None and 2 * num_shared >= len(found.left_ids):
                target = source
            if target != source:
                self._copy_prefix(source, target, num_shared)
            seq.length = num_shared
            seq.stats.reused_tokens += num_shared
            if not (seq.new_ids or seq.stats.num_preemptions):
                seq.stats.cached_tokens = num_shared
        self._rows[target].owner = seq
        return target

    def give_back(self, row: int, *, is_clean: bool = True) -> None:
        """Its owner has ended or has to wait; what it committed stays until the row is used.

        Args:
            row: Which.
            is_clean: False where it was scrubbed.
        """
        mine = self._rows[row]
        assert mine.owner is not None
        self._num_freed += 1
        left_ids = mine.owner.committed_ids if is_clean else []
        self._rows[row] = _Row(None, left_ids, self._num_freed)

    def _oldest_free(self) -> int:
        """An empty one before one that holds a prefix."""
        return min(
            (bool(row.left_ids), row.freed_at, number)
            for number, row in enumerate(self._rows)
            if row.owner is None
        )[-1]

    def _longest_shared(self, token_ids: list[int]) -> tuple[int | None, int]:
        """The row that holds most of a prefix, and how much; a free one before one that is not."""
        best, longest = None, LEAST_REUSE - 1
        for number in sorted(range(len(self._rows)), key=lambda i: self._rows[i].owner is not None):
            num_shared = shared_len(self._rows[number].ids, token_ids)
            if num_shared > longest:
                best, longest = number, num_shared
        return best, longest if best is not None else 0


def shared_len(first: list[int], second: list[int]) -> int:
    """How many tokens two texts begin with in common."""
    low, high = 0, min(len(first), len(second))
    while low < high:  # whole slices are compared, which is quick
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
