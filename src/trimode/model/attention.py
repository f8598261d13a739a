"""Attention strategies. A forward is given one; the network itself never knows which.

A strategy is called once per layer with that layer's queries, keys and values (after RoPE) and
returns the attended values. `DenseAttention` is for whole sequences (training, scoring),
`RowAttention` for packed tokens over K/V rows (decoding).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from trimode.model.cache import KVCache
from trimode.model.masks import TRUNK, cell_mask, fed_mask


class Attend(Protocol):
    """What `TriModeModel.encode` calls in every layer."""

    def __call__(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query: [..., N, D]; key, value: [..., G, D] -> [..., N, D]."""
        ...


class DenseAttention:
    """Attention over whole sequences of equal length, no K/V kept.

    Args:
        attn_mask: [B or 1, 1, T, T] bool, True = may attend; None = plain causal.
    """

    def __init__(self, attn_mask: Tensor | None) -> None:
        self.attn_mask = attn_mask

    def __call__(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query: [B, T, N, D]; key, value: [B, T, G, D] -> [B, T, N, D]."""
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=self.attn_mask,
            is_causal=self.attn_mask is None,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return attended.transpose(1, 2)


@dataclass(frozen=True, slots=True)
class RowFeed:
    """What one sequence feeds in one forward, as far as attention is concerned.

    Attributes:
        row: K/V row of the sequence.
        length: Committed length L; the fed tokens go to cells L .. L+T-1, in feed order.
        groups: Group of each of the T tokens (see `fed_mask`).
        positions: Absolute position of each.
    """

    row: int
    length: int
    groups: Sequence[int]
    positions: Sequence[int]

    @property
    def is_causal(self) -> bool:
        return all(group == TRUNK for group in self.groups)

    @property
    def is_one_group(self) -> bool:
        return self.groups[0] != TRUNK and all(group == self.groups[0] for group in self.groups)


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Rows that feed equally many tokens: one attention call, no padding of queries."""

    start: int  # first packed token
    num_rows: int
    num_tokens: int
    rows: slice | Tensor
    num_cells: int
    attn_mask: Tensor | None
    is_causal: bool


class RowAttention:
    """Attention of packed tokens: each sees its row's committed cells and what its group allows.

    Rows that feed equally many tokens share one call, so feeds must come sorted by their number of
    tokens. Writes the fed K/V into the cells after the committed length, where the next forward
    overwrites them unless the length moves.

    Args:
        cache: Written in place, in every layer.
        feeds: One per sequence, in packed order, sorted by number of tokens.
    """

    def __init__(self, cache: KVCache, feeds: Sequence[RowFeed]) -> None:
        device = cache.keys.device
        rows = [feed.row for feed in feeds for _ in feed.groups]
        cells = [feed.length + t for feed in feeds for t in range(len(feed.groups))]
        self._cache = cache
        self._rows, self._cells = torch.tensor([rows, cells], device=device)
        self._only = feeds[0] if len(feeds) == 1 else None
        self._buckets: list[_Bucket] = []
        start = 0
        while feeds:
            num_tokens = len(feeds[0].groups)
            same = [feed for feed in feeds if len(feed.groups) == num_tokens]
            if any(len(feed.groups) != num_tokens for feed in feeds[: len(same)]):
                raise AssertionError("feeds are not sorted by their number of tokens")
            self._buckets.append(_bucket(same, start=start, device=device))
            start += len(same) * num_tokens
            feeds = feeds[len(same) :]

    def __call__(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query: [P, N, D]; key, value: [P, G, D] -> [P, N, D]."""
        keys, values = self._cache.keys[layer_index], self._cache.values[layer_index]
        if self._only is not None:
            cells = slice(self._only.length, self._only.length + key.shape[0])
            keys[self._only.row, :, cells] = key.transpose(0, 1)
            values[self._only.row, :, cells] = value.transpose(0, 1)
        else:
            self._cache.write(layer_index, self._rows, self._cells, key, value)
        outputs = []
        for bucket in self._buckets:
            stop = bucket.start + bucket.num_rows * bucket.num_tokens
            fed = query[bucket.start : stop].unflatten(0, (bucket.num_rows, bucket.num_tokens))
            attended = F.scaled_dot_product_attention(
                fed.transpose(1, 2),
                keys[bucket.rows, :, : bucket.num_cells],
                values[bucket.rows, :, : bucket.num_cells],
                attn_mask=bucket.attn_mask,
                is_causal=bucket.is_causal,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            outputs.append(attended.transpose(1, 2).flatten(0, 1))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _bucket(feeds: Sequence[RowFeed], *, start: int, device: torch.device) -> _Bucket:
    num_tokens = len(feeds[0].groups)
    lengths = [feed.length for feed in feeds]
    num_cells = max(lengths) + num_tokens
    is_even = min(lengths) == max(lengths)
    sees_all = num_tokens == 1 or all(feed.is_one_group for feed in feeds)
    is_prefill = max(lengths) == 0 and all(feed.is_causal for feed in feeds)
    attn_mask = None
    if not (is_even and (sees_all or is_prefill)):
        fed = torch.stack([_fed_mask(feed, device) for feed in feeds])
        attn_mask = cell_mask(fed, torch.tensor(lengths, device=device), num_cells)
    rows = [feed.row for feed in feeds]
    is_run = rows == list(range(rows[0], rows[0] + len(rows)))
    return _Bucket(
        start=start,
        num_rows=len(feeds),
        num_tokens=num_tokens,
        rows=slice(rows[0], rows[0] + len(rows)) if is_run else torch.tensor(rows, device=device),
        num_cells=num_cells,
        attn_mask=attn_mask,
        is_causal=is_even and is_prefill and num_tokens > 1,
    )


def _fed_mask(feed: RowFeed, device: torch.device) -> Tensor:
    num_tokens = len(feed.groups)
    if feed.is_causal:
        return torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=device).tril()
    if feed.is_one_group:
        return torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=device)
    return fed_mask(feed.groups, feed.positions).to(device)
