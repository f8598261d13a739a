"""A sum over many rows, made a chunk at a time, whose gradient is made at once.

What a chunk needs (logits over a vocabulary) exists while that chunk is worked on and is made once:
its gradient is taken in the forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

ChunkSum = Callable[[Tensor, slice], Tensor]


def chunked_sum(
    of_chunk: ChunkSum, states: Tensor, *, parameters: Sequence[Tensor], chunks: Sequence[slice]
) -> Tensor:
    """Sum of `of_chunk(states[chunk], chunk)` over the chunks.

    Backward may be called once.

    Args:
        of_chunk: Gives a scalar, in ordinary torch.
        states: [M, H].
        parameters: What else `of_chunk` reads and gradients are wanted for.
        chunks: Slices that cover 0 .. M.

    Returns:
        Scalar, float32 or wider.
    """
    is_learning = torch.is_grad_enabled()
    wanted = [is_learning and x.requires_grad for x in (states, *parameters)]
    total: Tensor = _ChunkedSum.apply(of_chunk, chunks, wanted, states, *parameters)
    return total


class _ChunkedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        of_chunk: ChunkSum,
        chunks: Sequence[slice],
        wanted: list[bool],
        states: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        wide = torch.promote_types(states.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=states.device)
        grads = [
            torch.zeros_like(x) if is_wanted else None
            for x, is_wanted in zip((states, *parameters), wanted, strict=True)
        ]
        for chunk in chunks:
            if not any(wanted):
                total += of_chunk(states[chunk], chunk)
                continue
            with torch.enable_grad():
                some = states[chunk].detach().requires_grad_(wanted[0])
                value = of_chunk(some, chunk)
                inputs = [
                    x for x, is_wanted in zip((some, *parameters), wanted, strict=True) if is_wanted
                ]
                found = list(torch.autograd.grad(value, inputs))
            total += value.detach()
            for place, (is_wanted, grad) in enumerate(zip(wanted, grads, strict=True)):
                if is_wanted and grad is not None:
                    part, *found = found
                    (grad[chunk] if place == 0 else grad).add_(part)
        ctx.grads = grads
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("chunked_sum: backward was already called")
        grads, ctx.grads = ctx.grads, None
        scaled = [None if grad is None else grad.mul_(upstream) for grad in grads]
        return (None, None, None, *scaled)
