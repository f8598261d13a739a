"""Head and cross-entropy in one, a few rows at a time: all the logits never exist at once.

The gradient is made in the forward, while a chunk's logits are at hand. On a CPU this spares the
page faults of large temporaries (a sixth of a stage 1 step), on a GPU the memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_CPU_CHUNK_ELEMENTS, _CHUNK_ELEMENTS = 1 << 22, 1 << 26
_MIN_CHUNK_ROWS = 256


def chunk_rows(vocab_size: int, device: torch.device) -> int:
    """Rows of logits that exist at a time.

    Few enough to stay near a CPU's cache, or to be a small part of a GPU's memory; but never so few
    that the products lose their speed, however large the vocabulary.
    """
    elements = _CPU_CHUNK_ELEMENTS if device.type == "cpu" else _CHUNK_ELEMENTS
    return max(_MIN_CHUNK_ROWS, elements // vocab_size)


def head_loss_sum(head: nn.Linear, states: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Sum of weighted cross-entropies of `head(states)`.

    The matrix products run in the autocast dtype where autocast is on; the softmax in float32 (or
    wider, if the weights are). The graph may be gone back through once.

    Args:
        head: Without a bias.
        states: [M, H]. Hidden states.
        targets: [M] int64.
        weights: [M] float32. Of each loss.

    Returns:
        Scalar, float32 or wider.
    """
    assert head.bias is None
    device = states.device.type
    dtype = head.weight.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    # Within `forward` autograd is off, and what it knows of gradients there ignores `no_grad`.
    is_learning = torch.is_grad_enabled()
    wants = (is_learning and states.requires_grad, is_learning and head.weight.requires_grad)
    total: Tensor = _HeadLoss.apply(states, head.weight, targets, weights, dtype, wants)
    return total


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor,
        dtype: torch.dtype,
        wants: tuple[bool, bool],
    ) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        table, total = weight.to(dtype), torch.zeros((), dtype=wide, device=states.device)
        states_grad = torch.empty_like(states) if wants[0] else None
        weight_grad = torch.zeros_like(weight) if wants[1] else None
        chunk_len = min(chunk_rows(weight.shape[0], weight.device), len(states))
        products = table.new_empty(chunk_len, weight.shape[0])
        for start in range(0, len(states), max(chunk_len, 1)):
            rows = slice(start, start + chunk_len)
            chunk, target, scale = states[rows].to(dtype), targets[rows, None], weights[rows, None]
            product = torch.mm(chunk, table.mT, out=products[: len(chunk)])
            logits = product.to(wide)
            largest, right = logits.amax(1, keepdim=True), logits.gather(1, target)
            sums = logits.sub_(largest).exp_().sum(1, keepdim=True)
            total += ((sums.log() + largest - right) * scale).sum()
            if not any(wants):
                continue
            logits.mul_(scale / sums).scatter_add_(1, target, -scale.to(wide))
            grad = product.copy_(logits)  # the same tensor where `dtype` is wide
            if states_grad is not None:
                states_grad[rows] = torch.mm(grad, table)
            if weight_grad is None:
                continue
            if dtype == weight_grad.dtype:
                weight_grad.addmm_(grad.mT, chunk)  # in place: no second table of the head's size
            else:
                weight_grad += torch.mm(grad.mT, chunk)
        ctx.grads = states_grad, weight_grad
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # Scaled in place and let go of: at this moment of a step the memory is fullest.
        if ctx.grads is None:
            raise RuntimeError("head_loss_sum: the graph was already gone back through")
        grads, ctx.grads = ctx.grads, None
        scaled = [None if grad is None else grad.mul_(upstream) for grad in grads]
        return (*scaled, None, None, None, None)
