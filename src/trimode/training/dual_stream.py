"""The dual stream `[noisy | clean]`: its tokens, its positions and what may attend to what.

One forward over both halves gives the diffusion view (noisy half) and the AR view (clean half) of
the same text. Source: facts 2.2, `sbd_block_diff`, here with documents packed in rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimode.model import Attend, DenseAttention
from trimode.training.packing import PackedRows

_CPU_CHUNK_LEN = 128


def causal_mask(rows: PackedRows) -> Tensor:
    """[B, 1, S, S] bool. Token-causal within each document: the AR view of packed rows."""
    document = rows.document_ids
    is_same_document = document[:, :, None] == document[:, None, :]
    return is_same_document.tril()[:, None]


def dual_stream_mask(rows: PackedRows) -> Tensor:
    """[B, 1, 2S, 2S] bool over `[noisy | clean]`; row: who attends, column: to whom.

    * noisy to noisy: the same block, in both directions;
    * noisy to clean: strictly earlier blocks of the same document;
    * clean to noisy: never;
    * clean to clean: token-causal within the document.
    """
    document, block = rows.document_ids, rows.block_ids
    is_same_document = document[:, :, None] == document[:, None, :]
    is_same_block = block[:, :, None] == block[:, None, :]
    is_earlier_block = (block[:, :, None] > block[:, None, :]) & is_same_document
    noisy = torch.cat((is_same_block, is_earlier_block), dim=2)
    clean = torch.cat((torch.zeros_like(is_same_block), is_same_document.tril()), dim=2)
    return torch.cat((noisy, clean), dim=1)[:, None]


class ChunkedAttention:
    """`DenseAttention` without the work that the mask throws away: queries in chunks, few keys
    each.

    For each chunk of queries, the keys are cut to the first-to-last one that any of its queries may
    see, in each part of the stream. The result is that of the dense mask. With plain products and
    softmax this takes half the time of the fused CPU kernel, which skips nothing under a mask.

    Args:
        attn_mask: [B, 1, T, T] bool, True = may attend.
        chunk_len: Queries per chunk.
        part_len: Length of one part of the stream: S, whether there are one or two.
        dtype: Of the products; the softmax itself works in float32 or wider.
    """

    def __init__(
        self, attn_mask: Tensor, *, chunk_len: int, part_len: int, dtype: torch.dtype
    ) -> None:
        self._chunk_len = chunk_len
        self._dtype = dtype
        self._chunks: list[tuple[list[slice], Tensor]] = []
        for chunk in attn_mask.split(chunk_len, dim=2):
            is_seen = chunk.any(dim=2).any(dim=0)[0]
            spans = [
                slice(start + int(seen[0]), start + int(seen[-1]) + 1)
                for start in range(0, attn_mask.shape[3], part_len)
                if len(seen := is_seen[start : start + part_len].nonzero()[:, 0])
            ]
            allowed = torch.cat([chunk[..., span] for span in spans], dim=3)
            bias = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
            self._chunks.append((spans, bias.masked_fill_(~allowed, float("-inf"))))

    def __call__(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query: [B, T, N, D]; key, value: [B, T, G, D] -> [B, T, N, D]."""
        num_kv_heads, head_dim = key.shape[2:]
        scaled = (query * head_dim**-0.5).to(self._dtype)
        queries = scaled.unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4)
        keys, values = (x.to(self._dtype).transpose(1, 2) for x in (key, value))
        outputs = [
            _attend(
                chunk,
                torch.cat([keys[:, :, span] for span in spans], dim=2),
                torch.cat([values[:, :, span] for span in spans], dim=2),
                bias,
            )
            for chunk, (spans, bias) in zip(
                queries.split(self._chunk_len, dim=3), self._chunks, strict=True
            )
        ]
        return torch.cat(outputs, dim=3).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """query: [B, G, N/G, C, D]; key, value: [B, G, L, D]; bias: [B, 1, C, L] -> as query.

    The query heads of a group are rows of one product, so that keys need no copies per head.
    """
    scores = query.flatten(2, 3) @ key.mT
    scores = scores.unflatten(2, query.shape[2:4]).add_(bias[:, :, None])
    weights = scores.softmax(dim=-1).flatten(2, 3)
    return (weights @ value).unflatten(2, query.shape[2:4])


def training_attention(attn_mask: Tensor, *, part_len: int, dtype: torch.dtype) -> Attend:
    """The fastest way to attend under a mask: chunks on the CPU, the dense kernel elsewhere.

    Args:
        attn_mask: [B, 1, T, T] bool.
        part_len: S; T is S or 2S.
        dtype: Of the weights; autocast, where it is on, has the last word.
    """
    if attn_mask.device.type != "cpu":
        return DenseAttention(attn_mask)
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    return ChunkedAttention(attn_mask, chunk_len=_CPU_CHUNK_LEN, part_len=part_len, dtype=dtype)
