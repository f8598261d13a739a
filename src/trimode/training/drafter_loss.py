"""The drafter's losses: LK-hybrid and cross-entropy on the places that one round reaches.

Pure functions of logits. Source: facts 2.5 (paper section 3.3 and appendix B).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PlaceLosses:
    """What each of M places gives; float32 or wider.

    Args:
        lk: [M]. LK-hybrid.
        ce: [M]. Cross-entropy at the verifier's token, zero where that is outside the support.
        is_inside: [M] bool. Whether the verifier's token is inside the support.
        overlap: [M]. alpha_acc, the chance of agreement under the best coupling; no gradient.
    """

    lk: Tensor
    ce: Tensor
    is_inside: Tensor
    overlap: Tensor


def place_losses(
    draft_logits: Tensor,
    verifier_logits: Tensor,
    verifier_ids: Tensor,
    *,
    temperature: float,
    top_k: int,
    eta: float,
) -> PlaceLosses:
    """Both losses of every place.

    1. U = the top-K of the drafter and the top-K of the verifier (`union_support`).
    2. p = softmax(verifier / tau), q = softmax(drafter / tau), both over U alone: zeroing what is
       outside U and renormalising is a softmax over U.
    3. alpha_acc = sum min(p, q), lambda = exp(-eta * alpha_acc), no gradient through lambda.
    4. LK = lambda * KL(p || q) + (1 - lambda) * (1/2) sum |p - q|.
    5. CE = -log softmax(drafter) over U, at temperature 1, at the verifier's token; none outside U.

    Args:
        draft_logits: [M, V] with a graph. Banned tokens are -inf.
        verifier_logits: [M, V]. The same context; no gradient flows into it.
        verifier_ids: [M] int64. The verifier's most likely token.
        temperature: tau.
        top_k: K, at most the number of tokens that are not banned.
        eta: Of lambda.
    """
    wide = torch.promote_types(draft_logits.dtype, torch.float32)
    ids, is_repeat = union_support(draft_logits.detach(), verifier_logits.detach(), top_k=top_k)
    draft = draft_logits.gather(1, ids).to(wide).masked_fill(is_repeat, -torch.inf)
    verifier = verifier_logits.detach().gather(1, ids).to(wide)
    log_p = (verifier / temperature).masked_fill(is_repeat, -torch.inf).log_softmax(1)
    log_q = (draft / temperature).log_softmax(1)
    p, q = log_p.exp(), log_q.exp()
    overlap = torch.minimum(p, q).sum(1).detach()
    mix = torch.exp(-eta * overlap)
    # A repeat has p = q = 0; its log-ratio of two infinities is set to 0.
    kl = (p * (log_p.masked_fill(is_repeat, 0) - log_q.masked_fill(is_repeat, 0))).sum(1)
    total_variation = 0.5 * (p - q).abs().sum(1)
    is_target = (ids == verifier_ids[:, None]) & ~is_repeat
    log_draft = draft.log_softmax(1).masked_fill(~is_target, 0)
    return PlaceLosses(
        lk=mix * kl + (1 - mix) * total_variation,
        ce=-log_draft.sum(1),
        is_inside=is_target.any(1),
        overlap=overlap,
    )


def union_support(
    draft_logits: Tensor, verifier_logits: Tensor, *, top_k: int
) -> tuple[Tensor, Tensor]:
    """The token ids of U, side by side.

    Args:
        draft_logits: [M, V].
        verifier_logits: [M, V].
        top_k: K.

    Returns:
        ids: [M, 2K] int64. The verifier's top-K, then the drafter's.
        is_repeat: [M, 2K] bool. Ids of the second half that the first half has too.
    """
    first, second = (x.topk(top_k, dim=1).indices for x in (verifier_logits, draft_logits))
    is_first = torch.zeros_like(verifier_logits, dtype=torch.bool).scatter_(1, first, True)
    is_repeat = torch.cat(
        (torch.zeros_like(first, dtype=torch.bool), is_first.gather(1, second)), 1
    )
    return torch.cat((first, second), dim=1), is_repeat


def active_places(is_drafted: Tensor, is_kept: Tensor, is_block_start: Tensor) -> Tensor:
    """The accepted prefix of every block and the place right after it: what a round decides on.

    Args:
        is_drafted: [B, S] bool. Places with a draft: all of a block but its start, or none of it.
        is_kept: [B, S] bool. Places whose draft is accepted and followed by the next one, if all
            before are.
        is_block_start: [B, S] bool.

    Returns:
        [B, S] bool. Drafted, and everything drafted before in the block is kept.
    """
    ends = (is_drafted & ~is_kept).long()
    before = ends.cumsum(1) - ends
    places = torch.arange(ends.shape[1], device=ends.device).expand_as(ends)
    starts = torch.where(is_block_start, places, 0).cummax(1).values
    return is_drafted & (before == before.gather(1, starts))


def block_mean_weights(is_counted: Tensor, block_ids: Tensor) -> Tensor:
    """[B, S] float32: 1 / the number counted in the block where counted, else 0.

    Args:
        is_counted: [B, S] bool.
        block_ids: [B, S] int64, below S.
    """
    counted = is_counted.float()
    per_block = torch.zeros_like(counted).scatter_add_(1, block_ids, counted)
    return counted / per_block.gather(1, block_ids).clamp(min=1)
