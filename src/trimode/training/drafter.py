"""Training the drafter: LoRA on a frozen base, towards the verifier's law on the drafter's context.

Source: facts 2.5 (paper section 3.3 and appendix B). One step plays a round of self-speculation in
every block of its rows (`draft_round`) and learns from the places that the round decides on
(`drafter_loss`). The AR view cannot change, since the base has no gradients; it is checked anyway.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trimode.checkpoint.adapter import save_adapter
from trimode.checkpoint.whole_folder import writing
from trimode.errors import TriModeError
from trimode.model import DrafterAdapter, TriModeModel
from trimode.model.adapter import new_adapter
from trimode.training.batches import LossTerms, StepBatch, step_samples
from trimode.training.checkpoints import RunState
from trimode.training.config import DrafterPart, TrainConfig
from trimode.training.config_checks import open_heldout
from trimode.training.conversation_packing import ConversationSampler, make_sampler
from trimode.training.distribute import whole_parameters
from trimode.training.draft_noise import draw_slots
from trimode.training.draft_round import (
    DraftBatch,
    Round,
    banned_logits,
    chunks,
    draftable,
    num_tokens,
    play_round,
)
from trimode.training.drafter_loss import block_mean_weights, place_losses
from trimode.training.evaluate import DrafterReport, DraftQuality, measure_drafter
from trimode.training.export import DTYPES
from trimode.training.packing import RowSampler
from trimode.training.parallel import Parallel
from trimode.training.precision import Precision
from trimode.training.shards import TokenShards

logger = logging.getLogger(__name__)

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class DrafterObjective:
    """A LoRA drafter on a frozen base. See `trainer.Objective` for what the methods are for.

    Args:
        config: With a `drafter` part.
        data: The training split.
        model: The whole base, the same on every rank. Frozen and shared out here; every rank has
            the whole adapter.
        precision: Of the evaluation.
        parallel: The ranks.
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
        assert config.drafter is not None
        self.model = model.requires_grad_(False)
        self.base_checksum: int | None = weights_checksum(model)
        parallel.shard(model, gather_dtype=precision.gather_dtype, has_adapter=True)
        self.trainable: DrafterAdapter = new_adapter(
            model.encoder.layers,
            rank=config.drafter.rank,
            alpha=config.drafter.alpha,
            targets=config.drafter.targets,
            seed=config.seed,
        ).to(parallel.device)
        self._config, self._part, self._data = config, config.drafter, data
        self._precision, self._parallel = precision, parallel
        self._held_out = open_heldout(config, model)
        self._without_adapter: DraftQuality | None = None
        self._best_score: float | None = None
        self._folder = Path(config.output_dir) / "linear_spec_lora"

    def make_batch(self, step: int) -> StepBatch:
        """The rows of a step, with what the round in each block needs."""
        stage, samples = step_samples(self._config, step)
        sampler = make_sampler(
            self._data, stage.sequence_length, stage.block_lengths, self._config.seed
        )
        micro, local = stage.micro_batch_sequences, self._parallel.local_samples(samples)
        parts = [
            make_draft_batch(
                sampler,
                local[start : start + micro],
                seed=self._config.seed,
                sampled_share=self._part.sampled_share,
                eos_token_id=self._data.eos_token_id,
            )
            for start in range(0, len(local), micro)
        ]
        return StepBatch(stage, samples, parts, sum(part.num_blocks for part in parts))

    def count_on_all_ranks(self, batch: StepBatch) -> StepBatch:
        """Blocks that are drafted."""
        return replace(batch, counts=int(self._parallel.sum_numbers([batch.counts])[0]))

    def loss(self, micro_batch: DraftBatch, batch: StepBatch) -> LossTerms:
        """`L_LK + L_CE`, each the mean over the step's blocks of the mean over a block."""
        played = play_round(
            self.model,
            micro_batch,
            adapter=self.trainable,
            eos_token_id=self._data.eos_token_id,
        )
        sums = round_sums(self.model, micro_batch, played, part=self._part)
        num_blocks = max(batch.counts, 1)
        lk, ce = sums.lk / num_blocks, sums.ce / num_blocks
        return LossTerms(
            loss=self._part.lk_weight * lk + self._part.ce_weight * ce,
            reported={
                "lk_loss": lk.detach(),
                "ce_loss": ce.detach(),
                "overlap": sums.overlap / num_blocks,
                "acceptance_length": (sums.num_accepted + micro_batch.num_blocks) / num_blocks,
            },
        )

    def evaluate(self, state: RunState) -> tuple[DrafterReport, RunState]:
        """Held-out acceptance with and without the adapter; the best adapter so far is exported."""
        report = DrafterReport(
            block_length=self.model.config.block_size,
            without_adapter=self._without_adapter or self._measure(None),
            with_adapter=self._measure(self.trainable),
        )
        self._without_adapter = report.without_adapter
        score = report.with_adapter.round_acceptance_length
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
        best, bare = self._best_score, self._without_adapter
        if best is not None and bare is not None and best <= bare.round_acceptance_length:
            logger.warning(
                "the adapter drafts no better than the base alone (%.3f against %.3f): train "
                "longer, or with another learning rate",
                *(best, bare.round_acceptance_length),
            )
        return self._folder

    def _measure(self, adapter: DrafterAdapter | None) -> DraftQuality:
        return measure_drafter(
            self.model,
            self._held_out,
            config=self._config,
            parallel=self._parallel,
            precision=self._precision,
            adapter=adapter,
        )


def check_base(
    model: TriModeModel,
    checksum: int | None,
    *,
    config: TrainConfig,
    folder: Path,
    parallel: Parallel,
) -> None:
    """Refuse an adapter whose base is not what it was at the start.

    Args:
        model: The base.
        checksum: Of its weights at the start.
        config: Of the run.
        folder: Of the adapter.
        parallel: The ranks, which all see the error.

    Raises:
        TriModeError: The weights of the base changed.
    """
    if weights_checksum(model) == checksum:
        return
    raise parallel.common(
        TriModeError(
            f"the weights of the base {config.model.init!r} changed in memory while its adapter "
            f"was trained; do not use {str(folder)!r}"
        )
    )


def kept_if_best(
    adapter: DrafterAdapter,
    state: RunState,
    *,
    score: float,
    folder: Path,
    config: TrainConfig,
    parallel: Parallel,
) -> RunState:
    """Write an adapter from the main rank if no evaluation before scored as high.

    The adapter that was in `folder` stays until the new one is whole.

    Returns:
        The state, with the best score and its step.
    """
    if state.best_score is not None and score <= state.best_score:
        return state
    with parallel.together(), writing(folder, what="adapter"):
        if parallel.is_main:
            dtype = DTYPES[config.export.dtype]
            save_adapter(adapter, folder, dtype=dtype, base=config.model.init)
    return replace(state, best_score=score, best_step=state.step)


@dataclass(frozen=True, slots=True)
class RoundSums:
    """Sums over blocks of a batch: scalars of float32 or wider, the losses with a graph.

    Args:
        lk: Of the blocks' mean LK-hybrid losses.
        ce: Of the blocks' mean cross-entropies, over places whose target is in the support.
        overlap: Of the blocks' mean alpha_acc.
        num_accepted: Accepted drafts.
    """

    lk: Tensor
    ce: Tensor
    overlap: Tensor
    num_accepted: Tensor


def make_draft_batch(
    sampler: RowSampler | ConversationSampler,
    samples: Sequence[int],
    *,
    seed: int,
    sampled_share: float,
    eos_token_id: int,
) -> DraftBatch:
    """The rows of some samples and what a round in their blocks needs."""
    rows = sampler.rows(samples)
    block_lengths = torch.tensor([sampler.block_length(sample) for sample in samples])
    is_sampled, noise_keys = draw_slots(rows, samples, seed=seed, sampled_share=sampled_share)
    is_drafted = draftable(rows, block_lengths, eos_token_id=eos_token_id)
    return DraftBatch(rows, is_drafted, is_sampled, noise_keys)


def round_sums(
    model: TriModeModel, batch: DraftBatch, played: Round, *, part: DrafterPart
) -> RoundSums:
    """The losses of a round at its active places, averaged in each block and summed over blocks.

    Logits are made a chunk of places at a time, and again in the backward.
    """
    top_k = min(part.top_k, num_tokens(model.config) - 1)  # the mask token is banned

    def losses(draft_states: Tensor, verifier_states: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            verifier_logits = banned_logits(model, verifier_states)
        found = place_losses(
            banned_logits(model, draft_states),
            verifier_logits,
            verifier_logits.argmax(1),
            temperature=part.temperature,
            top_k=top_k,
            eta=part.eta,
        )
        return found.lk, found.ce, found.is_inside, found.overlap

    places = played.places[played.is_active]
    draft_states = played.draft_states[played.is_active]
    verifier_states = played.verifier_states[played.is_active]
    none = draft_states[:0, 0]  # keeps the graph where nothing was drafted
    results = [(none, none, none.bool(), none.detach())]
    for some in chunks(len(places), model.config.vocab_size):
        result = checkpoint(
            losses,
            draft_states[some],
            verifier_states[some],
            use_reentrant=False,
            preserve_rng_state=False,
        )
        results.append(result)
    lk, ce, is_inside, overlap = (torch.cat(column) for column in zip(*results, strict=True))

    def mean_weights(is_counted: Tensor) -> Tensor:
        grid = torch.zeros_like(batch.is_drafted).flatten()
        grid[places] = is_counted
        weights = block_mean_weights(grid.view_as(batch.is_drafted), batch.rows.block_ids)
        return weights.flatten()[places]

    weights = mean_weights(torch.ones_like(is_inside))
    return RoundSums(
        lk=(lk * weights).sum(),
        ce=(ce * mean_weights(is_inside)).sum(),
        overlap=(overlap * weights).sum(),
        num_accepted=played.is_accepted.sum(),
    )


def weights_checksum(model: TriModeModel) -> int:
    """A number that any change of the weights' bits changes (for all practical purposes)."""
    total = 0
    for parameter in whole_parameters(model):
        bits = parameter.detach().contiguous().view(_INTEGERS[parameter.element_size()])
        total = (total * 31 + int(bits.sum(dtype=torch.int64))) % (2**61 - 1)
    return total
