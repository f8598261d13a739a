"""Preallocated K/V rows and cells. Knows nothing of lengths: who owns a row owns its length."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trimode.errors import CapacityError
from trimode.model.configuration import TriModeConfig


class KVCache:
    """Storage for `num_rows` sequences of up to `num_cells` tokens each.

    Args:
        config: Of the network.
        num_rows, num_cells: How large.
        device, dtype: Of keys and values.
        num_ranks: That share out the heads of the network; each holds its own heads' K/V.

    Attributes:
        keys, values: [num_layers, num_rows, G, num_cells, D]. Zero until written: a NaN left in a
            masked cell would still poison attention (0 * NaN).
        on_change: Called before whole rows change (`scrub`, `copy_prefix`), with the method's name
            and its arguments, so that other ranks do the same; None if there are none.
    """

    def __init__(
        self,
        config: TriModeConfig,
        *,
        num_rows: int,
        num_cells: int,
        device: torch.device | str,
        dtype: torch.dtype,
        num_ranks: int = 1,
    ) -> None:
        shape = (
            config.num_hidden_layers,
            num_rows,
            config.num_key_value_heads // num_ranks,
            num_cells,
            config.head_dim,
        )
        try:
            self.keys = torch.zeros(shape, device=device, dtype=dtype)
            self.values = torch.zeros(shape, device=device, dtype=dtype)
        except RuntimeError as error:  # out of memory is a RuntimeError on CPU and on CUDA
            num_bytes = 2 * torch.Size(shape).numel() * dtype.itemsize
            raise CapacityError(
                f"{num_rows} rows of {num_cells} cells need {num_bytes / 2**30:.1f} GiB on "
                f"{device},"
                " which are not free; lower the batch size or the lengths"
            ) from error
        self.num_rows = num_rows
        self.num_cells = num_cells
        self.on_change: Callable[[str, tuple[int, ...]], None] | None = None

    def write(
        self, layer_index: int, rows: Tensor, cells: Tensor, key: Tensor, value: Tensor
    ) -> None:
        """Put the K/V of P tokens into their cells.

        Args:
            layer_index: Which layer.
            rows: [P] int64. Row of each token.
            cells: [P] int64. Cell of each token.
            key: [P, G, D]. Keys after RoPE.
            value: [P, G, D].
        """
        self.keys[layer_index][rows, :, cells] = key
        self.values[layer_index][rows, :, cells] = value

    def copy_prefix(self, source: int, target: int, num_cells: int) -> None:
        """Put the K/V of the first `num_cells` tokens of one row into another, whose sequence
        begins with the same tokens."""
        if self.on_change is not None:
            self.on_change("copy_prefix", (source, target, num_cells))
        self.keys[:, target, :, :num_cells] = self.keys[:, source, :, :num_cells]
        self.values[:, target, :, :num_cells] = self.values[:, source, :, :num_cells]

    def scrub(self, row: int) -> None:
        """Zero a row, after a step that put something non-finite into it."""
        if self.on_change is not None:
            self.on_change("scrub", (row,))
        self.keys[:, row].zero_()
        self.values[:, row].zero_()
