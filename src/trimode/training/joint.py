"""The joint objective as the trainer sees it: all weights, `L_AR + alpha * L_diff`."""

from __future__ import annotations

from pathlib import Path

from trimode.model import TriModeModel
from trimode.training.batches import LossTerms, StepBatch, make_batch
from trimode.training.config import TrainConfig
from trimode.training.config_checks import open_heldout
from trimode.training.evaluate import HeldOutReport, evaluate_heldout
from trimode.training.export import export_model
from trimode.training.objective import TrainingBatch, loss_sums
from trimode.training.precision import Precision
from trimode.training.resume import RunState
from trimode.training.shards import TokenShards


class JointObjective:
    """Both views of one network. See `trainer.Objective` for what the methods are for.

    Args:
        config: Without a `drafter` part.
        data: The training split.
        model: On its device. All of it is trained.
        precision: Of the evaluation.
    """

    base_checksum: int | None = None

    def __init__(
        self, config: TrainConfig, data: TokenShards, *, model: TriModeModel, precision: Precision
    ) -> None:
        self.model = model.train()
        self.trainable: TriModeModel = model
        self._config, self._data, self._precision = config, data, precision
        self._held_out = open_heldout(config, model)

    def make_batch(self, step: int) -> StepBatch:
        """The rows of a step and their noise."""
        return make_batch(self._config, self._data, step)

    def loss(self, micro_batch: TrainingBatch, batch: StepBatch) -> LossTerms:
        """The share of one micro-batch in the loss of its step."""
        sums = loss_sums(self.model, micro_batch)
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
            device=self.model.device,
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
        )
