"""Noise: which positions of a row are masked, and how much their losses weigh.

Pure functions of the rows, a seed and each row's global sample index, so neither the split of a
batch nor a resumed run changes the noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

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
    ratio_per: Literal["sequence", "block"] = "sequence",
    late_half_life: float | None = None,
    is_complementary: bool = False,
    ratios: Sequence[float] | None = None,
    is_windowed: Sequence[bool] | None = None,
) -> Corruption:
    """Mask each row at its own ratio.

    1. t ~ U(0, 1) for each row (or each block), p = (1 - eps) t + eps (`mask_chance`).
    2. Late-heavy: p of a token at offset j of its block becomes p ^ (2 ^ (-j / half-life)).
    3. Every maskable position is masked with chance p, independently; its loss weighs 1 / p.
    4. Complementary: samples 2i and 2i + 1 share their numbers; the odd one masks just what the
       even one shows, with chance 1 - p.
    5. A share of the blocks is drawn as decoding shows them instead: offset 0 clean and not
       maskable, all others masked, p = 1.

    6. A windowed row's blocks are windows with one gap each: only tokens of the gap are maskable.
       Half of the gaps are masked whole, p = 1; the others token by token at a t of their own, as
       step 1 has it (`gaps`).

    The published recipe is steps 1 and 3 (facts 2.2); 2 and 4 are switches in its code.

    Args:
        rows: B rows on the CPU.
        samples: Their B global sample indices.
        seed: Of the noise.
        mask_token_id: What a masked position shows.
        draft_share: Chance of a block to be drawn as decoding shows it.
        ratio_per: What has a t of its own.
        late_half_life: Offsets after which the exponent of step 2 has halved; None: step 2 is off.
        is_complementary: Whether step 4 is on; the rows of samples 2i and 2i + 1 must be equal.
        ratios: t of each row, in place of a drawn one (evaluation).
        is_windowed: Which rows are windowed (`packing.Windows`); None for none.
    """
    copies = 2 if is_complementary else 1
    row_len = rows.clean_ids.shape[1]
    draws = [_draw(seed, sample // copies, row_len) for sample in samples]
    if ratio_per == "block":
        ratio = torch.stack([draw.block_ratios for draw in draws]).gather(1, rows.block_ids)
    else:
        of_rows = [draw.ratio for draw in draws] if ratios is None else list(ratios)
        ratio = torch.tensor(of_rows)[:, None].expand(-1, row_len)
    chance = mask_chance(ratio, is_complementary=is_complementary)
    if late_half_life is not None:
        chance = late_heavy(chance, block_offsets(rows), half_life=late_half_life)
    is_masked = torch.stack([draw.positions for draw in draws]) < chance
    if is_complementary:
        is_odd = torch.tensor([sample % 2 == 1 for sample in samples])[:, None]
        is_masked = is_masked ^ is_odd
        chance = torch.where(is_odd, 1 - chance, chance)
    is_drafted = torch.stack([draw.blocks for draw in draws]).gather(1, rows.block_ids)
    is_drafted = is_drafted < draft_share
    is_maskable = rows.is_maskable & ~(is_drafted & rows.is_block_start)
    is_masked = torch.where(is_drafted, is_maskable, is_masked & is_maskable)
    weight = torch.where(is_drafted, 1.0, 1.0 / chance)
    if is_windowed is not None and any(is_windowed):
        in_window = torch.tensor(list(is_windowed))[:, None]
        is_gap, gap_chance = gaps(rows, draws)
        is_gap = is_gap & rows.is_maskable
        positions = torch.stack([draw.positions for draw in draws])
        is_maskable = torch.where(in_window, is_gap, is_maskable)
        is_masked = torch.where(in_window, is_gap & (positions < gap_chance), is_masked)
        weight = torch.where(in_window, 1.0 / gap_chance, weight)
    return Corruption(
        noisy_ids=torch.where(is_masked, mask_token_id, rows.clean_ids),
        is_masked=is_masked,
        is_maskable=is_maskable,
        weight=weight,
    )


def gaps(rows: PackedRows, draws: Sequence[Draw]) -> tuple[torch.Tensor, torch.Tensor]:
    """One gap in every block, of 1 token to half of the block, anywhere in it.

    Args:
        rows: B rows.
        draws: Their random numbers.

    Returns:
        [B, S] bool, what lies in a gap, and [B, S] float32, the chance of a mask in the gap of the
        token's block.
    """
    lens = torch.zeros_like(rows.block_ids)
    lens.scatter_add_(1, rows.block_ids, torch.ones_like(rows.block_ids))

    def of_blocks(numbers: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack(list(numbers)).gather(1, rows.block_ids)

    block_lens = lens.gather(1, rows.block_ids)
    gap_lens = 1 + (of_blocks([draw.gap_lens for draw in draws]) * (block_lens // 2)).long()
    gap_lens = gap_lens.clamp(max=(block_lens // 2).clamp(min=1))
    starts = (of_blocks([draw.gap_starts for draw in draws]) * (block_lens - gap_lens + 1)).long()
    offsets = block_offsets(rows)
    ratio = of_blocks([draw.block_ratios for draw in draws])
    is_whole = of_blocks([draw.blocks for draw in draws]) < 0.5
    chance = torch.where(is_whole, 1.0, mask_chance(ratio))
    return (offsets >= starts) & (offsets < starts + gap_lens), chance


def mask_chance(ratio: torch.Tensor, *, is_complementary: bool = False) -> torch.Tensor:
    """Chance of a mask at noise level `ratio`: never 0, and never 1 if its complement matters."""
    span = 1 - (2 if is_complementary else 1) * MASK_RATIO_EPS
    return span * ratio + MASK_RATIO_EPS


def late_heavy(chance: torch.Tensor, offsets: torch.Tensor, *, half_life: float) -> torch.Tensor:
    """`chance ^ (2 ^ (-offset / half_life))`: later tokens of a block are masked more often.

    Args:
        chance: [B, S] float32 in (0, 1].
        offsets: [B, S] int64. Offset of each token in its block.
        half_life: In tokens.
    """
    return chance ** torch.exp2(-offsets.float() / half_life)


def block_offsets(rows: PackedRows) -> torch.Tensor:
    """[B, S] int64. Offset of each token in its block."""
    place = torch.arange(rows.clean_ids.shape[1], device=rows.clean_ids.device)
    starts = torch.where(rows.is_block_start, place, 0).cummax(dim=1).values
    return place - starts


def draft_pattern(rows: PackedRows, *, mask_token_id: int) -> Corruption:
    """Every block as decoding shows it: one clean token, then masks."""
    is_masked = ~rows.is_block_start & rows.is_maskable
    return Corruption(
        noisy_ids=torch.where(is_masked, mask_token_id, rows.clean_ids),
        is_masked=is_masked,
        is_maskable=is_masked,
        weight=torch.ones_like(rows.clean_ids, dtype=torch.float32),
    )


class Draw(NamedTuple):
    """One row's random numbers, uniform in [0, 1): one, and [S] for positions or blocks."""

    ratio: float
    positions: torch.Tensor
    blocks: torch.Tensor
    block_ratios: torch.Tensor
    gap_lens: torch.Tensor
    gap_starts: torch.Tensor


def _draw(seed: int, sample: int, row_len: int) -> Draw:
    state = np.random.SeedSequence((seed, _NOISE, sample)).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(state[0]) >> 1)
    ratio = float(torch.rand((), generator=generator))
    return Draw(ratio, *(torch.rand(row_len, generator=generator) for _ in range(5)))
