"""Masked attention on the CPU: queries in chunks, few keys each, weights made again for gradients.

For each chunk of queries, the keys are cut to the first-to-last one that any of its queries may
see, in each part of the stream. With plain products and softmax this takes half the time of the
fused CPU kernel, which skips nothing under a mask. Of long rows queries, keys and values alone are
kept for the backward, and the weights of one chunk exist at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_MAX_KEPT_KEYS = 512
"""Up to so many keys the weights are a small part of a layer, and keeping them is faster."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """C neighbouring queries and the L keys that some of them may see.

    Attributes:
        rows: Of the queries.
        spans: Of the keys.
        bias: [B, 1, C, L]. 0 where a query may attend, else -inf.
    """

    rows: slice
    spans: list[slice]
    bias: Tensor


class ChunkedAttention:
    """`DenseAttention` without the work that the mask throws away. Equal to rounding.

    Args:
        attn_mask: [B, 1, T, T'] bool, True = may attend; no row without any.
        chunk_len: Queries per chunk.
        part_len: Length of one part of the stream: S, whether there are one or two.
        dtype: Of the products; the softmax itself works in float32 or wider.
        is_kept: Whether the weights are kept for the backward; by default those of short rows.
    """

    def __init__(
        self,
        attn_mask: Tensor,
        *,
        chunk_len: int,
        part_len: int,
        dtype: torch.dtype,
        is_kept: bool = False,
    ) -> None:
        self._dtype = dtype
        self._is_kept = is_kept or attn_mask.shape[3] <= _MAX_KEPT_KEYS
        self._chunks: list[_Chunk] = []
        for start in range(0, attn_mask.shape[2], chunk_len):
            rows = slice(start, min(start + chunk_len, attn_mask.shape[2]))
            chunk = attn_mask[:, :, rows]
            is_seen = chunk.any(dim=2).any(dim=0)[0]
            spans = [
                slice(part + int(seen[0]), part + int(seen[-1]) + 1)
                for part in range(0, attn_mask.shape[3], part_len)
                if len(seen := is_seen[part : part + part_len].nonzero()[:, 0])
            ]
            allowed = torch.cat([chunk[..., span] for span in spans], dim=3)
            bias = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
            bias.masked_fill_(~allowed, float("-inf"))
            self._chunks.append(_Chunk(rows, spans, bias))

    @torch.compiler.disable
    def __call__(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query: [B, T, N, D]; key, value: [B, T', G, D] -> [B, T, N, D]."""
        num_kv_heads, head_dim = key.shape[2:]
        # Queries are scaled chunk by chunk: a scaled copy of all of them would be kept as well.
        queries = _grouped(query.to(self._dtype), num_kv_heads)
        keys, values = (x.to(self._dtype).transpose(1, 2) for x in (key, value))
        attended: Tensor = _ChunkedProducts.apply(
            queries, keys, values, head_dim**-0.5, self._chunks, self._is_kept
        )
        return attended


class _ChunkedProducts(torch.autograd.Function):
    """The query heads of a group are rows of one product, so that keys need no copies per head."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
        chunks: list[_Chunk],
        is_kept: bool,
    ) -> Tensor:
        """queries: [B, G, N/G, T, D]; keys, values: [B, G, T', D] -> [B, T, N, D]."""
        batch, groups, share, num_queries, head_dim = queries.shape
        attended = queries.new_empty(batch, num_queries, groups * share, head_dim)
        out, kept = _grouped(attended, groups), []
        is_kept = is_kept and any(ctx.needs_input_grad)
        for chunk in chunks:
            weights = _weights(_rows(queries, chunk) * scale, _cut(keys, chunk), chunk.bias)
            product = weights @ _cut(values, chunk)
            out[:, :, :, chunk.rows] = product.unflatten(2, (share, -1))
            if is_kept:
                kept.append(weights)
        ctx.save_for_backward(queries, keys, values, *kept)
        ctx.scale, ctx.chunks = scale, chunks
        return attended

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Of one chunk after the other; sums over chunks in float32 or wider."""
        queries, keys, values, *kept = ctx.saved_tensors
        upstream = _grouped(upstream, keys.shape[1])
        wide = torch.promote_types(keys.dtype, torch.float32)
        queries_grad = torch.empty_like(queries)
        keys_grad, values_grad = (torch.zeros_like(x, dtype=wide) for x in (keys, values))
        for index, chunk in enumerate(ctx.chunks):
            query, key = _rows(queries, chunk) * ctx.scale, _cut(keys, chunk)
            grad = _rows(upstream, chunk)
            weights = kept[index] if kept else _weights(query, key, chunk.bias)
            _add_back(values_grad, chunk, weights.mT @ grad)
            scores_grad = torch._softmax_backward_data(
                grad @ _cut(values, chunk).mT, weights, -1, weights.dtype
            )
            _add_back(keys_grad, chunk, scores_grad.mT @ query)
            product = (scores_grad @ key).mul_(ctx.scale)
            queries_grad[:, :, :, chunk.rows] = product.unflatten(2, (queries.shape[2], -1))
        keys_grad, values_grad = keys_grad.to(keys.dtype), values_grad.to(values.dtype)
        return queries_grad, keys_grad, values_grad, None, None, None


def _grouped(x: Tensor, num_kv_heads: int) -> Tensor:
    """[B, T, N, D] -> a view [B, G, N/G, T, D]."""
    return x.unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4)


def _rows(x: Tensor, chunk: _Chunk) -> Tensor:
    """[B, G, N/G, T, D] -> the chunk's queries of all heads of a group, [B, G, N/G * C, D]."""
    return x[:, :, :, chunk.rows].flatten(2, 3)


def _cut(x: Tensor, chunk: _Chunk) -> Tensor:
    """[B, G, T', D] -> [B, G, L, D]; no copy where there is one span."""
    spans = [x[:, :, span] for span in chunk.spans]
    return spans[0] if len(spans) == 1 else torch.cat(spans, dim=2)


def _add_back(total: Tensor, chunk: _Chunk, part: Tensor) -> None:
    """Add what belongs to the chunk's keys, the inverse of `_cut`."""
    start = 0
    for span in chunk.spans:
        stop = start + span.stop - span.start
        total[:, :, span] += part[:, :, start:stop]
        start = stop


def _weights(query: Tensor, key: Tensor, bias: Tensor) -> Tensor:
    """query: [B, G, N/G * C, D]; key: [B, G, L, D]; bias: [B, 1, C, L] -> [B, G, N/G * C, L]."""
    scores = query @ key.mT
    scores.unflatten(2, (-1, bias.shape[2])).add_(bias[:, :, None])
    return scores.softmax(dim=-1)
