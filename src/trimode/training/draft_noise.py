"""Random choices of drafter training: which slots sample, and the Gumbel noise they sample with.

Functions of a seed, a row's global sample index, the place in the row and the token id, so neither
the split of a batch nor a resumed run changes them. This is the idea of `trimode.decoding.noise`
with a cheaper generator: here the last bit need not be the same on all devices.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from trimode.training.packing import PackedRows

_SLOTS = 4  # a random stream of its own beside those of packing and corruption
_GOLDEN = 0x9E3779B9
_MIX_1, _MIX_2 = 0x7FEB352D, 0x846CA68B


def draw_slots(
    rows: PackedRows, samples: Sequence[int], *, seed: int, sampled_share: float
) -> tuple[Tensor, Tensor]:
    """Which blocks sample their draft, and the key of the noise of every place.

    Args:
        rows: B rows on the CPU.
        samples: Their B global sample indices.
        seed: Of the run.
        sampled_share: Chance of a block (a slot) to sample at temperature 1; else it is greedy.

    Returns:
        is_sampled: [B, S] bool, the same for all places of a block.
        noise_keys: [B, S] int32.
    """
    draws, keys = [], []
    for sample in samples:
        rng = np.random.default_rng((seed, _SLOTS, sample))
        draws.append(rng.random(rows.clean_ids.shape[1]))
        keys.append(rng.integers(-(2**31), 2**31, rows.clean_ids.shape[1], dtype=np.int32))
    is_sampled = torch.from_numpy(np.stack(draws)).gather(1, rows.block_ids) < sampled_share
    return is_sampled, torch.from_numpy(np.stack(keys))


def gumbel_noise(keys: Tensor, num_tokens: int) -> Tensor:
    """Standard Gumbel noise, -ln(-ln u), with u uniform on the 2^23 odd multiples of 2^-24.

    Args:
        keys: [M] int32, one per place.
        num_tokens: V.

    Returns:
        [M, V] float32, within (-2.9, 16.7).
    """
    counters = torch.arange(1, num_tokens + 1, device=keys.device, dtype=torch.int32)
    words = _mix(_mix(counters * _signed(_GOLDEN)) ^ keys[:, None])
    uniform = (_shift_right(words, 9).float() + 0.5).mul_(2.0**-23)
    return uniform.log_().neg_().log_().neg_()


def _mix(words: Tensor) -> Tensor:
    """A bijection of 32-bit words that looks random (Wellons 2018, `lowbias32`)."""
    words = (words ^ _shift_right(words, 16)) * _MIX_1
    words = (words ^ _shift_right(words, 15)) * _signed(_MIX_2)
    return words ^ _shift_right(words, 16)


def _shift_right(words: Tensor, bits: int) -> Tensor:
    """Logical right shift of int32 words."""
    return (words >> bits) & ((1 << (32 - bits)) - 1)


def _signed(word: int) -> int:
    """The int32 that has the bits of an unsigned 32-bit word."""
    return word - 2**32 if word >= 2**31 else word
