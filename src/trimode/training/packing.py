"""Rows of text for training: which tokens, in which document, at which position, in which block.

Row `r` of a split is the tokens `[r * S, (r + 1) * S)` of its stream. Positions and blocks restart
at each document, and at the row's start for a document cut there. The last block of a document that
ends inside the row is filled up with EOS (see `pack_row`). Rows of whole conversations are made in
`conversation_packing`. Noise is not made here: see `corruption`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch

from trimode.errors import ConfigError

_ORDER, _BLOCK_LENGTH, _WINDOW = 1, 2, 4  # separate random streams of one seed (3: noise)


class TokenStream(Protocol):
    """The part of a token shard folder that packing reads."""

    def __hash__(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def kind(self) -> str: ...

    @property
    def eos_token_id(self) -> int: ...

    @property
    def document_ends(self) -> np.ndarray: ...

    def tokens(self, start: int, stop: int) -> np.ndarray: ...

    def supervised(self, start: int, stop: int) -> np.ndarray: ...


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Rows of text with their structure.

    Args:
        clean_ids: [B, S] int64. Text, and EOS where a document's last block was filled up.
        document_ids: [B, S] int64. Document of each token, counted from the row's start.
        position_ids: [B, S] int64. Position within the document (piece).
        block_ids: [B, S] int64. Block of each token, different for all blocks of a row.
        is_block_start: [B, S] bool. Whether the token has offset 0 in its block.
        is_supervised: [B, S] bool. Whether the token is a target. False on prompts, on padding and
            on the fill: a document's own EOS is its last target.
        is_maskable: [B, S] bool. Whether noise may hide the token. False on prompts and padding.
    """

    clean_ids: torch.Tensor
    document_ids: torch.Tensor
    position_ids: torch.Tensor
    block_ids: torch.Tensor
    is_block_start: torch.Tensor
    is_supervised: torch.Tensor
    is_maskable: torch.Tensor

    def to(self, device: torch.device) -> PackedRows:
        """The same rows on `device`."""
        return PackedRows(
            **{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)}
        )


def pack_row(
    ids: np.ndarray, ends: np.ndarray, *, block_length: int, eos_token_id: int
) -> dict[str, np.ndarray]:
    """Lay out one row.

    A document that ends in the row has its last block filled up with EOS to whole `block_length`,
    so that the end of the text does not show in the block's length. What the fill pushes beyond the
    row's S tokens is cut.

    Args:
        ids: [S] int64. The row's stretch of the stream.
        ends: [D] int64, ascending, in 1..S. Exclusive ends of documents inside the row.
        block_length: K.
        eos_token_id: What fills a last block.

    Returns:
        One [S] array for each field of `PackedRows`.
    """
    row_len = len(ids)
    is_cut = len(ends) == 0 or ends[-1] != row_len  # the last piece goes on beyond the row
    stops = np.append(ends, row_len) if is_cut else ends
    lens = np.diff(stops, prepend=0)
    fill_lens = -lens % block_length
    if is_cut:
        fill_lens[-1] = 0
    filled_lens = lens + fill_lens
    document_ids = np.repeat(np.arange(len(lens)), filled_lens)
    starts = np.cumsum(filled_lens) - filled_lens
    position_ids = np.arange(len(document_ids)) - starts[document_ids]
    is_text = position_ids < lens[document_ids]
    clean_ids = np.full(len(document_ids), eos_token_id, dtype=np.int64)
    clean_ids[is_text] = ids
    num_blocks = -(-filled_lens // block_length)
    first_blocks = np.cumsum(num_blocks) - num_blocks
    arrays = {
        "clean_ids": clean_ids,
        "document_ids": document_ids,
        "position_ids": position_ids,
        "block_ids": first_blocks[document_ids] + position_ids // block_length,
        "is_block_start": position_ids % block_length == 0,
        "is_supervised": is_text,
        "is_maskable": np.ones(len(document_ids), dtype=bool),
    }
    return {name: array[:row_len] for name, array in arrays.items()}


@dataclass(frozen=True, slots=True)
class Windows:
    """Rows whose blocks are windows with a gap, to learn infilling (`corruption.gaps`).

    Args:
        share: Chance of a row to be one.
        length: Tokens of a window, which takes the place of the block length there.
    """

    share: float
    length: int


@dataclass(frozen=True, slots=True)
class RowSampler:
    """Rows by global sample index: a fresh permutation of all rows for every epoch.

    Everything is a function of `seed` and the sample's index, so a run resumes from its step
    number.

    Args:
        stream: The tokens.
        sequence_length: S.
        block_lengths: K is drawn from these for each row with equal chance.
        seed: Of the order and of the block lengths.
        is_shuffled: False reads rows in order (evaluation).
        num_copies: How many samples in a row show the same row (2 for complementary masks).
        windows: Rows for infilling among them; None for none.
    """

    stream: TokenStream
    sequence_length: int
    block_lengths: tuple[int, ...]
    seed: int
    is_shuffled: bool = True
    num_copies: int = 1
    windows: Windows | None = None

    @property
    def num_rows(self) -> int:
        """Whole rows in one epoch."""
        return self.stream.num_tokens // self.sequence_length

    def row_index(self, sample: int) -> int:
        """Which row the sample with this global index is.

        Raises:
            ConfigError: There is not one whole row.
        """
        if self.num_rows == 0:
            raise ConfigError(
                f"the split has {self.stream.num_tokens} tokens, but one row of sequence_length "
                f"needs {self.sequence_length}"
            )
        epoch, place = divmod(sample // self.num_copies, self.num_rows)
        if not self.is_shuffled:
            return place
        return int(_permutation(self.seed, epoch, self.num_rows)[place])

    def is_windowed(self, sample: int) -> bool:
        """Whether the blocks of this sample are windows with a gap."""
        if self.windows is None:
            return False
        rng = np.random.default_rng((self.seed, _WINDOW, sample // self.num_copies))
        return bool(rng.random() < self.windows.share)

    def block_length(self, sample: int) -> int:
        """The block length of this sample."""
        if self.windows is not None and self.is_windowed(sample):
            return self.windows.length
        return draw_block_length(self.block_lengths, self.seed, sample // self.num_copies)

    def rows(self, samples: Sequence[int]) -> PackedRows:
        """The rows of some global sample indices, on the CPU."""
        return stack_rows([self._row(sample) for sample in samples])

    def _row(self, sample: int) -> dict[str, np.ndarray]:
        start = self.row_index(sample) * self.sequence_length
        stop = start + self.sequence_length
        ends = self.stream.document_ends
        low, high = np.searchsorted(ends, [start, stop], side="right")
        return pack_row(
            self.stream.tokens(start, stop),
            np.asarray(ends[low:high]) - start,
            block_length=self.block_length(sample),
            eos_token_id=self.stream.eos_token_id,
        )


def draw_block_length(block_lengths: tuple[int, ...], seed: int, number: int) -> int:
    """The block length of the `number`-th row, each with equal chance."""
    if len(block_lengths) == 1:
        return block_lengths[0]
    rng = np.random.default_rng((seed, _BLOCK_LENGTH, number))
    return block_lengths[int(rng.integers(len(block_lengths)))]


def stack_rows(packed: Sequence[dict[str, np.ndarray]]) -> PackedRows:
    """Rows from one [S] array for each field of each row."""
    stacked: dict[str, Any] = {
        name: torch.from_numpy(np.stack([row[name] for row in packed])) for name in packed[0]
    }
    return PackedRows(**stacked)


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    return shuffled_order(seed, epoch, num_rows)


def shuffled_order(seed: int, epoch: int, number: int) -> np.ndarray:
    """[number] int64. A permutation for this seed and epoch."""
    return np.random.default_rng((seed, _ORDER, epoch)).permutation(number)
