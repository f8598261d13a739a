"""A drafter adapter as the native step takes it: ranks padded, first halves side by side."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimode.model.adapter import TARGETS, DrafterAdapter, LoraPair

Ranks = np.ndarray[Any, np.dtype[np.int32]]

INPUTS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Targets by what they read, in the order of the inputs' numbers."""

_RANK_UNIT = 16


def padded_ranks(adapter: DrafterAdapter, *, num_layers: int) -> Ranks:
    """[layers, targets] int32: of each pair a multiple of `_RANK_UNIT`, 0 where there is none."""
    ranks = np.zeros((num_layers, len(TARGETS)), dtype=np.int32)
    for layer, target, pair in adapter.items():
        ranks[layer, TARGETS.index(target)] = -(-len(pair.down) // _RANK_UNIT) * _RANK_UNIT
    return ranks


def second_half(pair: LoraPair, rank: int) -> Tensor:
    """[out, rank] float32 on the CPU."""
    up = torch.zeros(pair.up.shape[0], rank, dtype=torch.float32, device="cpu")
    up[:, : pair.up.shape[1]] = pair.up.detach()
    return up


def first_halves(
    adapter: DrafterAdapter, ranks: Ranks
) -> Iterator[tuple[int, int, Tensor, np.ndarray[Any, np.dtype[np.float32]]]]:
    """For each layer and input that an update reads: layer, number of the input, the first halves
    of all its updates [sum of ranks, in], and the scales of their outputs; float32 on the CPU."""
    pairs = {(layer, target): pair for layer, target, pair in adapter.items()}
    for layer, sizes in enumerate(ranks.tolist()):
        for number, targets in enumerate(INPUTS):
            found = [
                (pairs[layer, t], sizes[TARGETS.index(t)]) for t in targets if (layer, t) in pairs
            ]
            if not found:
                continue
            width = found[0][0].down.shape[1]
            rows = sum(size for _, size in found)
            down = torch.zeros(rows, width, dtype=torch.float32, device="cpu")
            scales = np.zeros(len(down), dtype=np.float32)
            first = 0
            for pair, size in found:
                down[first : first + len(pair.down)] = pair.down.detach()
                scales[first : first + size] = pair.scale
                first += size
            yield layer, number, down, scales
