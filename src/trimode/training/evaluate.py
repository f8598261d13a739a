"""Held-out losses and draft accuracy of what is in training. Text is not generated here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trimode.model import DrafterAdapter, TriModeModel
from trimode.training.config import TrainConfig
from trimode.training.conversation_packing import make_sampler
from trimode.training.corruption import corrupt, draft_pattern
from trimode.training.draft_accuracy import DraftAccuracy, draft_accuracy, merge
from trimode.training.draft_round import DraftBatch, draftable, play_round
from trimode.training.objective import TargetCounts, TrainingBatch, count_targets, loss_sums
from trimode.training.packing import PackedRows, TokenStream
from trimode.training.parallel import Parallel
from trimode.training.precision import Precision

_STRIDE = 10_007  # a prime, so that neighbours get ratios that lie far apart
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


@dataclass(frozen=True, slots=True)
class DraftQuality:
    """How far drafts get on the held-out split, chosen greedily.

    Args:
        tokens: Tokens looked at.
        round_acceptance_length: Accepted drafts plus the bonus token of a round begun at every
            block's first token: what greedy decoding sees there. Each draft is judged by the AR
            view after the drafts before it.
        acceptance_length: As in `HeldOutReport`: judged by the AR view after the text instead.
        agreement_by_offset: As in `HeldOutReport`.
    """

    tokens: int
    round_acceptance_length: float
    acceptance_length: float
    agreement_by_offset: list[float]


@dataclass(frozen=True, slots=True)
class DrafterReport:
    """A drafter on the held-out split, beside the bare diffusion view that it starts from."""

    block_length: int
    without_adapter: DraftQuality
    with_adapter: DraftQuality

    def line(self) -> str:
        """One line for a log."""
        before, after = self.without_adapter, self.with_adapter
        offsets = " ".join(f"{value:.2f}" for value in after.agreement_by_offset)
        return (
            f"acceptance length {after.round_acceptance_length:.3f} at K = {self.block_length} "
            f"({before.round_acceptance_length:.3f} without the adapter), on the text's context "
            f"{after.acceptance_length:.3f} ({before.acceptance_length:.3f}), agreement by offset "
            f"{offsets}"
        )


@torch.no_grad()
def evaluate_heldout(
    model: TriModeModel,
    data: TokenStream,
    *,
    config: TrainConfig,
    parallel: Parallel,
    precision: Precision,
) -> HeldOutReport:
    """Both losses under fixed noise, and the drafts of every whole block.

    Rows have the shape of the last stage, with the model's own block length. Data-parallel ranks
    see different ones, and all get the same report.
    """
    block_length, tokens = model.config.block_size, 0
    counts = TargetCounts(0, 0)
    ar_sum = diffusion_sum = 0.0
    drafts: list[DraftAccuracy] = []
    mask_token_id, device = model.config.mask_token_id, parallel.device
    model.eval()
    for samples, ratios, rows, is_counted in heldout_rows(
        data, config=config, block_length=block_length, parallel=parallel
    ):
        noise = corrupt(rows, samples, seed=_NOISE_SEED, mask_token_id=mask_token_id, ratios=ratios)
        noisy = TrainingBatch(rows, noise)
        drafted = TrainingBatch(rows, draft_pattern(rows, mask_token_id=mask_token_id))
        with precision.autocast():
            sums = loss_sums(model, noisy.to(device))
            accuracy = draft_accuracy(model, drafted.to(device), block_length=block_length)
        if is_counted:
            tokens += rows.clean_ids.numel()
            counts += count_targets(noisy)
            drafts.append(accuracy)
            ar_sum += float(sums.ar)
            diffusion_sum += float(sums.diffusion)
    model.train()
    counts, accuracy = parallel.sum_counts(counts), _on_all_ranks(drafts, block_length, parallel)
    tokens = int(parallel.sum_numbers([tokens])[0])
    ar_sum, diffusion_sum = parallel.sum_numbers([ar_sum, diffusion_sum])
    return HeldOutReport(
        tokens=tokens,
        ar_loss=ar_sum / max(counts.num_ar_targets, 1),
        diffusion_loss=diffusion_sum / max(counts.num_maskable, 1),
        block_length=block_length,
        accuracy_by_offset=accuracy.by_offset(),
        agreement_by_offset=accuracy.by_offset_verifier(),
        acceptance_length=accuracy.acceptance_length,
        text_acceptance_length=accuracy.text_acceptance_length,
    )


@torch.no_grad()
def measure_drafter(
    model: TriModeModel,
    data: TokenStream,
    *,
    config: TrainConfig,
    parallel: Parallel,
    precision: Precision,
    adapter: DrafterAdapter | None,
) -> DraftQuality:
    """The drafts of every block of the rows that `evaluate_heldout` looks at.

    Args:
        model: The base.
        data: The split.
        config: Shape and number of rows.
        parallel: The ranks, which share the rows.
        precision: Of the forwards.
        adapter: The drafter; None is the bare diffusion view.
    """
    block_length, eos_token_id = model.config.block_size, data.eos_token_id
    tokens, num_blocks, num_accepted, device = 0, 0, 0, parallel.device
    drafts: list[DraftAccuracy] = []
    for _, _, rows, is_counted in heldout_rows(
        data, config=config, block_length=block_length, parallel=parallel
    ):
        lens = torch.full((len(rows.clean_ids),), block_length)
        is_drafted = draftable(rows, lens, eos_token_id=eos_token_id)
        greedy = torch.zeros_like(is_drafted)
        batch = DraftBatch(rows, is_drafted, greedy, greedy.int()).to(device)
        noise = draft_pattern(rows, mask_token_id=model.config.mask_token_id)
        drafted = TrainingBatch(rows, noise).to(device)
        with precision.autocast():
            played = play_round(model, batch, adapter=adapter, eos_token_id=eos_token_id)
            accuracy = draft_accuracy(model, drafted, block_length=block_length, adapter=adapter)
        if is_counted:
            tokens += rows.clean_ids.numel()
            drafts.append(accuracy)
            num_blocks += batch.num_blocks
            num_accepted += int(played.is_accepted.sum())
    on_text = _on_all_ranks(drafts, block_length, parallel)
    sums = parallel.sum_numbers([tokens, num_blocks, num_accepted])
    tokens, num_blocks, num_accepted = map(int, sums)
    return DraftQuality(
        tokens=tokens,
        round_acceptance_length=1 + num_accepted / max(num_blocks, 1),
        acceptance_length=on_text.acceptance_length,
        agreement_by_offset=on_text.by_offset_verifier(),
    )


def _on_all_ranks(
    parts: list[DraftAccuracy], block_length: int, parallel: Parallel
) -> DraftAccuracy:
    """The counts of all ranks' batches together; a rank may have none."""
    none = torch.zeros(block_length - 1, dtype=torch.int64)
    found = merge([DraftAccuracy(0, none, none, 0, 0), *parts])

    def summed(counts: Tensor) -> Tensor:
        return parallel.sum_over_data(counts).cpu()

    scalars = [found.num_blocks, found.accepted, found.verifier_accepted]
    num_blocks, accepted, verifier_accepted = map(int, parallel.sum_numbers(scalars))
    return DraftAccuracy(
        num_blocks=num_blocks,
        correct=summed(found.correct),
        verifier_correct=summed(found.verifier_correct),
        accepted=accepted,
        verifier_accepted=verifier_accepted,
    )


def heldout_rows(
    data: TokenStream, *, config: TrainConfig, block_length: int, parallel: Parallel
) -> Iterator[tuple[list[int], list[float], PackedRows, bool]]:
    """Rows of the last stage's shape with their indices and mask ratios, a micro-batch at a time.

    Data-parallel ranks take turns. All see equally many, since their forwards need each other; the
    last one may be there for that only, and then is not counted (the fourth value).

    Rows are spread over the whole split, whose documents come package by package, and their ratios
    evenly over 0 to 1, since drawn ones move the diffusion loss by as much as a run's progress.
    """
    row_len, micro = config.stages[-1].sequence_length, config.stages[-1].micro_batch_sequences
    sampler = make_sampler(data, row_len, (block_length,), _NOISE_SEED, is_shuffled=False)
    num_rows = max(1, min(config.evaluation.tokens // row_len, sampler.num_rows))
    starts = range(0, num_rows, micro)
    for first in range(0, len(starts), parallel.data_parallel):
        turn = first + parallel.data_rank
        is_counted = turn < len(starts)
        start = starts[turn if is_counted else 0]
        stop = min(start + micro, num_rows)
        samples = [i * sampler.num_rows // num_rows for i in range(start, stop)]
        shuffled = [(i * _STRIDE % num_rows + 0.5) / num_rows for i in range(start, stop)]
        yield samples, shuffled, sampler.rows(samples), is_counted
