"""Training the diffusion view from anchors: one adapter on a frozen base. See `anchor_config`.

One step reads its rows once with the AR view, feeds groups of masks behind their anchors, and pulls
each mask's law towards what the AR view says of that place on the true text.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

import torch

from trimode.errors import ConfigError, UnsupportedError
from trimode.model import DrafterAdapter, TriModeModel
from trimode.model.adapter import new_adapter
from trimode.model.corrector import new_corrector
from trimode.training.anchor_config import AnchorPart
from trimode.training.anchor_evaluation import AnchorQuality, AnchorReport, measure_anchors
from trimode.training.anchor_groups import Drawn, draw_groups, lay_out, moved
from trimode.training.anchor_loss import GroupSums, Heads, Kind, group_sums
from trimode.training.anchor_pass import ReadText, encode_groups, read_text
from trimode.training.batches import LossTerms, StepBatch, step_samples
from trimode.training.checkpoints import RunState
from trimode.training.config import TrainConfig
from trimode.training.config_checks import open_heldout
from trimode.training.conversation_packing import make_sampler
from trimode.training.drafter import check_base, kept_if_best, weights_checksum
from trimode.training.packing import PackedRows
from trimode.training.parallel import Parallel
from trimode.training.precision import Precision
from trimode.training.shards import TokenShards

logger = logging.getLogger(__name__)

FOLDER = "drafter"
"""Of the best adapter, in `output_dir`."""


@dataclass(frozen=True, slots=True)
class AnchorBatch:
    """Rows and their groups.

    Args:
        rows: B rows.
        drawn: Their groups.
        kind: The loss at this point of the run.
    """

    rows: PackedRows
    drawn: Drawn
    kind: Kind

    def to(self, device: torch.device) -> AnchorBatch:
        """The same batch on `device`."""
        return AnchorBatch(self.rows.to(device), self.drawn.to(device), self.kind)


@dataclass(frozen=True, slots=True)
class AnchorCounts:
    """What sums are divided by."""

    num_groups: int
    num_drafts: int
    num_masks: int


class AnchorObjective:
    """One adapter on a frozen base. See `trainer.Objective` for what the methods are for.

    Args:
        config: With a `drafter` part that has `anchors`.
        data: The training split.
        model: The whole base, the same on every rank, where it stays whole. It is frozen here, and
            in bfloat16 where that is the precision, since nothing updates it.
        precision: Of the products.
        parallel: The ranks, which share the rows.

    Raises:
        UnsupportedError: Tensor parallelism.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: TokenShards,
        *,
        model: TriModeModel,
        precision: Precision,
        parallel: Parallel,
    ) -> None:
        part = config.drafter
        assert part is not None
        assert part.anchors is not None
        self._config, self._part, self._data = config, part, data
        self._precision, self._parallel = precision, parallel
        self._anchors: AnchorPart = part.anchors
        if config.parallel.tensor_parallel > 1:
            raise UnsupportedError(
                f"tensor_parallel is {config.parallel.tensor_parallel}, but anchors train on whole "
                "layers only: set it to 1"
            )
        self.model = model.requires_grad_(False).to(parallel.device)
        wide = None
        if precision.name == "bf16":
            wide = model.diffusion_head.weight.detach().clone()
            model.to(torch.bfloat16)
        self.base_checksum: int | None = weights_checksum(model)
        self._heads = Heads(model, wide)
        self.trainable: DrafterAdapter = self._new_adapter()
        self._held_out = open_heldout(config, model)
        self._measured: dict[str, AnchorQuality] = {}
        self._best_score: float | None = None
        self._folder = Path(config.output_dir) / FOLDER

    def make_batch(self, step: int) -> StepBatch:
        """The rows of a step and their groups."""
        config, anchors = self._config, self._anchors
        stage, samples = step_samples(config, step)
        sampler = make_sampler(self._data, stage.sequence_length, stage.block_lengths, config.seed)
        progress = step / config.total_steps
        micro, local = stage.micro_batch_sequences, self._parallel.local_samples(samples)
        parts = []
        for start in range(0, len(local), micro):
            some = local[start : start + micro]
            rows = sampler.rows(some)
            drawn = draw_groups(
                rows,
                some,
                part=anchors,
                block_length=self.model.config.block_size,
                seed=config.seed,
                is_replaying=progress >= anchors.replay_from,
            )
            parts.append(AnchorBatch(rows, drawn, loss_at(anchors, progress)))
        counts = AnchorCounts(
            *(
                sum(getattr(part.drawn, name) for part in parts)
                for name in ("num_groups", "num_drafts", "num_masks")
            )
        )
        return StepBatch(stage, samples, parts, counts)

    def count_on_all_ranks(self, batch: StepBatch) -> StepBatch:
        """Groups, drafts and masks."""
        counts = batch.counts
        found = self._parallel.sum_numbers([counts.num_groups, counts.num_drafts, counts.num_masks])
        all_counts = AnchorCounts(*map(int, found))
        return replace(batch, counts=all_counts, drafted_tokens=all_counts.num_masks)

    def loss(self, micro_batch: AnchorBatch, batch: StepBatch) -> LossTerms:
        """The mean over the step's groups of their weighted places."""
        text = read_text(self.model, micro_batch.rows)
        drawn = micro_batch.drawn
        if bool(drawn.is_replayed.any()):
            with torch.no_grad():
                runs = self._sums(text, drawn, micro_batch.kind).runs
            drawn = moved(micro_batch.rows, drawn, runs)
        sums = self._sums(text, drawn, micro_batch.kind)
        counts: AnchorCounts = batch.counts
        loss, num_drafts = sums.loss / max(counts.num_groups, 1), max(counts.num_drafts, 1)
        return LossTerms(
            loss=loss,
            reported={
                "loss": loss.detach(),
                "overlap": sums.overlap / num_drafts,
                "acceptance_length": sums.num_emitted / num_drafts,
                **{f"right_to_{i}": n / num_drafts for i, n in enumerate(sums.reached, start=2)},
            },
        )

    def evaluate(self, state: RunState) -> tuple[AnchorReport, RunState]:
        """Held-out acceptance; the best adapter so far is exported."""
        form = self._anchors.forms[0]
        if not self._measured:
            fresh = self._new_adapter()
            self._measured = {"none": self._measure(None), "fresh": self._measure(fresh)}
        report = AnchorReport(
            num_masks=self._anchors.num_masks,
            form=form,
            without_adapter=self._measured["none"],
            untrained=self._measured["fresh"],
            with_adapter=self._measure(self.trainable),
        )
        measured = [report.with_adapter.of(one) for one in self._anchors.forms]
        self.trainable.form = replace(
            self.trainable.form,
            acceptance=tuple(  # as far as any draft was right
                tuple(takewhile(lambda chance: chance > 0, one.conditional_by_offset))
                for one in measured
            ),
        )
        score = report.with_adapter.of(form).round_acceptance_length
        state = kept_if_best(
            *(self.trainable, state),
            score=score,
            folder=self._folder,
            config=self._config,
            parallel=self._parallel,
        )
        self._best_score = state.best_score
        return report, state

    def finish(self) -> Path:
        """The folder of the best adapter.

        Raises:
            TriModeError: The base is not what it was at the start.
        """
        check_base(
            *(self.model, self.base_checksum),
            config=self._config,
            folder=self._folder,
            parallel=self._parallel,
        )
        best = self._best_score
        before = self._measured["fresh"].of(self._anchors.forms[0]).round_acceptance_length
        if best is not None and best <= before:
            logger.warning(
                "the adapter drafts no better than before its first step (%.3f against %.3f): "
                "train longer, or with another learning rate",
                *(best, before),
            )
        return self._folder

    def _sums(self, text: ReadText, drawn: Drawn, kind: Kind) -> GroupSums:
        groups = lay_out(
            text.rows,
            drawn,
            mask_token_id=self.model.config.mask_token_id,
            eos_token_id=self._data.eos_token_id,
        )
        hidden = encode_groups(
            self.model,
            text,
            groups,
            adapter=self.trainable,
            adapts_clean=self._anchors.adapts_clean,
        )
        return group_sums(
            self.model,
            text,
            groups,
            hidden,
            heads=self._heads,
            part=self._part,
            kind=kind,
            corrector=self.trainable.corrector,
        )

    def _new_adapter(self) -> DrafterAdapter:
        """The adapter before its first step, the same whenever it is made."""
        anchors, config = self._anchors, self.model.config
        if anchors.corrector_candidates > config.vocab_size:
            raise ConfigError(
                f"drafter.anchors.corrector_candidates is {anchors.corrector_candidates}, but the "
                f"model has {config.vocab_size} tokens"
            )
        table = self.model.encoder.embed_tokens.weight.detach().float()
        mean = table[: config.num_valid_tokens or config.vocab_size].mean(0)
        corrector = None
        if anchors.corrector_rank:
            corrector = new_corrector(
                config.hidden_size,
                rank=anchors.corrector_rank,
                num_candidates=anchors.corrector_candidates,
                seed=self._config.seed,
            )
        return new_adapter(
            self.model.encoder.layers,
            rank=self._part.rank,
            alpha=self._part.alpha,
            targets=self._part.targets,
            seed=self._config.seed,
            form=anchors.adapter_form,
            mask_embeddings=mean.repeat(anchors.mask_places, 1) if anchors.mask_places else None,
            corrector=corrector,
        ).to(self._parallel.device)

    def _measure(self, adapter: DrafterAdapter | None) -> AnchorQuality:
        return measure_anchors(
            self.model,
            self._held_out,
            config=self._config,
            parallel=self._parallel,
            precision=self._precision,
            heads=self._heads,
            adapter=adapter,
        )


def loss_at(part: AnchorPart, progress: float) -> Kind:
    """The loss at a share of the run."""
    if part.loss == "kl_then_lk":
        return "kl" if progress < part.lk_from else "lk"
    return part.loss
