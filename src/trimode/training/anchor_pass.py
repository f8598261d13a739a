"""The forwards of anchor training: the text once, then the groups alone over its keys and values.

A group sees the text of its document up to its anchor, and itself. Text is read without the adapter
and without a gradient, so only the groups cost a backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimode.model import AdapterSwitch, DrafterAdapter, TriModeModel
from trimode.training.anchor_groups import Groups
from trimode.training.draft_round import RememberingAttention
from trimode.training.dual_stream import causal_mask, product_dtype, training_attention
from trimode.training.packing import PackedRows

_CHUNK_TOKENS = 128
"""Tokens of groups that share an attention call: few enough to see the same text."""


@dataclass(frozen=True, slots=True)
class ReadText:
    """Rows as the AR view read them.

    Args:
        rows: B rows of S tokens.
        hidden: [B, S, H]. What the head answers from: at place s for place s + 1.
        keys, values: Of each layer, [B, G, S, D].
    """

    rows: PackedRows
    hidden: Tensor
    keys: list[Tensor]
    values: list[Tensor]


@torch.no_grad()
def read_text(model: TriModeModel, rows: PackedRows) -> ReadText:
    """Read the rows causally, adapter off, and keep what groups attend to."""
    dtype = product_dtype(model.dtype, rows.clean_ids.device)
    attend = training_attention(
        causal_mask(rows), part_len=rows.clean_ids.shape[1], dtype=model.dtype
    )
    text = RememberingAttention(attend)
    hidden = model.encode(rows.clean_ids, rows.position_ids, attend=text)
    kept = [text.kept[layer] for layer in range(len(text.kept))]
    keys, values = (
        [pair[which].to(dtype).transpose(1, 2).contiguous() for pair in kept] for which in (0, 1)
    )
    return ReadText(rows, hidden, keys, values)


def encode_groups(
    model: TriModeModel,
    text: ReadText,
    groups: Groups,
    *,
    adapter: DrafterAdapter | None,
    adapts_clean: bool,
) -> Tensor:
    """[P, H]: hidden states of all that the groups feed.

    Args:
        model: The base.
        text: What it read.
        groups: Of the same rows.
        adapter: On for the masks; None for none.
        adapts_clean: Whether it is on for clean tokens as well.
    """
    is_clean = groups.mask_places == 0
    switch = None
    if adapter is not None:
        is_on = None if adapts_clean or not bool(is_clean.any()) else ~is_clean[:, None]
        switch = AdapterSwitch(adapter, is_on, groups.mask_places)
    return model.encode(
        groups.token_ids,
        groups.position_ids,
        attend=GroupAttention(text, groups),
        adapter=switch,
    )


@dataclass(frozen=True, slots=True)
class _Chunk:
    """C neighbouring tokens of groups of one document, and the L tokens of its text they may see.

    Attributes:
        tokens: Of the packed tokens.
        row: Of the text.
        span: Of that row.
        bias: [C, L + C]. 0 where a token may attend, else -inf: first the text, then the groups.
    """

    tokens: slice
    row: int
    span: slice
    bias: Tensor


class GroupAttention:
    """Attention of packed groups over the text up to their anchors and over themselves.

    Args:
        text: Keys and values of the rows; no gradient flows into them.
        groups: Sorted by row and anchor.
        chunk_tokens: Most tokens of a call, unless one group has more.
    """

    def __init__(
        self, text: ReadText, groups: Groups, *, chunk_tokens: int = _CHUNK_TOKENS
    ) -> None:
        self._text = text
        self._chunks = _make_chunks(text, groups, chunk_tokens=chunk_tokens)

    def __call__(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query: [P, N, D]; key, value: [P, G, D] -> [P, N, D]."""
        keys, values = self._text.keys[layer_index], self._text.values[layer_index]
        query, key, value = (x.to(keys.dtype) for x in (query, key, value))
        attended: Tensor = _GroupProducts.apply(query, key, value, keys, values, self._chunks)
        return attended


class _GroupProducts(torch.autograd.Function):
    """Plain products and a softmax for each chunk; the query heads of a KV head are rows of one."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        text_keys: Tensor,
        text_values: Tensor,
        chunks: list[_Chunk],
    ) -> Tensor:
        scale, kept = query.shape[-1] ** -0.5, []
        attended = torch.empty_like(query)
        is_kept = any(ctx.needs_input_grad)
        for chunk in chunks:
            keys, values = _seen(chunk, text_keys, key), _seen(chunk, text_values, value)
            scores = (_heads(query[chunk.tokens], len(keys)) * scale) @ keys.mT
            scores.unflatten(1, (-1, len(chunk.bias))).add_(chunk.bias)
            weights = scores.softmax(dim=-1)
            attended[chunk.tokens] = _tokens(weights @ values, len(chunk.bias))
            if is_kept:
                kept.append(weights)
        ctx.save_for_backward(query, key, value, text_keys, text_values, *kept)
        ctx.chunks, ctx.scale = chunks, scale
        return attended

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, text_keys, text_values, *kept = ctx.saved_tensors
        query_grad, key_grad, value_grad = (torch.empty_like(x) for x in (query, key, value))
        for chunk, weights in zip(ctx.chunks, kept, strict=True):
            keys, values = _seen(chunk, text_keys, key), _seen(chunk, text_values, value)
            num_tokens, num_text = len(chunk.bias), chunk.span.stop - chunk.span.start
            grad = _heads(upstream[chunk.tokens], len(keys))
            value_grad[chunk.tokens] = (weights[:, :, num_text:].mT @ grad).transpose(0, 1)
            scores_grad = torch._softmax_backward_data(
                grad @ values.mT, weights, -1, weights.dtype
            ).mul_(ctx.scale)
            own = scores_grad[:, :, num_text:]
            queries = _heads(query[chunk.tokens], len(keys))
            key_grad[chunk.tokens] = (own.mT @ queries).transpose(0, 1)
            query_grad[chunk.tokens] = _tokens(scores_grad @ keys, num_tokens)
        return query_grad, key_grad, value_grad, None, None, None


def _seen(chunk: _Chunk, text: Tensor, own: Tensor) -> Tensor:
    """[G, L + C, D]: keys or values of the text, then of the chunk."""
    return torch.cat((text[chunk.row, :, chunk.span], own[chunk.tokens].transpose(0, 1)), dim=1)


def _heads(x: Tensor, num_kv_heads: int) -> Tensor:
    """[C, N, D] -> [G, N/G * C, D]."""
    return x.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def _tokens(x: Tensor, num_tokens: int) -> Tensor:
    """[G, N/G * C, D] -> [C, N, D]."""
    return x.unflatten(1, (-1, num_tokens)).permute(2, 0, 1, 3).flatten(1, 2)


def _make_chunks(text: ReadText, groups: Groups, *, chunk_tokens: int) -> list[_Chunk]:
    drawn, rows, dtype = groups.drawn, text.rows, text.keys[0].dtype
    row_of, anchor_of, len_of = (x.tolist() for x in (drawn.rows, drawn.anchors, groups.lens))
    document_of = rows.document_ids[drawn.rows, drawn.anchors].tolist()
    position_of = rows.position_ids[drawn.rows, drawn.anchors].tolist()
    chunks: list[_Chunk] = []
    first = start = 0
    while first < len(row_of):
        last, size = first, len_of[first]
        home = row_of[first], document_of[first]
        while (
            last + 1 < len(row_of)
            and (row_of[last + 1], document_of[last + 1]) == home
            and size + len_of[last + 1] <= chunk_tokens
        ):
            last += 1
            size += len_of[last]
        tokens = slice(start, start + size)
        begin = anchor_of[first] - position_of[first]
        span = slice(begin, anchor_of[last] + 1)
        group_ids = groups.group_ids[tokens]
        seen = torch.arange(span.start, span.stop, device=group_ids.device)
        is_text = seen[None] <= drawn.anchors[group_ids][:, None]
        is_allowed = torch.cat((is_text, group_ids[:, None] == group_ids[None]), dim=1)
        bias = torch.zeros(is_allowed.shape, dtype=dtype, device=group_ids.device)
        chunks.append(_Chunk(tokens, home[0], span, bias.masked_fill_(~is_allowed, -torch.inf)))
        first, start = last + 1, start + size
    return chunks
