"""Adapters: LoRA weights beside the network, switched on per token by an argument, or merged.

A drafter's are never merged and never stored in the model, so a forward without them cannot be
coloured by them. A LoRA of the whole model is merged before the model is used. Files are
`trimode.checkpoint`'s business.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from trimode.errors import ConfigError
from trimode.model.linear import times_share

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear layers an adapter may sit on; the published drafter uses `o_proj` only (facts 2.5)."""

MLP_TARGETS = ("gate_proj", "up_proj", "down_proj")
"""Those of `TARGETS` that are in the MLP; the others are in the attention."""


class LoraPair(nn.Module):
    """One low-rank update `scale * B A x` (Hu et al. 2021, arXiv 2106.09685).

    Args:
        down: [r, in]. A in the paper.
        up: [out, r]. B in the paper.
        scale: alpha / r.
    """

    def __init__(self, down: Tensor, up: Tensor, scale: float) -> None:
        super().__init__()
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(up)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out]."""
        return _times(_times(x, self.down), self.up) * self.scale


def _times(x: Tensor, weight: Tensor) -> Tensor:
    if isinstance(weight, DTensor):
        return times_share(x, weight)
    return nn.functional.linear(x, weight)


class DrafterAdapter(nn.Module):
    """All pairs of one adapter, found by layer index and target name."""

    def __init__(self, pairs: dict[tuple[int, str], LoraPair]) -> None:
        super().__init__()
        self.pairs = nn.ModuleDict({f"{layer}_{target}": p for (layer, target), p in pairs.items()})

    def items(self) -> Iterator[tuple[int, str, LoraPair]]:
        """Layer index, target name and pair, one after the other."""
        for name, pair in self.pairs.items():
            layer_index, _, target = name.partition("_")
            yield int(layer_index), target, pair  # type: ignore[misc]

    def find(self, layer_index: int, target: str) -> LoraPair | None:
        """The pair on `target` of layer `layer_index`, or None."""
        name = f"{layer_index}_{target}"
        return self.pairs[name] if name in self.pairs else None  # type: ignore[return-value]


def linear_of(layer: nn.Module, target: str) -> nn.Linear:
    """The linear layer of a transformer layer that a target name means.

    Raises:
        ConfigError: the layer is packed.
    """
    parent = getattr(layer, "mlp" if target in MLP_TARGETS else "self_attn", None)
    if parent is None:
        raise ConfigError(
            "the weights are packed for decoding and have no linear layers to put an adapter on;"
            " call model.pack('plain') first"
        )
    linear: nn.Linear = getattr(parent, target)
    return linear


def new_adapter(
    layers: nn.ModuleList, *, rank: int, alpha: float, targets: Sequence[str], seed: int
) -> DrafterAdapter:
    """An adapter that changes nothing yet: A uniform within 1 / sqrt(in), B zero, in float32.

    Args:
        layers: The transformer layers of the network it is for.
        rank: r.
        alpha: The scale is alpha / r.
        targets: From `TARGETS`; every layer gets a pair on each.
        seed: Of A.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for index, layer in enumerate(layers):
        for target in targets:
            linear = linear_of(layer, target)
            down = torch.rand(rank, linear.in_features, generator=generator) * 2 - 1
            up = torch.zeros(linear.out_features, rank)
            pairs[index, target] = LoraPair(down * linear.in_features**-0.5, up, alpha / rank)
    return DrafterAdapter(pairs)


@torch.no_grad()
def merge(adapter: DrafterAdapter, layers: nn.ModuleList) -> None:
    """Add an adapter into the weights of `layers`, for every view: `W += scale B A`, in float32.

    Not for a drafter, which must not colour the AR view.
    """
    for layer_index, target, pair in adapter.items():
        weight = linear_of(layers[layer_index], target).weight
        work = torch.promote_types(weight.dtype, torch.float32)
        update = pair.up.to(work) @ pair.down.to(work) * pair.scale
        if isinstance(weight, DTensor):  # every rank has the whole update and needs its part
            mesh, placements = weight.device_mesh, weight.placements
            update = distribute_tensor(update, mesh, placements, src_data_rank=None)
        weight.copy_(weight.to(work) + update)


@dataclass(frozen=True, slots=True)
class AdapterSwitch:
    """An adapter and the tokens it is on for, in one forward.

    Attributes:
        adapter: The weights.
        is_on: [..., 1] bool, True where the adapter is on; None for all tokens.
    """

    adapter: DrafterAdapter
    is_on: Tensor | None

    def add(self, layer_index: int, target: str, x: Tensor, output: Tensor) -> Tensor:
        """`output` of a linear layer plus the adapter's share of it, where on."""
        pair = self.adapter.find(layer_index, target)
        if pair is None:
            return output
        update = pair(x)
        if self.is_on is not None:  # a choice, not a product: what is off may hold a NaN
            update = torch.where(self.is_on, update, 0)
        return output + update
