"""Masked attention on CUDA devices: torch's FlexAttention, which skips what no query may see.

Torch compiles the kernel where it first meets it. Uncompiled, as the tests on a CPU have it, the
forward works too, and there is no backward. Not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(row of the batch, head, query, key) -> whether the query may attend to the key; all integers."""


class FlexAttention:
    """`DenseAttention` that neither stores the mask nor computes what it throws away.

    Args:
        mask_mod: What may attend to what, whatever the head.
        batch_size: B.
        num_queries: T.
        num_keys: T'.
        dtype: Of the products.
        device: Compiled if it is a CUDA device.
    """

    def __init__(
        self,
        mask_mod: MaskMod,
        *,
        batch_size: int,
        num_queries: int,
        num_keys: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        make_mask, self._kernel = _functions(is_compiled=device.type == "cuda")
        self._dtype = dtype
        self._block_mask = make_mask(
            mask_mod, batch_size, None, num_queries, num_keys, device=str(device)
        )

    def __call__(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query: [B, T, N, D]; key, value: [B, T', G, D] -> [B, T, N, D]."""
        attended: Tensor = self._kernel(
            *(x.to(self._dtype).transpose(1, 2) for x in (query, key, value)),
            block_mask=self._block_mask,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return attended.transpose(1, 2)


def has_flex(device: torch.device) -> bool:
    """Whether FlexAttention can be compiled for a device: CUDA, Ampere or later, with Triton."""
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _functions(*, is_compiled: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`create_block_mask` and `flex_attention`."""
    if not is_compiled:
        return create_block_mask, flex_attention
    return torch.compile(create_block_mask), torch.compile(flex_attention)
