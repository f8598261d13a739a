"""The batches of a run: which samples a step trains on, packed and noised."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from trimode.training.config import StagePart, TrainConfig
from trimode.training.corruption import corrupt
from trimode.training.objective import TargetCounts, TrainingBatch, count_targets
from trimode.training.packing import RowSampler
from trimode.training.shards import TokenShards


@dataclass(frozen=True, slots=True)
class StepBatch:
    """All micro-batches of one optimiser step, on the CPU.

    Args:
        stage: The stage the step belongs to.
        samples: Global indices of its samples.
        micro_batches: What each forward sees.
        counts: What the loss sums of the step are divided by.
    """

    stage: StagePart
    samples: range
    micro_batches: Sequence[TrainingBatch]
    counts: TargetCounts


def place(config: TrainConfig, step: int) -> tuple[StagePart, int]:
    """The stage of a step, and the step's first global sample index."""
    first_sample = 0
    for stage in config.stages:
        if step < stage.num_steps:
            return stage, first_sample + step * stage.batch_sequences
        step -= stage.num_steps
        first_sample += stage.num_steps * stage.batch_sequences
    raise AssertionError("step beyond the run")


def make_batch(config: TrainConfig, data: TokenShards, step: int) -> StepBatch:
    """The batch of one step: a function of the config, the data and the step, of nothing else."""
    stage, first_sample = place(config, step)
    sampler = RowSampler(data, stage.sequence_length, stage.block_lengths, config.seed)
    samples = range(first_sample, first_sample + stage.batch_sequences)
    micro_batches = []
    for start in range(0, len(samples), stage.micro_batch_sequences):
        some = samples[start : start + stage.micro_batch_sequences]
        rows, noise = sampler.rows(some), None
        if stage.diffusion_weight > 0:
            noise = corrupt(
                rows,
                some,
                seed=config.seed,
                mask_token_id=data.mask_token_id,
                draft_share=stage.draft_share,
            )
        micro_batches.append(TrainingBatch(rows, noise))
    counts = sum((count_targets(b) for b in micro_batches), start=TargetCounts(0, 0))
    return StepBatch(stage, samples, micro_batches, counts)


def batches(
    config: TrainConfig, data: TokenShards, *, first_step: int, worker: ThreadPoolExecutor
) -> Generator[StepBatch]:
    """The batches from `first_step` to the end, each made while the one before is trained on."""
    ahead: Future[StepBatch] | None = None
    for step in range(first_step, config.total_steps):
        batch = ahead.result() if ahead else make_batch(config, data, step)
        if step + 1 < config.total_steps:
            ahead = worker.submit(make_batch, config, data, step + 1)
        yield batch
