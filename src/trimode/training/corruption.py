"""Noise: which positions of a row are masked, and how much their losses weigh.

Pure functions of the rows, a seed and each row's global sample index, so neither the split of a
batch nor a resumed run changes the noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from trimode.training.packing import PackedRows

MASK_RATIO_EPS = 1e-3
_NOISE = 3  # a random stream of its own beside those of packing


@dataclass(frozen=True, slots=True)
class Corruption:
    """The noisy copy of some rows.

    Args:
        noisy_ids: [B, S] int64. `clean_ids` with the mask token at the masked positions.
        is_masked: [B, S] bool. Which positions are masked.
        is_maskable: [B, S] bool. Which positions could have been masked.
        weight: [B, S] float32. 1/p of the loss at a masked position.
    """

    noisy_ids: torch.Tensor
    is_masked: torch.Tensor
    is_maskable: torch.Tensor
    weight: torch.Tensor

    def to(self, device: torch.device) -> Corruption:
        """The same noise on `device`."""
        return Corruption(
            **{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)}
        )


def corrupt(
    rows: PackedRows,
    samples: Sequence[int],
    *,
    seed: int,
    mask_token_id: int,
    draft_share: float = 0.0,
) -> Corruption:
    """Mask each row at its own ratio.

    1. t ~ U(0, 1) for each row, p = (1 - eps) t + eps.
    2. Every position is masked with chance p, independently; its loss weighs 1 / p.
    3. A share of the blocks is drawn as decoding shows them instead: offset 0 clean and not
       maskable, all others masked, p = 1.

    Args:
        rows: B rows on the CPU.
        samples: Their B global sample indices.
        seed: Of the noise.
        mask_token_id: What a masked position shows.
        draft_share: Chance of a block to be drawn as decoding shows it.
    """
    draws = [_draw(seed, sample, rows.clean_ids.shape[1]) for sample in samples]
    ratio = torch.tensor([draw[0] for draw in draws], dtype=torch.float32)[:, None]
    chance = (1 - MASK_RATIO_EPS) * ratio + MASK_RATIO_EPS
    is_masked = torch.stack([draw[1] for draw in draws]) < chance
    block_draws = torch.stack([draw[2] for draw in draws])
    is_drafted = block_draws.gather(1, rows.block_ids) < draft_share
    is_masked = torch.where(is_drafted, ~rows.is_block_start, is_masked)
    weight = torch.where(is_drafted, 1.0, 1.0 / chance)
    return Corruption(
        noisy_ids=torch.where(is_masked, mask_token_id, rows.clean_ids),
        is_masked=is_masked,
        is_maskable=~(is_drafted & rows.is_block_start),
        weight=weight,
    )


def draft_pattern(rows: PackedRows, *, mask_token_id: int) -> Corruption:
    """Every block as decoding shows it: one clean token, then masks."""
    is_masked = ~rows.is_block_start
    return Corruption(
        noisy_ids=torch.where(is_masked, mask_token_id, rows.clean_ids),
        is_masked=is_masked,
        is_maskable=is_masked,
        weight=torch.ones_like(rows.clean_ids, dtype=torch.float32),
    )


def _draw(seed: int, sample: int, row_len: int) -> tuple[float, torch.Tensor, torch.Tensor]:
    """One row's random numbers: its mask ratio, one number per position, one per block."""
    state = np.random.SeedSequence((seed, _NOISE, sample)).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(state[0]) >> 1)
    ratio = float(torch.rand((), generator=generator))
    return (
        ratio,
        torch.rand(row_len, generator=generator),
        torch.rand(row_len, generator=generator),
    )
