"""Products with weights that will not change any more: fused, in a quicker order, or in int8.

A product knows how to multiply and how to give its weight back, nothing of the network. The
original weight is not kept beside it, unless it is small.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from trimode.errors import ConfigError

Weights = Literal["plain", "packed", "int8"]
"""How the weights of a model lie in memory; see `TriModeModel.pack`."""

WEIGHTS: tuple[Weights, ...] = ("plain", "packed", "int8")

SMALL_WEIGHT = 2**19
"""Elements below which a weight is left to `SmallProduct`."""

MOST_FEW = 4
"""Tokens up to which `SmallProduct` takes the plain weight."""

_EXPECTED_ROWS = 8
"""What oneDNN is told to pack for; any number above 1 gives the same order here."""

_SHIFT = 128
"""Zero of an activation in uint8: oneDNN has no quick product of two int8 here."""


def as_weights(name: str) -> Weights:
    """A form of the weights by its name."""
    for known in WEIGHTS:
        if name == known:
            return known
    raise ConfigError(f"weights is {name!r}; allowed: {', '.join(WEIGHTS)}")


class Product(Protocol):
    """`y = x W^T + b`.

    Attributes:
        bias: [out] or None.
        least_rows: Tokens from which it is quick; fewer are better fed several times over.
    """

    bias: Tensor | None
    least_rows: int

    def __call__(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out]."""
        ...

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """x: [..., in]; residual: [..., out] -> `y + residual`."""
        ...

    def dense(self) -> Tensor:
        """[out, in]: the weight as it was given."""
        ...


class _Fixed:
    """What products share: a bias, and that a copy of what never changes is the thing itself."""

    least_rows = 1

    def __init__(self, bias: Tensor | None) -> None:
        self.bias = bias

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def dense(self) -> Tensor:
        raise NotImplementedError

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.dense(), self.bias)  # a packed tensor cannot be pickled


class DenseProduct(_Fixed):
    """torch's own product, for any device and dtype. Its weight may be several fused into one."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(bias)
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        return self(x) + residual

    def dense(self) -> Tensor:
        return self.weight


class SmallProduct(DenseProduct):
    """A weight that stays in the cache, in float32 on the CPU: MKL's `W x^T` for a few tokens,
    whose calls cost less than oneDNN's, and a packed copy of it for more, which then is quicker.
    """

    least_rows = 2  # one column is another product, three times as slow

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        has_onednn = torch.backends.mkldnn.is_available()
        self._packed = PackedProduct(weight, bias) if has_onednn else None

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed is not None and x.shape[:-1].numel() > MOST_FEW:
            return self._packed(x)
        if x.ndim != 2 or self.bias is not None:
            return super().__call__(x)
        return torch.mm(self.weight, x.t()).t().contiguous()

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        if self._packed is not None and x.shape[:-1].numel() > MOST_FEW:
            return self._packed.plus(x, residual)
        if x.ndim != 2 or self.bias is not None:
            return super().plus(x, residual)
        return torch.addmm(residual.t(), self.weight, x.t()).t().contiguous()


class PackedProduct(_Fixed):
    """oneDNN's product in float32 on the CPU, with the weight in the order in which it is read.

    MKL's product reads a weight for a few tokens at a third of the memory's speed; this one reads
    it at nearly the full speed for up to eight.
    """

    least_rows = 4  # one alone takes 1.1 to 1.6 times as long as four (AMD EPYC, AVX-512)

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(bias)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, _EXPECTED_ROWS)
        self._run = torch.ops.mkldnn._linear_pointwise.default
        self._run_binary = torch.ops.mkldnn._linear_pointwise.binary

    def __call__(self, x: Tensor) -> Tensor:
        output: Tensor = self._run(x, self._packed, self.bias, "none", [], "")
        return output

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        output: Tensor = self._run_binary(x, residual, self._packed, self.bias, "add")
        return output

    def dense(self) -> Tensor:
        return self._packed.to_dense()


class Int8Product(_Fixed):
    """Weights in int8 with one scale per output, tokens in 8 bits with one scale per token.

    Sums are of integers, so that a token's result depends on no other token of the forward.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(bias)
        largest = weight.abs().amax(dim=1).clamp(min=torch.finfo(weight.dtype).tiny)
        scale = largest / _largest_weight()
        rounded = (weight / scale[:, None]).round().to(torch.int8)
        self._packed = torch.ops.onednn.qlinear_prepack(rounded, None)
        self._scale = scale.float()
        self._zero = torch.zeros(len(scale), dtype=torch.int32)
        self._run = torch.ops.onednn.qlinear_pointwise.default

    def _unscaled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[..., out] without the tokens' scales, and these: [..., 1]."""
        largest = torch.linalg.vector_norm(x, float("inf"), dim=-1, keepdim=True)
        scale = largest.clamp_(min=torch.finfo(x.dtype).tiny).mul_(1 / 127)
        rounded = (x / scale).round_().add_(_SHIFT).to(torch.uint8)
        output = self._run(
            *(rounded, 1.0, _SHIFT, self._packed, self._scale, self._zero),
            *(None, 1.0, 0, torch.float32, "none", [], ""),
        )
        return output, scale

    def __call__(self, x: Tensor) -> Tensor:
        output, scale = self._unscaled(x)
        output.mul_(scale)
        return output if self.bias is None else output.add_(self.bias)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        output, scale = self._unscaled(x)
        output = torch.addcmul(residual, output, scale)
        return output if self.bias is None else output.add_(self.bias)

    def dense(self) -> Tensor:
        raise ConfigError(
            "the weights are int8 and the original ones are gone; load with weights='packed' or"
            " 'plain' to save, convert or move the model"
        )


@cache
def _largest_weight() -> int:
    """In int8: 127, or 63 on a processor that adds two products in 16 bits, cut off at 32767.

    Asked of the product itself: processors without VNNI do so, and oneDNN can be told to.
    """
    size = 64
    ones, zeros = torch.ones(size), torch.zeros(size, dtype=torch.int32)
    weight = torch.full((size, size), 127, dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    output = torch.ops.onednn.qlinear_pointwise.default(
        *(torch.full((1, size), 255, dtype=torch.uint8), 1.0, 0, packed, ones, zeros),
        *(None, 1.0, 0, torch.float32, "none", [], ""),
    )
    return 127 if output[0, 0].item() == size * 255 * 127 else 63


def product(weight: Tensor, bias: Tensor | None, *, weights: Weights) -> Product:
    """The product for where and what a weight is.

    Args:
        weight: [out, in].
        bias: [out] or None.
        weights: `packed` or `int8`.

    Raises:
        ConfigError: int8 for what is not float32 on a CPU, or without oneDNN.
    """
    is_quick = weight.is_cpu and weight.dtype is torch.float32
    has_onednn = torch.backends.mkldnn.is_available()
    if weights == "packed":
        if not is_quick:
            return DenseProduct(weight, bias)
        is_small = weight.numel() < SMALL_WEIGHT or not has_onednn
        return (SmallProduct if is_small else PackedProduct)(weight, bias)
    if not (is_quick and has_onednn):
        raise ConfigError(
            f"weights is 'int8' for {weight.dtype} on {weight.device}"
            f"{'' if has_onednn else ' without oneDNN'}; allowed: float32 on a CPU with oneDNN"
        )
    return Int8Product(weight, bias)
