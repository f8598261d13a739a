"""How good the diffusion view is as a drafter: accuracy by offset and expected acceptance
length."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from trimode.model import DrafterAdapter, TriModeModel
from trimode.training.objective import TrainingBatch, encode_dual_stream


@dataclass(frozen=True, slots=True)
class DraftAccuracy:
    """Counts over whole blocks in the pattern of decoding, offset 0 given and the rest drafted.

    The AR view's choices are taken with the true text as context, so `verifier_accepted` is what
    decoding would see as long as decoding follows the text.

    Args:
        num_blocks: Whole blocks without fill.
        correct: [K - 1] int64. Drafts at offsets 1 .. K - 1 that equal the text.
        verifier_correct: [K - 1] int64. Drafts that equal the AR view's choice.
        accepted: Drafts before the first that differs from the text, summed over blocks.
        verifier_accepted: The same against the AR view's choices.
    """

    num_blocks: int
    correct: Tensor
    verifier_correct: Tensor
    accepted: int
    verifier_accepted: int

    def by_offset(self) -> list[float]:
        """Accuracy against the text at offsets 1 .. K - 1."""
        return [round(c / max(self.num_blocks, 1), 4) for c in self.correct.tolist()]

    def by_offset_verifier(self) -> list[float]:
        """Agreement with the AR view's choice at offsets 1 .. K - 1."""
        return [round(c / max(self.num_blocks, 1), 4) for c in self.verifier_correct.tolist()]

    @property
    def acceptance_length(self) -> float:
        """Expected accepted drafts plus the bonus token, drafts judged by the AR view."""
        return 1 + self.verifier_accepted / max(self.num_blocks, 1)

    @property
    def text_acceptance_length(self) -> float:
        """The same, drafts judged by the text."""
        return 1 + self.accepted / max(self.num_blocks, 1)


@torch.no_grad()
def draft_accuracy(
    model: TriModeModel,
    batch: TrainingBatch,
    *,
    block_length: int,
    adapter: DrafterAdapter | None = None,
) -> DraftAccuracy:
    """Measure one batch whose noise is `corruption.draft_pattern` and whose blocks are all K
    long."""
    rows = batch.rows
    noisy_hidden, clean_hidden = encode_dual_stream(model, batch, adapter=adapter)
    blocks = _whole_blocks(batch, block_length)  # [M, K] places in the flattened rows
    targets = rows.clean_ids.flatten()[blocks][:, 1:]
    drafts = _choices(model, noisy_hidden, blocks[:, 1:])
    verified = _choices(model, clean_hidden, blocks[:, :-1])
    hits, verifier_hits = drafts == targets, drafts == verified
    return DraftAccuracy(
        num_blocks=len(blocks),
        correct=hits.sum(0).cpu(),
        verifier_correct=verifier_hits.sum(0).cpu(),
        accepted=int(hits.cumprod(1).sum()),
        verifier_accepted=int(verifier_hits.cumprod(1).sum()),
    )


def merge(parts: Iterable[DraftAccuracy]) -> DraftAccuracy:
    """The counts of several batches together."""
    parts = list(parts)
    return DraftAccuracy(
        num_blocks=sum(p.num_blocks for p in parts),
        correct=torch.stack([p.correct for p in parts]).sum(0),
        verifier_correct=torch.stack([p.verifier_correct for p in parts]).sum(0),
        accepted=sum(p.accepted for p in parts),
        verifier_accepted=sum(p.verifier_accepted for p in parts),
    )


def _whole_blocks(batch: TrainingBatch, block_length: int) -> Tensor:
    """[M, K] int64. Places (in the flattened rows) of the blocks that are all there and all
    text."""
    rows = batch.rows
    starts = rows.is_block_start.flatten().nonzero()[:, 0]
    row_len = rows.clean_ids.shape[1]
    starts = starts[starts % row_len + block_length <= row_len]
    places = starts[:, None] + torch.arange(block_length, device=starts.device)
    block_ids, is_text = rows.block_ids.flatten()[places], rows.is_supervised.flatten()[places]
    is_whole = (block_ids == block_ids[:, :1]).all(1) & is_text.all(1)
    return places[is_whole]


def _choices(model: TriModeModel, hidden: Tensor, places: Tensor) -> Tensor:
    """The most likely token at some places, the mask token apart."""
    logits = model.diffusion_head(hidden.flatten(0, 1)[places])
    logits[..., model.config.mask_token_id] = float("-inf")
    return logits.argmax(-1)
