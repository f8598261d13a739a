"""The dual stream `[noisy | clean]`: its tokens, its positions and what may attend to what.

One forward over both halves gives the diffusion view (noisy half) and the AR view (clean half) of
the same text. Source: facts 2.2, `sbd_block_diff`, here with documents packed in rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimode.model import Attend, DenseAttention
from trimode.training.chunked_attention import ChunkedAttention
from trimode.training.flex import FlexAttention, MaskMod, has_flex
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


def causal_mod(rows: PackedRows) -> MaskMod:
    """`causal_mask` as a function of indices."""
    document = rows.document_ids

    def may_attend(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (document[row, query] == document[row, key]) & (query >= key)

    return may_attend


def dual_stream_mod(rows: PackedRows) -> MaskMod:
    """`dual_stream_mask` as a function of indices into `[noisy | clean]`."""
    document, block = rows.document_ids, rows.block_ids
    row_len = document.shape[1]

    def may_attend(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_noisy_query, is_noisy_key = query < row_len, key < row_len
        q, k = query % row_len, key % row_len
        is_same_document = document[row, q] == document[row, k]
        q_block, k_block = block[row, q], block[row, k]
        in_noisy = is_noisy_query & is_noisy_key & (q_block == k_block)
        to_clean = is_noisy_query & ~is_noisy_key & (q_block > k_block) & is_same_document
        in_clean = ~is_noisy_query & ~is_noisy_key & (q >= k) & is_same_document
        return in_noisy | to_clean | in_clean

    return may_attend


def causal_attention(rows: PackedRows, *, dtype: torch.dtype, is_rerun: bool = False) -> Attend:
    """The AR view of packed rows; see `training_attention`."""
    if has_flex(rows.clean_ids.device):
        return _flex_attention(causal_mod(rows), rows, num_parts=1, dtype=dtype)
    return training_attention(
        causal_mask(rows),
        part_len=rows.clean_ids.shape[1],
        dtype=dtype,
        is_rerun=is_rerun,
    )


def dual_stream_attention(
    rows: PackedRows, *, dtype: torch.dtype, is_rerun: bool = False
) -> Attend:
    """Both views over `[noisy | clean]`; see `training_attention`."""
    if has_flex(rows.clean_ids.device):
        return _flex_attention(dual_stream_mod(rows), rows, num_parts=2, dtype=dtype)
    return training_attention(
        dual_stream_mask(rows),
        part_len=rows.clean_ids.shape[1],
        dtype=dtype,
        is_rerun=is_rerun,
    )


def _flex_attention(
    mask_mod: MaskMod, rows: PackedRows, *, num_parts: int, dtype: torch.dtype
) -> Attend:
    batch_size, row_len = rows.clean_ids.shape
    return FlexAttention(
        mask_mod,
        batch_size=batch_size,
        num_queries=num_parts * row_len,
        num_keys=num_parts * row_len,
        dtype=product_dtype(dtype, rows.clean_ids.device),
        device=rows.clean_ids.device,
    )


def training_attention(
    attn_mask: Tensor, *, part_len: int, dtype: torch.dtype, is_rerun: bool = False
) -> Attend:
    """The fastest way to attend under any mask: chunks on the CPU, the dense kernel elsewhere.

    What is not any mask but that of the AR view or the dual stream has a faster kernel on CUDA
    devices: `causal_attention`, `dual_stream_attention`.

    Args:
        attn_mask: [B, 1, T, T'] bool.
        part_len: S; T' is S or 2S.
        dtype: Of the weights; autocast, where it is on, has the last word.
        is_rerun: Whether whole layers are run again in the backward. Then at most two layers keep
            anything at a time, and they may keep their attention weights.
    """
    if attn_mask.device.type != "cpu":
        return DenseAttention(attn_mask)
    dtype = product_dtype(dtype, attn_mask.device)
    return ChunkedAttention(
        attn_mask,
        chunk_len=_CPU_CHUNK_LEN,
        part_len=part_len,
        dtype=dtype,
        is_kept=is_rerun,
    )


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return dtype
