"""What a run trains, as the trainer sees it. There are four: `JointObjective` (all weights),
`LoraObjective` (the same loss, a LoRA), `DrafterObjective` (a drafter), `AnchorObjective` (a whole
diffusion view, from anchors)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch import nn

from trimode.model import TriModeModel
from trimode.training.anchor_evaluation import AnchorReport
from trimode.training.batches import LossTerms, StepBatch
from trimode.training.checkpoints import RunState
from trimode.training.evaluate import DrafterReport, HeldOutReport

Report = HeldOutReport | DrafterReport | AnchorReport


class Objective(Protocol):
    """What is trained, and towards what; the loop, the optimiser and the files are the trainer's.

    Attributes:
        model: The network.
        base_checksum: Of its weights, where they are frozen; else None.
    """

    model: TriModeModel
    base_checksum: int | None

    @property
    def trainable(self) -> nn.Module:
        """What the optimiser updates and a checkpoint holds."""

    def make_batch(self, step: int) -> StepBatch:
        """This rank's share of a step's batch; all ranks' are a function of config, data, step.

        Called from a thread of its own, so nothing may be exchanged with other ranks here.
        """

    def count_on_all_ranks(self, batch: StepBatch) -> StepBatch:
        """The batch with the counts of all ranks, which its losses are divided by."""

    def loss(self, micro_batch: Any, batch: StepBatch) -> LossTerms:
        """What one micro-batch (on the device) adds to the loss of its step."""

    def evaluate(self, state: RunState) -> tuple[Report, RunState]:
        """Held-out numbers, and the state with them in it if they choose what is exported."""

    def finish(self) -> Path:
        """Called once, after the last step and its evaluation; the folder with the result.

        This, `evaluate` and `count_on_all_ranks` are called by all ranks together.
        """
