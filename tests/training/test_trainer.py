"""The trainer's step against the same arithmetic written out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.training.fake_stream import write_data
from tests.training.tiny_run import MODEL, STAGE
from trimode.model import TriModeModel
from trimode.training.batches import (
    block_lengths_at,
    make_batch,
    place,
    ramped_weight,
    stage_progress,
)
from trimode.training.config import EvaluationPart, OptimizerPart, SchedulePart, TrainConfig
from trimode.training.corruption import corrupt
from trimode.training.objective import TrainingBatch, count_targets, loss_sums
from trimode.training.optim import make_optimizer
from trimode.training.packing import RowSampler
from trimode.training.shards import TokenShards
from trimode.training.trainer import _make_model, train

JOINT = replace(STAGE, name="joint", diffusion_weight=0.4, block_lengths=(4, 8), draft_share=0.25)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture
def config(data: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        data=str(data),
        output_dir=str(tmp_path / "run"),
        stages=(replace(STAGE, tokens=2 * 128), replace(JOINT, tokens=3 * 128)),
        model=MODEL,
        optimizer=OptimizerPart(learning_rate=1e-2, max_grad_norm=0.5),
        schedule=SchedulePart(warmup_share=0.2, decay_share=0.4, min_ratio=0.1),
        evaluation=EvaluationPart(tokens=256, every_steps=0),
        precision="fp32",
        device="cpu",
    )


def by_hand(config: TrainConfig, rates: list[float]) -> TriModeModel:
    """Every step as one whole batch: loss, clipped gradient, update."""
    data = TokenShards.open(Path(config.data), "train")
    torch.manual_seed(config.seed)
    model = _make_model(config, data).train()
    optimizer = make_optimizer(model, config.optimizer, has_fast_bf16=False)
    first, step = 0, 0
    for stage in config.stages:
        for _ in range(stage.tokens // 128):
            samples = range(first, first + 4)
            rows = RowSampler(data, 32, stage.block_lengths, config.seed).rows(samples)
            noise = None
            if stage.diffusion_weight:
                noise = corrupt(
                    rows, samples, seed=config.seed, mask_token_id=2, draft_share=stage.draft_share
                )
            batch = TrainingBatch(rows, noise)
            sums, counts = loss_sums(model, batch), count_targets(batch)
            loss = sums.ar / counts.num_ar_targets
            if noise is not None:
                loss = loss + stage.diffusion_weight * sums.diffusion / counts.num_maskable
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)
            optimizer.step(rates[step])
            first, step = first + 4, step + 1
    return model


@pytest.mark.parametrize("micro", [1, 2, 4])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_steps_equal_those_by_hand(config: TrainConfig, micro: int, optimizer: str) -> None:
    """Losses averaged per micro-batch, micro-batches left out, no clipping, no schedule, alpha
    ignored, samples of the second stage read from the start again."""
    stages = tuple(replace(stage, micro_batch_sequences=micro) for stage in config.stages)
    config = replace(config, stages=stages, optimizer=replace(config.optimizer, name=optimizer))
    result = train(config)
    # Progress 0.2, 0.4, 0.6, 0.8, 1.0 of 5 steps: warm-up ends at 0.2, decay begins at 0.6.
    expected = by_hand(config, rates=[1.0, 1.0, 1.0, 0.55, 0.1])
    assert result.final_dir is not None
    found = TriModeModel.from_pretrained(result.final_dir, dtype=torch.float32).state_dict()
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=2e-5)


def test_the_switches_reach_the_batch(config: TrainConfig) -> None:
    """Keys of the config that are read and then do nothing."""
    data = TokenShards.open(Path(config.data), "train")
    stage = replace(JOINT, tokens=10 * 128, draft_share=0.0)

    def batch(step: int = 0, **changes: object) -> tuple[TrainingBatch, float]:
        one = replace(config, stages=(replace(stage, **changes),))  # type: ignore[arg-type]
        found = make_batch(one, data, step)
        return found.micro_batches[0], found.diffusion_weight

    plain, weight = batch()
    assert weight == 0.4
    assert plain.noise is not None
    for changes in (
        {"ratio_per": "block"},
        {"late_half_life": 2.0},
        {"is_complementary": True},
        {"draft_share": 0.5},
        {"infill_share": 1.0, "infill_window": 16},
    ):
        other, _ = batch(**changes)
        assert other.noise is not None
        assert not torch.equal(other.noise.is_masked, plain.noise.is_masked), changes
    pair, _ = batch(is_complementary=True)
    assert torch.equal(pair.rows.clean_ids[0], pair.rows.clean_ids[1])
    assert batch(loss_average="sequence")[0].is_row_averaged
    assert batch(4, diffusion_ramp=0.8)[1] == pytest.approx(0.2)
    for step, block_length in ((0, 8), (4, 8), (5, 4), (9, 4)):
        rows = batch(step, block_schedule="curriculum", block_lengths=(8, 4))[0].rows
        starts = rows.is_block_start[0].nonzero()[:2, 0]
        assert int(starts[1] - starts[0]) in (block_length, int(starts[1]))


@pytest.mark.parametrize(
    ("progress", "ramp", "expected"),
    [(0.0, 0.0, 0.3), (0.0, 0.5, 0.0), (0.25, 0.5, 0.15), (0.5, 0.5, 0.3), (0.9, 0.5, 0.3)],
)
def test_ramped_weight_by_hand(progress: float, ramp: float, expected: float) -> None:
    """A ramp that never reaches the weight, or divides by zero when it is off."""
    assert ramped_weight(0.3, progress, ramp=ramp) == pytest.approx(expected)


def test_block_lengths_at_by_hand() -> None:
    """A curriculum out of order, or one that leaves out its last length."""
    stage = replace(JOINT, block_lengths=(2, 4, 8), block_schedule="curriculum")
    found = [block_lengths_at(stage, step / 9) for step in range(9)]
    assert found == [(2,)] * 3 + [(4,)] * 3 + [(8,)] * 3
    assert block_lengths_at(JOINT, 0.5) == (4, 8)


def test_place_and_progress(config: TrainConfig) -> None:
    """Samples read twice or skipped where one stage ends and the next begins."""
    places = [place(config, step) for step in range(5)]
    assert [(stage.name, first) for stage, first in places] == [
        ("ar", 0),
        ("ar", 4),
        ("joint", 8),
        ("joint", 12),
        ("joint", 16),
    ]
    found = [stage_progress(config, step) for step in range(5)]
    assert found == pytest.approx([0, 1 / 2, 0, 1 / 3, 2 / 3])
    with pytest.raises(AssertionError, match="beyond the run"):
        place(config, 5)
