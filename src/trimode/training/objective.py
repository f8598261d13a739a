"""The joint objective `L = L_AR + alpha * L_diff` (design, section 6) and the draft statistics.

    L_AR   = sum over AR targets of the loss / number of AR targets
    L_diff = sum over masked, supervised positions of loss / p / number of maskable, supervised
    tokens

Both numbers are global: `count_targets` gives them before any forward, so that they can be summed
over the micro-batches of a step (and over ranks) and every micro-batch be divided by the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimode.model import AdapterSwitch, Checkpointing, DrafterAdapter, TriModeModel
from trimode.training.corruption import Corruption
from trimode.training.dual_stream import causal_attention, dual_stream_attention
from trimode.training.head_loss import head_loss_sum
from trimode.training.packing import PackedRows


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """Rows and their noise.

    Args:
        rows: The text.
        noise: None where only the AR view is trained.
        is_row_averaged: Whether each row's loss is averaged over its own targets first, and then
            over the rows (sequence-wise), and not over all targets alike (facts 2.1).
    """

    rows: PackedRows
    noise: Corruption | None
    is_row_averaged: bool = False

    def to(self, device: torch.device) -> TrainingBatch:
        """The same batch on `device`."""
        noise = None if self.noise is None else self.noise.to(device)
        return TrainingBatch(self.rows.to(device), noise, self.is_row_averaged)


@dataclass(frozen=True, slots=True)
class TargetCounts:
    """What the two sums are divided by."""

    num_ar_targets: int
    num_maskable: int

    def __add__(self, other: TargetCounts) -> TargetCounts:
        return TargetCounts(
            self.num_ar_targets + other.num_ar_targets, self.num_maskable + other.num_maskable
        )


@dataclass(frozen=True, slots=True)
class LossSums:
    """Sums, not means: scalars of float32 or wider, with a graph in training."""

    ar: Tensor
    diffusion: Tensor

    def total(self, counts: TargetCounts, *, diffusion_weight: float) -> Tensor:
        """`L_AR + alpha * L_diff`, divided by the global `counts`."""
        ar = self.ar / max(counts.num_ar_targets, 1)
        return ar + diffusion_weight * self.diffusion / max(counts.num_maskable, 1)


def is_ar_target(rows: PackedRows) -> Tensor:
    """[B, S - 1] bool. Whether token s + 1 is a target for the AR view at token s."""
    document = rows.document_ids
    return (document[:, 1:] == document[:, :-1]) & rows.is_supervised[:, 1:]


def is_diffusion_target(rows: PackedRows, noise: Corruption) -> Tensor:
    """[B, S] bool. Whether the token is a target wherever it happens to be masked."""
    return noise.is_maskable & rows.is_supervised


def count_targets(batch: TrainingBatch) -> TargetCounts:
    """Targets of both losses in a batch (rows that have any, if row-averaged); needs no forward."""

    def count(is_target: Tensor) -> int:
        return int((is_target.any(dim=1) if batch.is_row_averaged else is_target).sum())

    noise = batch.noise
    num_maskable = 0 if noise is None else count(is_diffusion_target(batch.rows, noise))
    return TargetCounts(count(is_ar_target(batch.rows)), num_maskable)


def target_weights(is_target: Tensor, *, is_row_averaged: bool) -> Tensor:
    """[B, S] float32. Weight of each target: 1, or 1 over its row's number of targets."""
    if not is_row_averaged:
        return torch.ones(is_target.shape, device=is_target.device)
    return (1 / is_target.sum(dim=1, keepdim=True).clamp(min=1)).expand(is_target.shape)


def loss_sums(
    model: TriModeModel, batch: TrainingBatch, *, checkpointing: Checkpointing = False
) -> LossSums:
    """Both loss sums of a batch in one forward.

    With noise: the dual stream. Without: the clean half alone, each document causal.

    Args:
        model: The network.
        batch: On its device.
        checkpointing: What the backward makes again (`encode`).
    """
    rows, noise = batch.rows, batch.noise
    if noise is None:
        hidden = model.encode(
            rows.clean_ids,
            rows.position_ids,
            attend=causal_attention(rows, dtype=model.dtype, is_rerun=checkpointing is True),
            checkpointing=checkpointing,
        )
        ar = _ar_sum(model, hidden, batch)
        return LossSums(ar=ar, diffusion=torch.zeros_like(ar))
    noisy_hidden, clean_hidden = encode_dual_stream(model, batch, checkpointing=checkpointing)
    return LossSums(
        ar=_ar_sum(model, clean_hidden, batch),
        diffusion=_diffusion_sum(model, noisy_hidden, batch),
    )


def encode_dual_stream(
    model: TriModeModel,
    batch: TrainingBatch,
    *,
    adapter: DrafterAdapter | None = None,
    checkpointing: Checkpointing = False,
) -> tuple[Tensor, Tensor]:
    """Hidden states of the noisy and of the clean half, [B, S, H] each.

    The adapter, if there is one, is on for the noisy half only. `checkpointing` as in `encode`.
    """
    rows, noise = batch.rows, batch.noise
    assert noise is not None, "a dual stream needs noise"
    row_len = rows.clean_ids.shape[1]
    switch = None
    if adapter is not None:
        is_noisy = torch.arange(2 * row_len, device=rows.clean_ids.device) < row_len
        switch = AdapterSwitch(adapter, is_noisy[:, None])
    hidden = model.encode(
        torch.cat((noise.noisy_ids, rows.clean_ids), dim=1),
        torch.cat((rows.position_ids, rows.position_ids), dim=1),
        attend=dual_stream_attention(rows, dtype=model.dtype, is_rerun=checkpointing is True),
        adapter=switch,
        checkpointing=checkpointing,
    )
    return hidden[:, :row_len], hidden[:, row_len:]


def _ar_sum(model: TriModeModel, hidden: Tensor, batch: TrainingBatch) -> Tensor:
    """Shifted: the state at token s predicts token s + 1."""
    is_target = is_ar_target(batch.rows)
    weights = target_weights(is_target, is_row_averaged=batch.is_row_averaged)
    places = is_target.flatten().nonzero()[:, 0]
    states = hidden[:, :-1].flatten(0, 1).index_select(0, places)
    targets = batch.rows.clean_ids[:, 1:].flatten().index_select(0, places)
    return head_loss_sum(
        model.diffusion_head, states, targets, weights.flatten().index_select(0, places)
    )


def _diffusion_sum(model: TriModeModel, hidden: Tensor, batch: TrainingBatch) -> Tensor:
    """Not shifted: the state at a masked token predicts that token. The head runs for no others."""
    rows, noise = batch.rows, batch.noise
    assert noise is not None
    is_target = is_diffusion_target(rows, noise)
    weights = target_weights(is_target, is_row_averaged=batch.is_row_averaged) * noise.weight
    places = (is_target & noise.is_masked).flatten().nonzero()[:, 0]
    states = hidden.flatten(0, 1).index_select(0, places)
    targets = rows.clean_ids.flatten().index_select(0, places)
    return head_loss_sum(
        model.diffusion_head, states, targets, weights.flatten().index_select(0, places)
    )
