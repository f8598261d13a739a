"""The drafter adapter: LoRA weights beside the network, switched on per token by an argument.

The weights are never merged and never stored in the model, so a forward without them cannot be
coloured by them. Files are `trimode.checkpoint`'s business.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear layers an adapter may sit on; the published drafter uses `o_proj` only (facts 2.5)."""


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
        return nn.functional.linear(nn.functional.linear(x, self.down), self.up) * self.scale


class DrafterAdapter(nn.Module):
    """All pairs of one adapter, found by layer index and target name."""

    def __init__(self, pairs: dict[tuple[int, str], LoraPair]) -> None:
        super().__init__()
        self.pairs = nn.ModuleDict({f"{layer}_{target}": p for (layer, target), p in pairs.items()})

    def find(self, layer_index: int, target: str) -> LoraPair | None:
        """The pair on `target` of layer `layer_index`, or None."""
        name = f"{layer_index}_{target}"
        return self.pairs[name] if name in self.pairs else None  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class AdapterSwitch:
    """An adapter and the tokens it is on for, in one forward.

    Attributes:
        adapter: The weights.
        is_on: [..., 1] in the model's dtype, one where the adapter is on; None for all tokens.
    """

    adapter: DrafterAdapter
    is_on: Tensor | None

    def add(self, layer_index: int, target: str, x: Tensor, output: Tensor) -> Tensor:
        """`output` of a linear layer plus the adapter's share of it, where on."""
        pair = self.adapter.find(layer_index, target)
        if pair is None:
            return output
        update = pair(x)
        return output + (update if self.is_on is None else update * self.is_on)
