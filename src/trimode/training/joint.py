"""The joint objective as the trainer sees it: all weights, `L_AR + alpha * L_diff`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from trimode.model import TriModeModel
from trimode.training.batches import LossTerms, StepBatch, make_batch
from trimode.training.checkpoints import RunState
from trimode.training.config import TrainConfig
from trimode.training.config_checks import open_heldout
from trimode.training.evaluate import HeldOutReport, evaluate_heldout
from trimode.training.export import export_model
from trimode.training.objective import TrainingBatch, loss_sums
from trimode.training.parallel import Parallel
from trimode.training.precision import Precision
from trimode.training.shards import TokenShards


class JointObjective:
    """Both views of one network. See `trainer.Objective` for what the methods are for.

    Args:
        config: Without a `drafter` part.
        data: The training split.
        model: The whole network, the same on every rank. Shared out here.
        precision: Of the evaluation.
        parallel: The ranks.
    """

    base_checksum: int | None = None

    def __init__(
        self,
        config: TrainConfig,
        data: TokenShards,
        *,
        model: TriModeModel,
        precision: Precision,
        parallel: Parallel,
    ) -> None:
        self._config, self._data = config, data
        self._precision, self._parallel = precision, parallel
        self._held_out = open_heldout(config, model)
        self.model = model
        self.trainable = self._place(model)

    def _place(self, model: TriModeModel) -> nn.Module:
        """Share `model` out over the ranks; returns what is trained: all of it."""
        self._parallel.shard(model.train(), gather_dtype=self._precision.gather_dtype)
        return model

    def make_batch(self, step: int) -> StepBatch:
        """The rows of a step and their noise."""
        return make_batch(self._config, self._data, step, parallel=self._parallel)

    def count_on_all_ranks(self, batch: StepBatch) -> StepBatch:
        """Targets of both losses."""
        return replace(batch, counts=self._parallel.sum_counts(batch.counts))

    def loss(self, micro_batch: TrainingBatch, batch: StepBatch) -> LossTerms:
        """The share of one micro-batch in the loss of its step."""
        checkpointing = self._config.activation_checkpointing
        sums = loss_sums(self.model, micro_batch, checkpointing=checkpointing)
        counts = batch.counts
        reported = {"ar_loss": sums.ar.detach() / max(counts.num_ar_targets, 1)}
        if micro_batch.noise is not None:
            reported["diffusion_loss"] = sums.diffusion.detach() / max(counts.num_maskable, 1)
        return LossTerms(
            loss=sums.total(counts, diffusion_weight=batch.diffusion_weight),
            reported=reported,
        )

    def evaluate(self, state: RunState) -> tuple[HeldOutReport, RunState]:
        """Held-out losses and draft accuracy."""
        report = evaluate_heldout(
            self.model,
            self._held_out,
            config=self._config,
            parallel=self._parallel,
            precision=self._precision,
        )
        return report, state

    def finish(self) -> Path:
        """Export the network and its tokenizer."""
        return export_model(
            self.model,
            Path(self._config.output_dir) / "final",
            part=self._config.export,
            tokenizer_dir=Path(self._config.data) / "tokenizer",
            parallel=self._parallel,
        )
