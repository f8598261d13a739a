"""The layers of the network in the form for decoding: fused products, few and small operations.

The same mathematics as `trimode.model.modeling`, which is its slow twin; no gradients. What is
packed cannot be trained, merged into or wrapped, so the plain layers are gone while this is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimode.errors import ConfigError
from trimode.model.adapter import AdapterSwitch
from trimode.model.attention import Attend
from trimode.model.configuration import TriModeConfig
from trimode.model.linear import Linear
from trimode.model.products import Product, Weights, product

if TYPE_CHECKING:
    from trimode.model.modeling import Layer, RotaryAngles


_FIXED = "the weights are packed for decoding and cannot change; call model.pack('plain') first"


def quick_norm(x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    """RMSNorm over the last dimension; for a few tokens on the CPU torch's own takes twice as long.

    Args:
        x: [..., size].
        weight: [size], or of a shape that x can be multiplied with.
        eps: [1]. Added to the mean square.
    """
    if not (x.is_cpu and x.dtype in (torch.float32, torch.float64)):
        if weight.ndim == 1:
            return F.rms_norm(x, weight.shape, weight, eps.item())
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # rounded once, as above
        return (F.rms_norm(wide, x.shape[-1:], None, eps.item()) * weight).to(x.dtype)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = torch.addcmul(eps, length, length, value=1 / x.shape[-1]).rsqrt_()
    return (x * scale).mul_(weight)


class Fused:
    """Linear layers that read the same input, as one product.

    Attributes:
        product: From their input to their outputs, one after the other.
        sizes: Of each output.
    """

    __slots__ = ("_names", "product", "sizes")

    def __init__(self, parent: nn.Module, names: Sequence[str], *, weights: Weights) -> None:
        linears: list[nn.Linear] = [getattr(parent, name) for name in names]
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
        self._names = names
        self.sizes = [linear.out_features for linear in linears]
        self.product: Product = product(
            torch.cat([linear.weight.detach() for linear in linears]),
            torch.cat(biases) if biases else None,
            weights=weights,
        )

    def add(self, adapter: AdapterSwitch, layer_index: int, x: Tensor, output: Tensor) -> Tensor:
        """`output` of the product plus the adapter's share of it, where on."""
        if not any(adapter.adapter.find(layer_index, name) for name in self._names):
            return output
        parts = output.split(self.sizes, dim=-1)
        added = [
            adapter.add(layer_index, name, x, part)
            for name, part in zip(self._names, parts, strict=True)
        ]
        return added[0] if len(added) == 1 else torch.cat(added, dim=-1)

    def tensors(self) -> dict[str, Tensor]:
        """Weights and biases of the linear layers, by their names."""
        whole = {"weight": self.product.dense()}
        if self.product.bias is not None:
            whole["bias"] = self.product.bias
        return {
            f"{name}.{kind}": part
            for kind, tensor in whole.items()
            for name, part in zip(self._names, tensor.split(self.sizes), strict=True)
        }


class _Packed(nn.Module):
    """A part without modules or parameters inside, saved as the plain one it was made from."""

    def tensors(self) -> dict[str, Tensor]:
        """The state of the plain part, bit for bit.

        Raises:
            ConfigError: the weights are int8.
        """
        raise NotImplementedError

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        for name, tensor in self.tensors().items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        raise ConfigError(_FIXED)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        raise ConfigError(_FIXED)


class PackedLayer(_Packed):
    """A transformer layer without modules or parameters inside.

    Args:
        layer: The plain one, which can be thrown away afterwards.
        weights: `packed` or `int8`.
    """

    def __init__(self, layer: Layer, *, weights: Weights) -> None:
        super().__init__()
        attn, mlp = layer.self_attn, layer.mlp
        self._layer_index = attn.layer_index
        self._head_dim = attn.head_dim
        dtype = torch.promote_types(attn.q_proj.weight.dtype, torch.float32)
        self.eps = torch.tensor([layer.input_layernorm.eps], dtype=dtype)
        self._norms = {
            name: norm.weight.detach().clone()
            for name, norm in layer.named_modules()
            if name.endswith("norm")
        }
        self._before_attn = self._norms["input_layernorm"]
        self._before_mlp = self._norms["post_attention_layernorm"]
        self._qkv = Fused(attn, ("q_proj", "k_proj", "v_proj"), weights=weights)
        self._out = Fused(attn, ("o_proj",), weights=weights)
        self._gate_up = Fused(mlp, ("gate_proj", "up_proj"), weights=weights)
        self._down = Fused(mlp, ("down_proj",), weights=weights)
        parts = (self._qkv, self._out, self._gate_up, self._down)
        self._least_rows = max(part.product.least_rows for part in parts)
        query, key, value = (size // attn.head_dim for size in self._qkv.sizes)
        self._num_heads = query + key + value
        self._rotated_and_not, self._queries_and_keys = (query + key, value), (query, key)
        self._qk_norm = None
        if attn.use_qk_norm:
            norms = self._norms["self_attn.q_norm"], self._norms["self_attn.k_norm"]
            self._qk_norm = torch.cat([norms[0].expand(query, -1), norms[1].expand(key, -1)])

    def forward(
        self,
        x: Tensor,
        angles: RotaryAngles,
        *,
        attend: Attend,
        adapter: AdapterSwitch | None,
        copies: int,
    ) -> Tensor:
        """x: [..., H]; [copies * P, H] where `copies` is not 1, of which attention sees P."""
        index = self._layer_index
        normed = quick_norm(x, self._before_attn, self.eps)
        qkv = self._qkv.product(normed)
        if adapter is not None:
            qkv = self._qkv.add(adapter, index, normed, qkv)
        if copies > 1:
            qkv = qkv[: len(qkv) // copies]
        heads = qkv.view(*qkv.shape[:-1], self._num_heads, self._head_dim)
        rotated, value = heads.split_with_sizes(self._rotated_and_not, dim=-2)
        if self._qk_norm is not None:
            rotated = quick_norm(rotated, self._qk_norm, self.eps)
        query, key = angles.rotate(rotated).split_with_sizes(self._queries_and_keys, dim=-2)
        if angles.query_scale is not None:
            query = query * angles.query_scale
        attended = attend(index, query, key, value).flatten(-2)
        if copies > 1:
            attended = torch.cat((attended,) * copies)
        x = self._out.product.plus(attended, x)
        if adapter is not None:
            x = self._out.add(adapter, index, attended, x)
        normed = quick_norm(x, self._before_mlp, self.eps)
        gate_up = self._gate_up.product(normed)
        if adapter is not None:
            gate_up = self._gate_up.add(adapter, index, normed, gate_up)
        gate, up = gate_up.split_with_sizes(self._gate_up.sizes, dim=-1)
        inner = F.silu(gate).mul_(up)
        x = self._down.product.plus(inner, x)
        if adapter is not None:
            x = self._down.add(adapter, index, inner, x)
        return x

    def num_copies(self, x: Tensor) -> int:
        """Times that the tokens [P, H] are best fed to all layers."""
        return _num_copies(x, self._least_rows)

    def plain(self, config: TriModeConfig) -> Layer:
        """The layer it was made from, once more."""
        from trimode.model.modeling import Layer

        with torch.device("meta"):
            layer = Layer(config, self._layer_index)
        layer.load_state_dict({k: v.clone() for k, v in self.tensors().items()}, assign=True)
        return layer.eval()

    def tensors(self) -> dict[str, Tensor]:
        found = {f"{name}.weight": norm for name, norm in self._norms.items()}
        for fused, parent in (
            (self._qkv, "self_attn"),
            (self._out, "self_attn"),
            (self._gate_up, "mlp"),
            (self._down, "mlp"),
        ):
            found |= {f"{parent}.{name}": tensor for name, tensor in fused.tensors().items()}
        return found


def _num_copies(x: Tensor, least_rows: int) -> int:
    """Times that packed tokens [P, H] are best fed; 1 for anything else."""
    return -(-least_rows // len(x)) if x.ndim == 2 and 0 < len(x) < least_rows else 1


class PackedHead(_Packed):
    """The head; `model` has it as `diffusion_head`."""

    def __init__(self, model: nn.Module, *, weights: Weights) -> None:
        super().__init__()
        self._fused = Fused(model, ("diffusion_head",), weights=weights)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """x: [..., H] -> [..., V]."""
        copies = _num_copies(x, self._fused.product.least_rows)
        if copies > 1:
            return self._fused.product(torch.cat((x,) * copies))[: len(x)]
        return self._fused.product(x)

    def plain(self, config: TriModeConfig) -> Linear:
        """The head it was made from, once more."""
        with torch.device("meta"):
            head = Linear(config.hidden_size, config.vocab_size, bias=False)
        head.load_state_dict({k: v.clone() for k, v in self.tensors().items()}, assign=True)
        return head.eval()

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self._fused.product.dense()}
