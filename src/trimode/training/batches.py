"""The batches of a run: which samples a step trains on, and what is made of them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trimode.training.config import StagePart, TrainConfig
from trimode.training.conversation_packing import make_sampler
from trimode.training.corruption import corrupt
from trimode.training.objective import TargetCounts, TrainingBatch, count_targets
from trimode.training.packing import Windows
from trimode.training.parallel import Parallel
from trimode.training.shards import TokenShards


@dataclass(frozen=True, slots=True)
class StepBatch:
    """All micro-batches of one optimiser step, on the CPU.

    Args:
        stage: The stage the step belongs to.
        samples: Global indices of its samples, on all ranks together.
        micro_batches: What each forward of this rank sees, of the objective's own type.
        counts: What the loss sums of the step are divided by, of the objective's own type: of this
            rank's micro-batches at first, of all ranks' in the step.
        diffusion_weight: alpha at this step.
        drafted_tokens: Masks that are fed from anchors, of all ranks in the step.
    """

    stage: StagePart
    samples: range
    micro_batches: Sequence[Any]
    counts: Any
    diffusion_weight: float = 0.0
    drafted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class LossTerms:
    """What one micro-batch adds to its step: all is divided by the step's global counts already.

    Args:
        loss: Scalar with a graph.
        reported: Named scalars without a graph, for the log. Summed over the micro-batches of all
            ranks, each is its mean over the step.
    """

    loss: Tensor
    reported: dict[str, Tensor]


def _locate(config: TrainConfig, step: int) -> tuple[StagePart, int, int]:
    """The stage of a step, the step's number in it, and the stage's first global sample index."""
    first_sample = 0
    for stage in config.stages:
        if step < stage.num_steps:
            return stage, step, first_sample
        step -= stage.num_steps
        first_sample += stage.num_steps * stage.batch_sequences
    raise AssertionError("step beyond the run")


def place(config: TrainConfig, step: int) -> tuple[StagePart, int]:
    """The stage of a step, and the step's first global sample index."""
    stage, step_of_stage, first_sample = _locate(config, step)
    return stage, first_sample + step_of_stage * stage.batch_sequences


def step_samples(config: TrainConfig, step: int) -> tuple[StagePart, range]:
    """The stage of a step and the global indices of its samples."""
    stage, first_sample = place(config, step)
    return stage, range(first_sample, first_sample + stage.batch_sequences)


def stage_progress(config: TrainConfig, step: int) -> float:
    """Share of its stage, in [0, 1), that lies before a step."""
    stage, step_of_stage, _ = _locate(config, step)
    return step_of_stage / stage.num_steps


def ramped_weight(weight: float, progress: float, *, ramp: float) -> float:
    """`weight`, rising in a straight line from 0 over the first `ramp` share of a stage."""
    return weight if progress >= ramp else weight * progress / ramp


def block_lengths_at(stage: StagePart, progress: float) -> tuple[int, ...]:
    """The block lengths in use at a point of a stage."""
    if stage.block_schedule == "mixed":
        return stage.block_lengths
    return (stage.block_lengths[int(progress * len(stage.block_lengths))],)


def make_batch(
    config: TrainConfig, data: TokenShards, step: int, *, parallel: Parallel | None = None
) -> StepBatch:
    """This rank's share of a step of the joint objective; None is the only rank.

    All ranks' together are a function of the config, the data and the step, of nothing else.
    """
    stage, samples = step_samples(config, step)
    progress = stage_progress(config, step)
    sampler = make_sampler(
        data,
        stage.sequence_length,
        block_lengths_at(stage, progress),
        config.seed,
        num_copies=2 if stage.is_complementary else 1,
        windows=Windows(stage.infill_share, stage.infill_window) if stage.infill_share else None,
    )
    local = samples if parallel is None else parallel.local_samples(samples)
    micro_batches = []
    for start in range(0, len(local), stage.micro_batch_sequences):
        some = local[start : start + stage.micro_batch_sequences]
        rows, noise = sampler.rows(some), None
        if stage.diffusion_weight > 0:
            noise = corrupt(
                rows,
                some,
                seed=config.seed,
                mask_token_id=data.mask_token_id,
                draft_share=stage.draft_share,
                ratio_per=stage.ratio_per,
                late_half_life=stage.late_half_life,
                is_complementary=stage.is_complementary,
                is_windowed=[sampler.is_windowed(sample) for sample in some],
            )
        micro_batches.append(
            TrainingBatch(rows, noise, is_row_averaged=stage.loss_average == "sequence")
        )
    counts = sum((count_targets(b) for b in micro_batches), start=TargetCounts(0, 0))
    weight = ramped_weight(stage.diffusion_weight, progress, ramp=stage.diffusion_ramp)
    return StepBatch(stage, samples, micro_batches, counts, weight)


def batches(
    make: Callable[[int], StepBatch], *, steps: range, worker: ThreadPoolExecutor
) -> Generator[StepBatch]:
    """`make(step)` for every step, each made while the one before is trained on."""
    ahead: Future[StepBatch] | None = None
    for step in steps:
        batch = ahead.result() if ahead else make(step)
        if step + 1 < steps.stop:
            ahead = worker.submit(make, step + 1)
        yield batch
