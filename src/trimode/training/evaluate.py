"""Held-out losses and draft accuracy of a model in training. Text is not generated here."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trimode.model import TriModeModel
from trimode.training.config import TrainConfig
from trimode.training.corruption import corrupt, draft_pattern
from trimode.training.draft_accuracy import DraftAccuracy, draft_accuracy, merge
from trimode.training.objective import TargetCounts, TrainingBatch, count_targets, loss_sums
from trimode.training.packing import RowSampler, TokenStream
from trimode.training.precision import Precision

_NOISE_SEED = 20_000  # fixed, so that all evaluations of all runs see the same noise


@dataclass(frozen=True, slots=True)
class HeldOutReport:
    """Numbers on the held-out split.

    Args:
        tokens: Tokens looked at.
        ar_loss: Mean loss of the AR view, nats per token.
        diffusion_loss: The diffusion bound, nats per maskable token.
        block_length: K of all that follows, in the pattern of decoding (one clean token, K - 1
            masks).
        accuracy_by_offset: Drafts that equal the text, at offsets 1 .. K - 1.
        agreement_by_offset: Drafts that equal the AR view's choice on the true text.
        acceptance_length: Accepted drafts plus the bonus token, drafts judged by the AR view.
        text_acceptance_length: The same, judged by the text.
    """

    tokens: int
    ar_loss: float
    diffusion_loss: float
    block_length: int
    accuracy_by_offset: list[float]
    agreement_by_offset: list[float]
    acceptance_length: float
    text_acceptance_length: float

    def line(self) -> str:
        """One line for a log."""
        offsets = " ".join(f"{value:.2f}" for value in self.agreement_by_offset)
        return (
            f"AR {self.ar_loss:.4f}, diffusion {self.diffusion_loss:.4f}, acceptance length "
            f"{self.acceptance_length:.3f} at K = {self.block_length} (against the text "
            f"{self.text_acceptance_length:.3f}), agreement by offset {offsets}"
        )


@torch.no_grad()
def evaluate_heldout(
    model: TriModeModel,
    data: TokenStream,
    *,
    config: TrainConfig,
    device: torch.device,
    precision: Precision,
) -> HeldOutReport:
    """Both losses under fixed noise, and the drafts of every whole block.

    Rows have the shape of the last stage, with the model's own block length.
    """
    stage, block_length = config.stages[-1], model.config.block_size
    row_len, micro = stage.sequence_length, stage.micro_batch_sequences
    sampler = RowSampler(data, row_len, (block_length,), _NOISE_SEED, is_shuffled=False)
    num_rows = max(1, min(config.evaluation.tokens // row_len, sampler.num_rows))
    counts = TargetCounts(0, 0)
    ar_sum = diffusion_sum = 0.0
    drafts: list[DraftAccuracy] = []
    mask_token_id = model.config.mask_token_id
    model.eval()
    for start in range(0, num_rows, micro):
        # Spread over the whole split, whose documents come package by package.
        samples = [
            i * sampler.num_rows // num_rows for i in range(start, min(start + micro, num_rows))
        ]
        rows = sampler.rows(samples)
        noisy = TrainingBatch(
            rows, corrupt(rows, samples, seed=_NOISE_SEED, mask_token_id=mask_token_id)
        )
        drafted = TrainingBatch(rows, draft_pattern(rows, mask_token_id=mask_token_id))
        counts += count_targets(noisy)
        with precision.autocast():
            sums = loss_sums(model, noisy.to(device))
            drafts.append(draft_accuracy(model, drafted.to(device), block_length=block_length))
        ar_sum += float(sums.ar)
        diffusion_sum += float(sums.diffusion)
    model.train()
    accuracy = merge(drafts)
    return HeldOutReport(
        tokens=num_rows * row_len,
        ar_loss=ar_sum / max(counts.num_ar_targets, 1),
        diffusion_loss=diffusion_sum / max(counts.num_maskable, 1),
        block_length=block_length,
        accuracy_by_offset=accuracy.by_offset(),
        agreement_by_offset=accuracy.by_offset_verifier(),
        acceptance_length=accuracy.acceptance_length,
        text_acceptance_length=accuracy.text_acceptance_length,
    )
