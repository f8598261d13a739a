"""Attention strategies. A forward is given one; the network itself never knows which.

A strategy is called once per layer with that layer's queries, keys and values (after RoPE) and
returns the attended values. `DenseAttention` is for whole sequences (training, scoring),
`RowAttention` for packed tokens over K/V rows (decoding).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from trimode.model.cache import KVCache
from trimode.model.masks import TRUNK, cell_mask, fed_mask

LEAST_RUN = 5
"""Rows of a run of neighbours, on average, for which it has an attention call of its own."""

_Views = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]


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
        anchors: Position of the anchor of each.
    """

    row: int
    length: int
    groups: Sequence[int]
    positions: Sequence[int]
    anchors: Sequence[int]

    @property
    def num_trunk(self) -> int:
        """Trunk tokens before the first group."""
        groups = self.groups
        return next((t for t, group in enumerate(groups) if group != TRUNK), len(groups))

    def group_runs(self) -> Iterator[tuple[int, int]]:
        """First and one behind the last token of each group, in feed order."""
        first = self.num_trunk
        for group, run in itertools.groupby(self.groups[first:]):
            stop = first + sum(1 for _ in run)
            assert group != TRUNK
            yield first, stop
            first = stop

    @property
    def is_causal(self) -> bool:
        return all(group == TRUNK for group in self.groups)

    @property
    def is_one_group(self) -> bool:
        return self.groups[0] != TRUNK and all(group == self.groups[0] for group in self.groups)


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Rows that feed equally many tokens, neighbours if there are many: one attention call, no
    padding of queries.

    Attributes:
        first, stop: The packed tokens that are theirs.
        shape: Number of rows, number of tokens of each.
        fed: Per layer, the cells to write as a view [rows, G, tokens, D] of the keys and of the
            values. Where the rows are not neighbours of equal length there is no such view: then
            the [P'] int64 row and cell of each token.
        seen: Per layer, the cells to read, in the same way; [rows] int64 where the rows are not
            neighbours.
        num_cells: Cells looked at.
        attn_mask: What `cell_mask` gives, or None.
        is_causal: Whether the kernel's own causal mask is the right one.
    """

    first: int
    stop: int
    shape: tuple[int, int]
    fed: _Views | Tensor
    seen: _Views | Tensor
    num_cells: int
    attn_mask: Tensor | None
    is_causal: bool


class RowAttention:
    """Attention of packed tokens: each sees its row's committed cells and what its group allows.

    Rows that feed equally many tokens share one call, so feeds must come sorted by their number of
    tokens; sorted by row as well, neighbours are read where they lie. Writes the fed K/V into the
    cells after the committed length, where the next forward overwrites them unless the length
    moves.

    Args:
        cache: Written in place, in every layer.
        feeds: One per sequence, in packed order, sorted by number of tokens.

    Attributes:
        cache, feeds: As given.
    """

    def __init__(self, cache: KVCache, feeds: Sequence[RowFeed]) -> None:
        self.cache = cache
        self.feeds = feeds
        self._made: list[_Bucket] | None = None

    @property
    def _buckets(self) -> list[_Bucket]:
        """Made when first asked for: the native step needs none."""
        if self._made is None:
            self._made, first = [], 0
            by_tokens = itertools.groupby(self.feeds, key=lambda feed: len(feed.groups))
            for num_tokens, group in by_tokens:
                if self._made and num_tokens <= self._made[-1].shape[1]:
                    raise AssertionError("feeds are not sorted by their number of tokens")
                for neighbours in _runs(list(group)):
                    self._made.append(_bucket(self.cache, neighbours, first=first))
                    first = self._made[-1].stop
        return self._made

    def __call__(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query: [P, N, D]; key, value: [P, G, D] -> [P, N, D]."""
        buckets = self._buckets
        if len(buckets) == 1:
            return self._attend(buckets[0], layer_index, query, key, value)
        outputs = []
        for bucket in buckets:
            mine = slice(bucket.first, bucket.stop)
            outputs.append(self._attend(bucket, layer_index, query[mine], key[mine], value[mine]))
        return torch.cat(outputs)

    def _attend(
        self, bucket: _Bucket, layer_index: int, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        self._write(bucket, layer_index, key, value)
        keys, values = self._read(bucket, layer_index)
        attended = F.scaled_dot_product_attention(
            query.view(*bucket.shape, *query.shape[1:]).transpose(1, 2),
            keys,
            values,
            attn_mask=bucket.attn_mask,
            is_causal=bucket.is_causal,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return attended.transpose(1, 2).flatten(0, 1)

    def _write(self, bucket: _Bucket, layer_index: int, key: Tensor, value: Tensor) -> None:
        if isinstance(bucket.fed, Tensor):
            rows, cells = bucket.fed
            self.cache.write(layer_index, rows, cells, key, value)
            return
        for views, new in zip(bucket.fed, (key, value), strict=True):
            tokens = new.view(*bucket.shape, *new.shape[1:])
            views[layer_index].copy_(tokens.transpose(1, 2))

    def _read(self, bucket: _Bucket, layer_index: int) -> tuple[Tensor, Tensor]:
        """[rows, G, num_cells, D] keys and values."""
        if isinstance(bucket.seen, Tensor):
            keys, values = self.cache.keys[layer_index], self.cache.values[layer_index]
            cells = slice(bucket.num_cells)
            return keys[bucket.seen, :, cells], values[bucket.seen, :, cells]
        return bucket.seen[0][layer_index], bucket.seen[1][layer_index]


def _runs(feeds: list[RowFeed]) -> list[list[RowFeed]]:
    """The feeds in runs of neighbouring rows, if these are long: a call more costs less than to
    copy the K/V of many rows together."""
    runs = [[feeds[0]]]
    for before, feed in itertools.pairwise(feeds):
        if feed.row != before.row + 1:
            runs.append([])
        runs[-1].append(feed)
    return runs if len(feeds) >= LEAST_RUN * len(runs) else [feeds]


def _bucket(cache: KVCache, feeds: list[RowFeed], *, first: int) -> _Bucket:
    device = cache.keys.device
    num_tokens = len(feeds[0].groups)
    lengths = [feed.length for feed in feeds]
    num_cells = max(lengths) + num_tokens
    is_even = min(lengths) == max(lengths)
    sees_all = num_tokens == 1 or all(feed.is_one_group for feed in feeds)
    is_prefill = max(lengths) == 0 and all(feed.is_causal for feed in feeds)
    attn_mask: Tensor | None = None
    if is_even and not sees_all and not is_prefill and all(feed.is_causal for feed in feeds):
        attn_mask = torch.ones(num_tokens, num_cells, dtype=torch.bool, device=device)
        attn_mask = attn_mask.tril_(num_cells - num_tokens)
    elif not (is_even and (sees_all or is_prefill)):
        allowed = torch.stack([_fed_mask(feed, device) for feed in feeds])
        attn_mask = cell_mask(allowed, torch.tensor(lengths, device=device), num_cells)
    rows = [feed.row for feed in feeds]
    fed: _Views | Tensor
    seen: _Views | Tensor
    if rows == list(range(rows[0], rows[0] + len(rows))):
        run = slice(rows[0], rows[0] + len(rows))
        seen = _views(cache, run, slice(num_cells))
    else:
        seen = torch.tensor(rows, device=device)
    if is_even and not isinstance(seen, Tensor):
        fed = _views(cache, run, slice(lengths[0], num_cells))
    else:
        tokens = [(feed.row, feed.length + t) for feed in feeds for t in range(num_tokens)]
        fed = torch.tensor(tokens, device=device).T
    return _Bucket(
        first=first,
        stop=first + len(feeds) * num_tokens,
        shape=(len(feeds), num_tokens),
        fed=fed,
        seen=seen,
        num_cells=num_cells,
        attn_mask=attn_mask,
        is_causal=is_even and is_prefill and num_tokens > 1,
    )


def _views(cache: KVCache, rows: slice, cells: slice) -> _Views:
    """Per layer, [rows, G, cells, D] views of the keys and of the values."""
    return cache.keys[:, rows, :, cells].unbind(), cache.values[:, rows, :, cells].unbind()


def _fed_mask(feed: RowFeed, device: torch.device) -> Tensor:
    num_tokens = len(feed.groups)
    if feed.is_causal:
        return torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=device).tril()
    if feed.is_one_group:
        return torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=device)
    return fed_mask(feed.groups, feed.positions, feed.anchors).to(device)
