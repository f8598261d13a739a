"""What may attend to what, as booleans (True: may attend). Nothing here touches weights or K/V."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TRUNK = 0
"""Group of the tokens that verify or commit: causal, adapter off, the only ones whose K/V may be
kept."""


def fed_mask(groups: Sequence[int], positions: Sequence[int], anchors: Sequence[int]) -> Tensor:
    """Attention among the tokens one sequence feeds in one forward; the committed prefix is always
    visible.

    A token sees the fed trunk tokens up to its *anchor*, the last position of the trunk that it may
    know of. Group 0 is the *trunk*, causal: each of its tokens is its own anchor. The tokens of any
    other group share one anchor, and see their whole own group as well (bidirectionally). Groups
    never see each other and the trunk never sees a group. The anchor is said, never derived from
    the group's positions: masks that skip the bonus begin one place later and see no more.

    Args:
        groups: Group of each of the T fed tokens, in feed order; trunk tokens by position.
        positions: Absolute position of each.
        anchors: Position of the anchor of each, at least that of the last committed token.

    Returns:
        [T, T] bool. Row t: what fed token t may attend to.
    """
    group, position, anchor = (torch.tensor(list(x)) for x in (groups, positions, anchors))
    is_trunk = group == TRUNK
    sees_trunk = is_trunk[None, :] & (position[None, :] <= anchor[:, None])
    sees_group = ~is_trunk[:, None] & (group[:, None] == group[None, :])
    return sees_trunk | sees_group


def cell_mask(fed: Tensor, lengths: Tensor, num_cells: int) -> Tensor:
    """`fed_mask` of several rows laid over their K/V cells, made where `lengths` lives.

    Args:
        fed: [R, T, T] bool. `fed_mask` of each row.
        lengths: [R] int64. Committed length L of each row; fed tokens sit in cells L .. L+T-1.
        num_cells: Cells looked at, at least max(L) + T.

    Returns:
        [R, 1, T, num_cells] bool: all cells before L, then the fed ones that `fed` allows.
    """
    num_rows, num_tokens, _ = fed.shape
    cell = torch.arange(num_cells, device=lengths.device)
    offset = (cell[None, :] - lengths[:, None])[:, None, :].expand(num_rows, num_tokens, num_cells)
    is_fed = (offset >= 0) & (offset < num_tokens)
    allowed = fed.gather(2, offset.clamp(0, num_tokens - 1))
    return ((offset < 0) | (is_fed & allowed))[:, None]


def dense_mask(pattern: str, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """The mask of a forward over whole sequences, without K/V.

    Args:
        pattern: `causal` or `bidirectional`.
        input_ids: [B, T]. Only its shape and device are used.
        attention_mask: [B, T], nonzero where a token is real; None if all are.

    Returns:
        [B or 1, 1, T, T] bool, or None for plain causal.
    """
    if attention_mask is None and pattern == "causal":
        return None
    num_tokens, device = input_ids.shape[1], input_ids.device
    allowed = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=device)
    allowed = (allowed.tril() if pattern == "causal" else allowed)[None, None]
    if attention_mask is None:
        return allowed
    # A padded token sees itself, so that its softmax is over something; nobody else sees it.
    itself = torch.eye(num_tokens, dtype=torch.bool, device=device)
    return (allowed & attention_mask.bool()[:, None, None, :]) | itself
