"""K/V rows and cells: their size, what a write touches, what a scrub clears."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from trimode.errors import CapacityError
from trimode.model import KVCache, TriModeConfig

Config = Callable[..., TriModeConfig]


def make(config: TriModeConfig, **sizes: Any) -> KVCache:
    return KVCache(config, device="cpu", dtype=torch.float64, **sizes)


def test_cells_start_as_zeros(tiny_config: Config) -> None:
    """Uninitialised memory: a NaN in a masked cell still poisons attention (0 * NaN)."""
    cache = make(tiny_config(), num_rows=3, num_cells=5)
    for stored in (cache.keys, cache.values):
        assert stored.shape == (2, 3, 2, 5, 32)  # layers, rows, KV heads, cells, head dim
        assert not stored.any()


def test_write_touches_only_its_cells(tiny_config: Config) -> None:
    """Tokens written to a neighbour's row, to another layer, or with rows and cells swapped."""
    cache = make(tiny_config(), num_rows=3, num_cells=5)
    key, value = torch.randn(2, 3, 2, 32, dtype=torch.float64)
    rows, cells = torch.tensor([0, 2, 2]), torch.tensor([4, 0, 1])
    cache.write(1, rows, cells, key, value)
    expected = torch.zeros(3, 2, 5, 32, dtype=torch.float64)
    for token in range(3):
        expected[rows[token], :, cells[token]] = key[token]
    assert cache.keys[1].equal(expected)
    assert not cache.keys[0].any()
    assert cache.values[1][2, :, 0].equal(value[1])


def test_scrub_clears_one_row(tiny_config: Config) -> None:
    """An aborted sequence's NaNs reaching the next owner of its row; a neighbour losing its K/V."""
    cache = make(tiny_config(), num_rows=2, num_cells=3)
    cache.keys.fill_(torch.nan)
    cache.values.fill_(1.0)
    cache.scrub(0)
    assert not cache.keys[:, 0].any()
    assert not cache.values[:, 0].any()
    assert cache.keys[:, 1].isnan().all()
    assert cache.values[:, 1].all()


def test_too_large_is_a_capacity_error(tiny_config: Config) -> None:
    """An out-of-memory traceback instead of one line with the size asked for."""
    with pytest.raises(CapacityError, match=r"GiB on cpu.*lower the batch size"):
        make(tiny_config(), num_rows=2**20, num_cells=2**30)
