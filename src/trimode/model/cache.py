"""Preallocated K/V rows and cells. Knows nothing of lengths: who owns a row owns its length."""

from __future__ import annotations

import torch
from torch import Tensor

from trimode.errors import CapacityError
from trimode.model.configuration import TriModeConfig


class KVCache:
    """Storage for `num_rows` sequences of up to `num_cells` tokens each.

    Attributes:
        keys, values: [num_layers, num_rows, G, num_cells, D]. Zero until written: a NaN left in a
            masked cell would still poison attention (0 * NaN).
    """

    def __init__(
        self,
        config: TriModeConfig,
        *,
        num_rows: int,
        num_cells: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        shape = (
            config.num_hidden_layers,
            num_rows,
            config.num_key_value_heads,
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

    def scrub(self, row: int) -> None:
        """Zero a row, after a step that put something non-finite into it."""
        self.keys[:, row].zero_()
        self.values[:, row].zero_()
