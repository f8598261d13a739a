"""Losses at the masks of groups, against the AR view's law at each place of the true text.

The corrector, where there is one, is given the true token before each place of a draft. Its loss is
over the whole vocabulary: the candidates' logits are corrected, the others stay. A diffusion block
is not corrected, since decoding does not correct one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trimode.model import TriModeModel
from trimode.model.corrector import Corrector
from trimode.training.adapter_config import DrafterPart
from trimode.training.anchor_config import AnchorPart
from trimode.training.anchor_groups import DENOISE, SKIP, Groups
from trimode.training.anchor_pass import ReadText
from trimode.training.chunked_sum import chunked_sum
from trimode.training.draft_round import num_tokens
from trimode.training.drafter_loss import place_losses

Kind = Literal["kl", "ce", "lk"]

_CHUNK_ROWS = 128
_NUM_EXACT = 16
_BANNED = -1e4
"""Logit of a token that may not be chosen: no weight at all in a softmax, and no NaN in products
with it, as an infinity would give."""


@dataclass(frozen=True, slots=True)
class GroupSums:
    """Sums over a batch: scalars of float32 or wider.

    Args:
        loss: Over groups, of the weighted losses of their places; with a graph.
        overlap: Over drafts, of the mean overlap of their places.
        reached: [m] Over drafts, whether all masks up to each place are right.
        num_emitted: Over drafts, tokens of a round with it.
        runs: [A] int64. Leading right masks of every group.
    """

    loss: Tensor
    overlap: Tensor
    reached: Tensor
    num_emitted: Tensor
    runs: Tensor


class Heads:
    """The head of the base, for drafts and for the AR view.

    Logits of bfloat16 are too coarse to say which token is likeliest. So the AR view's largest ones
    are made again from a wide head, where there is one.

    Args:
        model: The base.
        wide: [V, H] float32. The head's weight before it was rounded; None if it never was.
    """

    def __init__(self, model: TriModeModel, wide: Tensor | None = None) -> None:
        self._model, self._wide = model, wide
        self._num_tokens = num_tokens(model.config)

    def drafts(self, states: Tensor) -> Tensor:
        """[M, H] -> [M, V] float32 or wider, banned tokens out of reach."""
        logits: Tensor = self._model.diffusion_head(states)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits[:, self._model.config.mask_token_id] = _BANNED
        logits[:, self._num_tokens :] = _BANNED
        return logits

    @torch.no_grad()
    def exact(self, states: Tensor) -> Tensor:
        """The same, the largest logits to the last bits of float32."""
        logits = self.drafts(states)
        if self._wide is None:
            return logits
        ids = logits.topk(min(_NUM_EXACT, logits.shape[1] - 1), dim=1).indices
        with torch.autocast(states.device.type, enabled=False):
            largest = (self._wide[ids] @ states.float()[:, :, None])[:, :, 0]
        return logits.scatter_(1, ids, largest)


def group_sums(
    model: TriModeModel,
    text: ReadText,
    groups: Groups,
    hidden: Tensor,
    *,
    heads: Heads,
    part: DrafterPart,
    kind: Kind,
    corrector: Corrector | None,
) -> GroupSums:
    """The losses of a batch's groups, and how far their drafts get.

    Args:
        model: The base.
        text: What it read.
        groups: What was fed.
        hidden: [P, H] with a graph. What came out.
        heads: Of the base.
        part: The losses' numbers, and its `anchors`.
        kind: Which loss.
        corrector: None for none.
    """
    anchors = part.anchors
    assert anchors is not None
    num_groups, width = groups.drawn.is_hidden.shape
    of_target = groups.target_groups
    clean_ids, hidden_text = text.rows.clean_ids.flatten(), text.hidden.flatten(0, 1)
    embeddings = model.encoder.embed_tokens.weight
    states = hidden[groups.targets]
    overlaps: list[Tensor] = []
    hits: list[Tensor] = []

    def of_chunk(some: Tensor, chunk: slice) -> Tensor:
        before = groups.text_places[chunk] - 1
        truth = clean_ids[before + 1]
        places, again = before.unique(return_inverse=True)  # groups may overlap
        verifier = heads.exact(hidden_text[places])
        chosen = verifier.argmax(1)[again]
        verifier = verifier if len(places) == len(before) else verifier[again]
        plain = heads.drafts(some)
        logits, is_drafted = plain, groups.drawn.kinds[of_target[chunk]] != DENOISE
        if corrector is not None:
            logits = corrected(
                plain,
                some,
                embeddings[clean_ids[before]],
                rows=is_drafted,
                embeddings=embeddings,
                corrector=corrector,
            )
        loss, overlap = divergence(logits, verifier, kind=kind, part=part)
        with torch.no_grad():
            confidences = torch.ones_like(loss)
            if anchors.weights == "dpace":
                confidences = logits.softmax(1).gather(1, truth[:, None])[:, 0]
            weights = place_weights(groups, chunk, part=anchors, confidences=confidences)
            overlaps.append(overlap)
            hits.append(logits.argmax(1) == chosen)
        total = (loss * weights).sum()
        if corrector is not None and anchors.uncorrected_weight:
            loss, _ = divergence(plain, verifier, kind=kind, part=part)
            total = total + anchors.uncorrected_weight * (loss * weights * is_drafted).sum()
        return total

    parameters = [] if corrector is None else list(corrector.parameters())
    loss = chunked_sum(
        of_chunk, states, parameters=parameters, chunks=group_chunks(of_target, num_groups)
    )
    is_draft = groups.drawn.kinds != DENOISE
    grid = torch.zeros(num_groups, width, dtype=torch.bool, device=hidden.device)
    grid[of_target, groups.places - 2] = torch.cat(hits) if hits else grid.new_zeros(0)
    reached = grid.long().cumprod(1)
    runs = reached.sum(1)
    overlap = torch.cat(overlaps) if overlaps else states.new_zeros(0).detach()
    shares = _mean_weights(of_target, num_groups).to(overlap.dtype)
    return GroupSums(
        loss=loss,
        overlap=(overlap * shares * is_draft[of_target]).sum(),
        reached=(reached * is_draft[:, None])[:, : anchors.num_masks].sum(0),
        num_emitted=((runs + 1 + (groups.drawn.kinds == SKIP)) * is_draft).sum(),
        runs=runs,
    )


def group_chunks(of_target: Tensor, num_groups: int, *, rows: int = _CHUNK_ROWS) -> list[slice]:
    """Slices of whole groups, of about so many targets each.

    Args:
        of_target: [M] int64, ascending. Group of each target.
        num_groups: A.
        rows: Fewest targets of a slice, the last one apart.
    """
    ends = torch.bincount(of_target, minlength=num_groups).cumsum(0).tolist()
    chunks, start = [], 0
    for end in ends:
        if end - start >= rows:
            chunks.append(slice(start, end))
            start = end
    if ends and ends[-1] > start:
        chunks.append(slice(start, ends[-1]))
    return chunks


def divergence(
    logits: Tensor, verifier: Tensor, *, kind: Kind, part: DrafterPart
) -> tuple[Tensor, Tensor]:
    """Loss and overlap of every place.

    Args:
        logits: [M, V] with a graph. The draft's.
        verifier: [M, V]. The AR view's.
        kind: See `AnchorPart.loss`.
        part: Temperature, support and eta of LK.

    Returns:
        [M] each; the overlap, `sum min(p, q)`, without a graph.
    """
    if kind == "lk":
        found = place_losses(
            logits,
            verifier,
            verifier.argmax(1),
            temperature=part.temperature,
            top_k=min(part.top_k, logits.shape[1] - 1),
            eta=part.eta,
        )
        return found.lk, found.overlap
    loss, overlap = _Divergence.apply(logits, verifier, kind == "ce")
    return loss, overlap


class _Divergence(torch.autograd.Function):
    """KL(p || q), or -log q at the argmax of p, with the gradient `q - p` written out."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, verifier: Tensor, is_ce: bool) -> tuple[Tensor, Tensor]:
        p, q = verifier.softmax(1), logits.softmax(1)
        overlap = torch.minimum(p, q).sum(1)
        normaliser = logits.amax(1) - q.amax(1).log()  # logsumexp, at a tenth of its price
        if is_ce:
            best = verifier.argmax(1, keepdim=True)
            loss = normaliser - logits.gather(1, best)[:, 0]
            grad = q.scatter_add_(1, best, -torch.ones_like(best, dtype=q.dtype))
        else:
            # sum p log(p / q), with log p - log q = verifier - logits - their normalisers
            ahead = torch.linalg.vecdot(p, verifier) - torch.linalg.vecdot(p, logits)
            loss = ahead - (verifier.amax(1) - p.amax(1).log()) + normaliser
            grad = q.sub_(p)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(overlap)
        return loss, overlap

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * upstream[0][:, None], None, None


def corrected(
    logits: Tensor,
    states: Tensor,
    before: Tensor,
    *,
    rows: Tensor,
    embeddings: Tensor,
    corrector: Corrector,
) -> Tensor:
    """[M, V]: the logits with those of each drafted place's likeliest tokens corrected.

    Args:
        logits: [M, V].
        states: [M, H]. What they come from.
        before: [M, H]. Input embedding of the token before.
        rows: [M] bool. Which places are drafted; decoding corrects no diffusion block.
        embeddings: [V, H]. Of all tokens.
        corrector: Says what is added.
    """
    ids = logits.detach().topk(corrector.num_candidates, dim=1).indices
    added = corrector(before, states, embeddings[ids]) * rows[:, None]
    return logits.scatter_add(1, ids, added.to(logits.dtype))


def place_weights(groups: Groups, chunk: slice, *, part: AnchorPart, confidences: Tensor) -> Tensor:
    """Weight of each target of a chunk of whole groups; no gradient.

    A mask of a diffusion block weighs one over the masks of its block.

    Args:
        groups: All groups.
        chunk: Which targets.
        part: Which weights.
        confidences: [M] What the draft gives to the true token of each place.

    Returns:
        [M], in the dtype of the confidences.
    """
    places, of_target = groups.places[chunk], groups.target_groups[chunk]
    first = int(of_target[0]) if len(of_target) else 0
    of_target = of_target - first
    num_groups = int(of_target[-1]) + 1 if len(of_target) else 0
    if part.weights == "dpace":
        grid = confidences.new_ones(num_groups, groups.drawn.is_hidden.shape[1] + 1)
        grid[of_target, places - 1] = confidences
        weights = grid.cumprod(1)[of_target, places - 2]
    else:
        ratio = part.decay_ratio if part.weights == "decay" else 1.0
        weights = ratio ** (places - 2).to(confidences.dtype)
    is_denoised = groups.drawn.kinds[first:][of_target] == DENOISE
    even = _mean_weights(of_target, num_groups).to(weights.dtype)
    return torch.where(is_denoised, even, weights)


def _mean_weights(of_target: Tensor, num_groups: int) -> Tensor:
    """[M] float32: one over the number of targets of each target's group."""
    return 1 / torch.bincount(of_target, minlength=num_groups).clamp(min=1)[of_target]
