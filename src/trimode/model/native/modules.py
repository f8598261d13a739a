"""What stands in a model for the parts whose weights are packed: it saves them, and runs no layer.

What is packed cannot be trained, merged into, moved or wrapped; `model.pack("plain")` makes the
plain parts again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from trimode.errors import ConfigError
from trimode.model.adapter import MLP_TARGETS, TARGETS, AdapterSwitch
from trimode.model.attention import RowAttention, RowFeed
from trimode.model.configuration import TriModeConfig
from trimode.model.linear import Linear
from trimode.model.masks import TRUNK
from trimode.model.native import library
from trimode.model.native.step import FORMS, HEAD, NORMS, NativeNetwork
from trimode.model.weights import Weights

if TYPE_CHECKING:
    from trimode.model.modeling import Layer, TriModeModel

FIXED = "the weights are packed for decoding and cannot change; call model.pack('plain') first"


def refusal(model: TriModeModel) -> str | None:
    """Why the native step cannot run this model, for a reader; None if it can."""
    return refusal_of(model.config, device=model.device, dtype=model.dtype)


def refusal_of(config: TriModeConfig, *, device: torch.device, dtype: torch.dtype) -> str | None:
    """As `refusal`, before there is a model."""
    if device.type != "cpu":
        return f"the native step runs on the CPU, and the model is on {device}"
    if dtype not in FORMS:
        return f"the native step runs float32 and bfloat16, and the model is {dtype}"
    status = library.status()
    if status.library is None:
        return f"there is no native step: {status.why}"
    if not status.library.c.trimode_has_head_dim(status.library.kernels, config.head_dim):
        return f"the native step has no heads of {config.head_dim}"
    sizes = (config.hidden_size, config.intermediate_size)
    if any(size % 2 for size in sizes):
        return f"the native step takes even sizes, and the model's are {sizes}"
    return None


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
        raise ConfigError(FIXED)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        raise ConfigError(FIXED)


class PackedLayer(_Packed):
    """A transformer layer.

    Args:
        layer: The plain one, which can be thrown away afterwards.
        network: Gets its weights.
    """

    def __init__(self, layer: Layer, network: NativeNetwork) -> None:
        super().__init__()
        self.layer_index = layer.self_attn.layer_index
        self._network = network
        self._small = {  # norms and biases
            name: parameter.detach().clone()
            for name, parameter in layer.named_parameters()
            if parameter.ndim == 1
        }
        for name in NORMS:
            if f"{name}.weight" in self._small:
                network.set_norm(self.layer_index, name, self._small[f"{name}.weight"])
        for name, module in layer.named_modules():
            target = name.rpartition(".")[-1]
            if target in TARGETS:
                assert isinstance(module, nn.Linear)
                network.set(self.layer_index, target, module.weight, module.bias)

    def tensors(self) -> dict[str, Tensor]:
        found = dict(self._small)
        for target in TARGETS:
            parent = "mlp" if target in MLP_TARGETS else "self_attn"
            found[f"{parent}.{target}.weight"] = self._network.get(self.layer_index, target)
        return found


class PackedEmbedding(_Packed):
    """The input embedding of a model whose head is tied to it, so that the head's rows are it."""

    def __init__(self, network: NativeNetwork) -> None:
        super().__init__()
        self._network = network

    def forward(self, ids: Tensor) -> Tensor:
        """[...] -> [..., H] float32."""
        return self._network.rows_of(ids)

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self._network.get(HEAD, "")}


class PackedHead(_Packed):
    """The head; `model` has it as `diffusion_head`."""

    def __init__(self, network: NativeNetwork) -> None:
        super().__init__()
        self._network = network

    def forward(self, states: Tensor) -> Tensor:
        """[..., H] -> [..., V] float32."""
        return self._network.logits(states)

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self._network.get(HEAD, "")}

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        tied = destination.get("encoder.embed_tokens.weight")
        is_tied = self._network.config.tie_word_embeddings and tied is not None
        destination[prefix + "weight"] = tied if is_tied else self.tensors()["weight"]


def pack(model: TriModeModel, weights: Weights) -> NativeNetwork:
    """Pack a plain model's weights, part by part; each plain part goes when its copy is made.

    Raises:
        ConfigError: `refusal`, in one line.
        CapacityError: there is no memory for it.
    """
    reason = refusal(model)
    if reason is not None:
        raise ConfigError(f"weights is {weights!r}; {reason}; allowed: plain")
    found = library.load()
    assert found is not None
    network = NativeNetwork(
        *(found, model.config), dtype=model.dtype, weights=weights, rotary=model.rotary
    )
    layers: Any = model.encoder.layers
    for index, layer in enumerate(layers):
        layers[index] = PackedLayer(layer, network)
    network.set_norm(HEAD, "", model.encoder.norm.weight)
    network.set(HEAD, "", model.diffusion_head.weight)
    model.diffusion_head = PackedHead(network)  # type: ignore[assignment]
    if model.config.tie_word_embeddings:
        model.encoder.embed_tokens = PackedEmbedding(network)  # type: ignore[assignment]
    for parameter in model.parameters():  # a view of the file would hold all of it
        parameter.data = parameter.data.clone()
    if not model.config.tie_word_embeddings:
        network.set_embedding(model.encoder.embed_tokens.weight)
    found.c.trimode_model_is_packed()
    return network


def unpack(model: TriModeModel) -> None:
    """Make the plain parts again, in place, part by part."""
    from trimode.model.modeling import Layer

    config, layers = model.config, model.encoder.layers
    packed: Any
    for index, packed in enumerate(layers):
        with torch.device("meta"):
            plain = Layer(config, index)
        plain.load_state_dict(packed.tensors(), assign=True)
        layers[index] = plain.eval()
    head: Any = model.diffusion_head
    weight = head.tensors()["weight"]
    with torch.device("meta"):
        new_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        embedding = nn.Embedding(config.vocab_size, config.hidden_size)
    new_head.load_state_dict({"weight": weight}, assign=True)
    model.diffusion_head = new_head.eval()
    if config.tie_word_embeddings:
        embedding.weight = new_head.weight
        model.encoder.embed_tokens = embedding.eval()
    else:  # a copy of the packed model may read the one that there was
        parameter = model.encoder.embed_tokens.weight
        model.encoder.embed_tokens.weight = nn.Parameter(parameter.detach().clone())


def run(
    network: NativeNetwork,
    input_ids: Tensor,
    position_ids: Tensor,
    *,
    attend: RowAttention,
    adapter: AdapterSwitch | None,
    wanted: Sequence[int] | None = None,
    wants_logits: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """One forward of packed tokens; see `NativeNetwork.forward` and `TriModeModel.answer`."""
    is_on = places = None
    if adapter is not None:
        is_on = None if adapter.is_on is None else adapter.is_on.flatten().tolist()
        places = None if adapter.mask_places is None else adapter.mask_places.tolist()
    return network.forward(
        input_ids.tolist(),
        position_ids.tolist(),
        cache=attend.cache,
        feeds=attend.feeds,
        adapter=None if adapter is None else adapter.adapter,
        is_on=is_on,
        mask_places=places,
        wanted=wanted,
        wants_logits=wants_logits,
    )


def whole_sequences(
    model: TriModeModel,
    input_ids: Tensor,
    is_real: Tensor,
    position_ids: Tensor,
    *,
    is_causal: bool,
    adapter: AdapterSwitch | None,
) -> Tensor:
    """Logits of whole sequences; only real tokens are fed, each sequence over a row of its own.

    Args:
        model: Packed.
        input_ids, position_ids: [B, T] int64.
        is_real: [B, T] bool.
        is_causal: The AR view; else all tokens of a sequence see each other.
        adapter: [B, T], as `TriModeModel.encode` has it.

    Returns:
        [B, T, V] float32; zeros for padding.
    """
    num_rows, num_tokens = input_ids.shape
    feeds = []
    for row in range(num_rows):
        own = position_ids[row, is_real[row]].tolist()
        if own:
            groups = [TRUNK if is_causal else TRUNK + 1] * len(own)
            feeds.append(RowFeed(row, 0, groups, own, own if is_causal else [-1] * len(own)))
    hidden = model.encode(
        input_ids[is_real],
        position_ids[is_real],
        attend=RowAttention(model.new_cache(num_rows=num_rows, num_cells=num_tokens), feeds),
        adapter=None if adapter is None else adapter.of_tokens(is_real),
    )
    shape = num_rows, num_tokens, model.config.vocab_size
    logits = torch.zeros(shape, dtype=torch.float32, device="cpu")
    logits[is_real] = model.diffusion_head(hidden)
    return logits
