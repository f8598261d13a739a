"""Rows of whole conversations, for learning what the assistant writes.

No conversation is cut unless it is longer than a row; several share a row where they fit. Prompts
and padding are in neither loss: they are neither supervised nor masked.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from trimode.errors import ConfigError
from trimode.training.packing import (
    PackedRows,
    RowSampler,
    TokenStream,
    Windows,
    draw_block_length,
    shuffled_order,
    stack_rows,
)

logger = logging.getLogger(__name__)

_OPEN_ROWS = 64


def make_sampler(
    stream: TokenStream,
    sequence_length: int,
    block_lengths: tuple[int, ...],
    seed: int,
    *,
    is_shuffled: bool = True,
    num_copies: int = 1,
    windows: Windows | None = None,
) -> RowSampler | ConversationSampler:
    """The sampler for the kind of the data; arguments as in `RowSampler`.

    Raises:
        ConfigError: Windows were asked for, and the data are conversations.
    """
    options = (stream, sequence_length, block_lengths, seed, is_shuffled, num_copies)
    if stream.kind != "chat":
        return RowSampler(*options, windows)
    if windows is not None:
        raise ConfigError(
            f"infill_share is {windows.share}, but the data are conversations, which have no "
            "windows to learn infilling from: remove it"
        )
    return ConversationSampler(*options)


def pack_conversations(
    pieces: Iterable[tuple[np.ndarray, np.ndarray]],
    *,
    row_len: int,
    block_length: int,
    eos_token_id: int,
) -> dict[str, np.ndarray]:
    """Lay out one row: conversations, each with its last block filled up with EOS, then padding.

    The fill is noised like text and never supervised. The padding is a document of its own.

    Args:
        pieces: [T] int64 tokens and [T] bool what is supervised, of each conversation. What does
            not fit at the end of the row, fill or text, is cut.
        row_len: S.
        block_length: K.
        eos_token_id: What fills blocks and rows.

    Returns:
        One [S] array for each field of `PackedRows`.
    """
    clean_ids = np.full(row_len, eos_token_id, dtype=np.int64)
    is_supervised = np.zeros(row_len, dtype=bool)
    is_maskable = np.zeros(row_len, dtype=bool)
    starts, start = [], 0
    for ids, flags in pieces:
        assert start < row_len, "a conversation begins beyond the row"
        stop = min(start + len(ids), row_len)
        fill_stop = min(start + -(-len(ids) // block_length) * block_length, row_len)
        clean_ids[start:stop] = ids[: stop - start]
        is_supervised[start:stop] = is_maskable[start:stop] = flags[: stop - start]
        is_maskable[stop:fill_stop] = True
        starts.append(start)
        start = fill_stop
    if start < row_len:
        starts.append(start)
    lens = np.diff(starts, append=row_len)
    document_ids = np.repeat(np.arange(len(starts)), lens)
    position_ids = np.arange(row_len) - np.array(starts)[document_ids]
    is_block_start = position_ids % block_length == 0
    return {
        "clean_ids": clean_ids,
        "document_ids": document_ids,
        "position_ids": position_ids,
        "block_ids": np.cumsum(is_block_start) - 1,
        "is_block_start": is_block_start,
        "is_supervised": is_supervised,
        "is_maskable": is_maskable,
    }


@dataclass(frozen=True, slots=True)
class ConversationSampler:
    """Rows by global sample index: every epoch is packed afresh, in an order of its own.

    An epoch has as many rows as its conversations need, so epochs differ a little in length.
    Everything is a function of the data, `seed` and the sample's index, as in `RowSampler`.

    Args:
        stream: The tokens; every document is a conversation.
        sequence_length: S.
        block_lengths: K is drawn from these for each row with equal chance; there is room for the
            fill of any of them.
        seed: Of the order and of the block lengths.
        is_shuffled: False packs the conversations in order (evaluation).
        num_copies: How many samples in a row show the same row (2 for complementary masks).
    """

    stream: TokenStream
    sequence_length: int
    block_lengths: tuple[int, ...]
    seed: int
    is_shuffled: bool = True
    num_copies: int = 1

    @property
    def num_rows(self) -> int:
        """Rows in the first epoch."""
        return self._num_rows(0)

    @property
    def num_truncated(self) -> int:
        """Conversations longer than a row, of which the end is cut."""
        return _usable(self.stream, self.sequence_length).num_truncated

    def conversations(self, sample: int) -> list[int]:
        """Which conversations share the row of this sample, in order.

        Raises:
            ConfigError: There is none to learn from.
        """
        if self.num_rows == 0:
            raise ConfigError(
                f"no conversation of the split has anything to learn in its first "
                f"{self.sequence_length} tokens (sequence_length)"
            )
        place, epoch = sample // self.num_copies, 0
        while place >= self._num_rows(epoch):
            place -= self._num_rows(epoch)
            epoch += 1
        return _epoch(*self._key(epoch))[place]

    def is_windowed(self, sample: int) -> bool:
        """Never: conversations have no windows with a gap."""
        return False

    def block_length(self, sample: int) -> int:
        """The block length of this sample."""
        return draw_block_length(self.block_lengths, self.seed, sample // self.num_copies)

    def rows(self, samples: Sequence[int]) -> PackedRows:
        """The rows of some global sample indices, on the CPU."""
        return stack_rows([self._row(sample) for sample in samples])

    def _row(self, sample: int) -> dict[str, np.ndarray]:
        ends = self.stream.document_ends
        bounds = [
            (int(ends[number - 1]) if number else 0, int(ends[number]))
            for number in self.conversations(sample)
        ]
        return pack_conversations(
            ((self.stream.tokens(a, b), self.stream.supervised(a, b)) for a, b in bounds),
            row_len=self.sequence_length,
            block_length=self.block_length(sample),
            eos_token_id=self.stream.eos_token_id,
        )

    def _num_rows(self, epoch: int) -> int:
        return _num_rows(*self._key(epoch))

    def _key(self, epoch: int) -> tuple[TokenStream, int, tuple[int, ...], int, int | None]:
        return (
            self.stream,
            self.sequence_length,
            tuple(sorted(set(self.block_lengths))),
            self.seed,
            epoch if self.is_shuffled else None,
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Usable:
    """The conversations to learn from.

    Args:
        numbers: [C] int64. Which documents.
        lens: [C] int64. Their tokens, cut to a row.
        num_truncated: How many of them are cut.
    """

    numbers: np.ndarray
    lens: np.ndarray
    num_truncated: int


@lru_cache(maxsize=4)
def _usable(stream: TokenStream, row_len: int) -> _Usable:
    """All conversations but those whose every supervised token lies beyond a row; says so once."""
    ends = stream.document_ends
    starts = np.append(0, ends[:-1])[: len(ends)]
    lens = ends - starts
    is_used = np.ones(len(lens), dtype=bool)
    for number in np.flatnonzero(lens > row_len):
        start = int(starts[number])
        is_used[number] = stream.supervised(start, start + row_len).any()
    num_truncated = int((is_used & (lens > row_len)).sum())
    if num_truncated or not is_used.all():
        logger.warning(
            "of %d conversations, %d are longer than sequence_length (%d tokens) and lose their "
            "end; %d have nothing to learn before it and are left out",
            len(lens),
            num_truncated,
            row_len,
            int((~is_used).sum()),
        )
    return _Usable(np.flatnonzero(is_used), np.minimum(lens, row_len)[is_used], num_truncated)


@lru_cache(maxsize=4)
def _epoch(
    stream: TokenStream,
    row_len: int,
    block_lengths: tuple[int, ...],
    seed: int,
    epoch: int | None,
) -> list[list[int]]:
    """The conversations of every row of an epoch; None is the epoch in order."""
    usable = _usable(stream, row_len)
    sizes = np.max([-(-usable.lens // k) * k for k in block_lengths], axis=0)
    order = np.arange(len(sizes))
    if epoch is not None:
        order = shuffled_order(seed, epoch, len(sizes))
    rows = first_fit(np.minimum(sizes, row_len)[order], capacity=row_len)
    numbers = usable.numbers[order]
    return [[int(numbers[place]) for place in row] for row in rows]


@lru_cache(maxsize=4096)
def _num_rows(
    stream: TokenStream,
    row_len: int,
    block_lengths: tuple[int, ...],
    seed: int,
    epoch: int | None,
) -> int:
    return len(_epoch(stream, row_len, block_lengths, seed, epoch))


def first_fit(sizes: np.ndarray, *, capacity: int) -> list[list[int]]:
    """Puts every item into the first open row with room for it, else into a new one.

    At most `_OPEN_ROWS` rows are open; the oldest is closed first, so that this stays linear.

    Args:
        sizes: [C] integers, at most `capacity` each.
        capacity: Of a row.

    Returns:
        The items of each row, in order; rows in the order of their first item.
    """
    rows: list[list[int]] = []
    room: dict[int, int] = {}  # of the open rows, oldest first
    for item, size in enumerate(sizes.tolist()):
        row = next((row for row, left in room.items() if left >= size), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room[row] = capacity
        rows[row].append(item)
        room[row] -= size
        if room[row] == 0:
            del room[row]
        elif len(room) > _OPEN_ROWS:
            del room[next(iter(room))]
    return rows
