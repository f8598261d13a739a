"""The network: a Llama-style decoder whose view (attention, positions, adapter) is an argument.

Source: facts 1.3 and 1.4; Ministral 3, Llama, Qwen2/3 as in transformers. Parameter names are the
published ones (`encoder.*`, `diffusion_head.weight`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from trimode.errors import ConfigError
from trimode.model.adapter import AdapterSwitch
from trimode.model.attention import Attend, DenseAttention
from trimode.model.cache import KVCache
from trimode.model.configuration import NemotronLabsDiffusionConfig, TriModeConfig
from trimode.model.linear import Linear
from trimode.model.masks import dense_mask
from trimode.model.packed import PackedHead, PackedLayer, quick_norm
from trimode.model.products import Weights, as_weights

Checkpointing = bool | Literal["selective"]
"""What is made again in the backward instead of kept; see `TriModeModel.encode`."""


class RMSNorm(nn.Module):
    """Root mean square norm over the last dimension (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype is self.weight.dtype:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        # One dtype, the wider: beside a float32 residual stream a weight may be gathered in
        # bfloat16, beside a float32 weight autocast gives queries and keys in it.
        dtype = torch.promote_types(self.weight.dtype, x.dtype)
        return F.rms_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), self.eps)


class Rotary:
    """Angles of rotary positions and the query scale. Holds constants only, made from the
    config."""

    def __init__(self, config: TriModeConfig) -> None:
        parameters = config.rope_parameters
        self._config = config
        self._beta = float(parameters.get("llama_4_scaling_beta") or 0.0)
        self._original_len = parameters.get(
            "original_max_position_embeddings", config.max_position_embeddings
        )
        self._constants: dict[torch.device, tuple[Tensor, float]] = {}

    def _frequencies(self, device: torch.device) -> tuple[Tensor, float]:
        """[D/2] float32 inverse frequencies and the attention factor, made once per device."""
        if device not in self._constants:
            rope_type = self._config.rope_parameters["rope_type"]
            if rope_type == "default":
                theta, dim = self._config.rope_parameters["rope_theta"], self._config.head_dim
                inverse = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
                factor = 1.0
            else:
                inverse, factor = ROPE_INIT_FUNCTIONS[rope_type](self._config, None)
            self._constants[device] = (inverse.to(device), float(factor))
        return self._constants[device]

    def table(self, position_ids: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """[P] int64 -> cosines and sines [P, D/2] float32, and the query scale [P] or None.

        Each is rounded from float64, so that it does not depend on how many are made together.
        """
        inverse, factor = self._frequencies(position_ids.device)
        angles = (position_ids[:, None].float() * inverse).double()
        cos, sin = (angles.cos() * factor).float(), (angles.sin() * factor).float()
        if not self._beta:
            return cos, sin, None
        turns = torch.floor(position_ids.double() / self._original_len)
        return cos, sin, (1 + self._beta * torch.log(1 + turns)).float()

    def __call__(self, position_ids: Tensor, dtype: torch.dtype) -> RotaryAngles:
        """position_ids: [...] int64 -> angles for tensors [..., heads, D] of `dtype`."""
        inverse, factor = self._frequencies(position_ids.device)
        angles = position_ids[..., None, None].float() * inverse
        cos, sin = angles.cos(), angles.sin()
        if factor != 1:
            cos, sin = cos * factor, sin * factor
        query_scale = None
        if self._beta:
            query_scale = 1 + self._beta * torch.log(
                1 + torch.floor(position_ids / self._original_len)
            )
            query_scale = query_scale[..., None, None].to(dtype)
        return RotaryAngles(
            cos=torch.cat((cos, cos), dim=-1).to(dtype),
            signed_sin=torch.cat((-sin, sin), dim=-1).to(dtype),
            query_scale=query_scale,
        )


class RotaryAngles:
    """cos, signed_sin: [..., 1, D]; query_scale: [..., 1, 1] or None. Half-rotation ("neox")
    layout."""

    __slots__ = ("_half", "cos", "query_scale", "signed_sin")

    def __init__(self, *, cos: Tensor, signed_sin: Tensor, query_scale: Tensor | None) -> None:
        self.cos = cos
        self.signed_sin = signed_sin
        self.query_scale = query_scale
        self._half = cos.shape[-1] // 2

    def rotate(self, x: Tensor) -> Tensor:
        """x: [..., heads, D]. rotate_half(x) * sin is roll(x) * signed_sin."""
        return torch.addcmul(x * self.cos, x.roll(self._half, -1), self.signed_sin)


class Attention(nn.Module):
    """Grouped-query attention; what is attended to is the caller's `attend`."""

    def __init__(self, config: TriModeConfig, layer_index: int) -> None:
        super().__init__()
        hidden, dim = config.hidden_size, config.head_dim
        num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        bias = config.attention_bias
        self.layer_index = layer_index
        self.head_dim = dim
        self.q_proj = Linear(hidden, num_heads * dim, bias=bias)
        self.k_proj = Linear(hidden, num_kv_heads * dim, bias=bias)
        self.v_proj = Linear(hidden, num_kv_heads * dim, bias=bias)
        self.o_proj = Linear(num_heads * dim, hidden, bias=config.has_output_bias)
        if config.use_qk_norm:
            self.q_norm = RMSNorm(dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(dim, config.rms_norm_eps)
        self.use_qk_norm = config.use_qk_norm

    def forward(
        self, x: Tensor, angles: RotaryAngles, *, attend: Attend, adapter: AdapterSwitch | None
    ) -> Tensor:
        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if adapter is not None:
            query = adapter.add(self.layer_index, "q_proj", x, query)
            key = adapter.add(self.layer_index, "k_proj", x, key)
            value = adapter.add(self.layer_index, "v_proj", x, value)
        # Heads are counted from the projections: a tensor-parallel rank has only some of them.
        query = query.unflatten(-1, (-1, self.head_dim))
        key = key.unflatten(-1, (-1, self.head_dim))
        value = value.unflatten(-1, (-1, self.head_dim))
        if self.use_qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        rotated = angles.rotate(torch.cat((query, key), dim=-2))
        query, key = rotated.split((query.shape[-2], key.shape[-2]), dim=-2)
        if angles.query_scale is not None:
            query = query * angles.query_scale
        attended = attend(self.layer_index, query, key, value).flatten(-2)
        output = self.o_proj(attended)
        if adapter is not None:
            output = adapter.add(self.layer_index, "o_proj", attended, output)
        return output


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: TriModeConfig, layer_index: int) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.layer_index = layer_index
        self.gate_proj = Linear(hidden, inner, bias=bias)
        self.up_proj = Linear(hidden, inner, bias=bias)
        self.down_proj = Linear(inner, hidden, bias=bias)

    def forward(
        self, x: Tensor, *, adapter: AdapterSwitch | None, is_selective: bool = False
    ) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if adapter is not None:
            gate = adapter.add(self.layer_index, "gate_proj", x, gate)
            up = adapter.add(self.layer_index, "up_proj", x, up)
        # What is made again ends before the product, which keeps nothing more.
        return _run(self._down, gate, up, adapter, is_checkpointed=is_selective)

    def _down(self, gate: Tensor, up: Tensor, adapter: AdapterSwitch | None) -> Tensor:
        inner = F.silu(gate) * up
        output = self.down_proj(inner)
        if adapter is not None:
            output = adapter.add(self.layer_index, "down_proj", inner, output)
        return output


class Layer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: TriModeConfig, layer_index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer_index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, layer_index)

    def forward(
        self,
        x: Tensor,
        angles: RotaryAngles,
        *,
        attend: Attend,
        adapter: AdapterSwitch | None,
        is_selective: bool = False,
    ) -> Tensor:
        """is_selective: Make norms and the product of gate and up again in the backward."""
        normed = _run(self.input_layernorm, x, is_checkpointed=is_selective)
        x = x + self.self_attn(normed, angles, attend=attend, adapter=adapter)
        normed = _run(self.post_attention_layernorm, x, is_checkpointed=is_selective)
        return x + self.mlp(normed, adapter=adapter, is_selective=is_selective)


def _run(
    part: Callable[..., Tensor], *inputs: Any, is_checkpointed: bool, **options: Any
) -> Tensor:
    """`part` of `inputs`; if checkpointed, its backward keeps only these and runs it again."""
    if not (is_checkpointed and torch.is_grad_enabled()):
        return part(*inputs, **options)
    again: Tensor = checkpoint(
        *(part, *inputs),
        use_reentrant=False,
        preserve_rng_state=False,  # there is no dropout
        **options,
    )
    return again


class Encoder(nn.Module):
    """Embedding, layers and final norm. "Encoder" is the published name; the view decides what it
    is."""

    def __init__(self, config: TriModeConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Leader(Protocol):
    """What a network that is shared out over ranks tells the other ranks, on rank 0."""

    def forward(
        self, ids: Tensor, positions: Tensor, attend: Attend, adapter: AdapterSwitch | None
    ) -> AbstractContextManager[None]:
        """Have the others run the forward that is run inside; arguments as `encode` has them."""
        ...

    def add_cache(self, cache: KVCache) -> None:
        """Have the others make one like it, and keep theirs as it is."""
        ...


class TriModeModel(PreTrainedModel):
    """One network, many views: every view is an argument of `encode`, none is stored."""

    config_class = TriModeConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = False
    _supports_sdpa = True
    _no_split_modules = ["Layer"]  # noqa: RUF012
    _tied_weights_keys = {"diffusion_head.weight": "encoder.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: TriModeConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config)
        self.diffusion_head: nn.Linear = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = Rotary(config)
        self.weights: Weights = "plain"  # changed by `pack` only
        self.num_ranks = 1  # that share out the layers; see `model.shares`
        self.leader: Leader | None = None  # on rank 0, where there are others
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.encoder.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.diffusion_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.diffusion_head = value

    def pack(self, weights: Weights = "packed") -> Self:
        """Bring the weights into a form for decoding, in place; they are not held twice.

        Training, adapters that are to be merged and tools that look for linear layers need the
        plain form. A head that shares the embedding's weight stays as it is.

        Args:
            weights: `packed`: products that read the same input fused into one, and in float32 on
                the CPU the weights in oneDNN's own order. The same results but for the last bits.
                `int8`: rounded to 8 bits, the tokens in the products too. Quicker still, at a
                price in quality, and the original weights are gone. `plain`: back to what was,
                layers and head trainable.

        Raises:
            ConfigError: no such form; int8 for other than float32 on the CPU; plain or packed after
                int8; a part that is not ours (PEFT's, say), whose share would be lost; or weights
                that are shared out over ranks.
        """
        if as_weights(weights) == self.weights:
            return self
        if self.num_ranks > 1:
            raise ConfigError(f"weights is {weights!r}; a model shared out over ranks is plain")
        layers: Any = self.encoder.layers
        if self.weights != "plain":
            for index, layer in enumerate(layers):
                layers[index] = layer.plain(self.config)
            head: nn.Module = self.diffusion_head
            if isinstance(head, PackedHead):
                self.diffusion_head = head.plain(self.config)
        self.weights = "plain"
        if weights != "plain":
            self._refuse_foreign_parts()
            self.eval()
            for index, layer in enumerate(layers):
                layers[index] = PackedLayer(layer, weights=weights)
            if not self.config.tie_word_embeddings:
                head = PackedHead(self, weights=weights)
                self.diffusion_head = head  # type: ignore[assignment]
            self.weights = weights
            if self.device.type == "cpu":
                for parameter in self.parameters():  # a view of the file would hold all of it
                    parameter.data = parameter.data.clone()
        return self

    def _refuse_foreign_parts(self) -> None:
        ours = (nn.ModuleList, Layer, Attention, MLP, RMSNorm, Linear)
        parts = [*self.encoder.layers.named_modules(), ("diffusion_head", self.diffusion_head)]
        for name, part in parts:
            if type(part) not in ours:
                raise ConfigError(
                    f"{name} is a {type(part).__module__}.{type(part).__name__}, whose share of the"
                    " result packed weights would lose; merge or remove it, then pack"
                )

    def num_parameters(self, *args: Any, **options: Any) -> int:
        """As transformers has it, of the plain form: packed weights are no parameters."""
        model = self
        if self.weights != "plain":
            with torch.device("meta"):
                model = type(self)(self.config)
        return super(TriModeModel, model).num_parameters(*args, **options)

    def train(self, mode: bool = True) -> Self:
        """As every module's; brings the weights back into the plain form."""
        if mode:
            self.pack("plain")
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """What `to`, `half` and the like do; only plain weights can be moved or converted."""
        self.pack("plain")
        return super()._apply(fn, recurse)

    def new_cache(self, *, num_rows: int, num_cells: int) -> KVCache:
        """K/V rows for this network: on its device, in its dtype, for the heads of this rank.

        Raises:
            CapacityError: they do not fit into memory, here or on another rank.
        """
        weight = self.encoder.embed_tokens.weight
        cache = KVCache(
            self.config,
            num_rows=num_rows,
            num_cells=num_cells,
            device=weight.device,
            dtype=weight.dtype,
            num_ranks=self.num_ranks,
        )
        if self.leader is not None:
            self.leader.add_cache(cache)
        return cache

    def encode(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        *,
        attend: Attend,
        adapter: AdapterSwitch | None = None,
        checkpointing: Checkpointing = False,
    ) -> Tensor:
        """The one forward pass, up to the head.

        Args:
            input_ids: [...] int64. [B, T] for whole sequences, [P] for packed tokens.
            position_ids: Same shape, int64. Absolute positions.
            attend: The attention pattern, and the K/V rows if there are any.
            adapter: The drafter adapter and the tokens it is on for; None if for none.
            checkpointing: What the backward makes again. `selective`: norms and the product of gate
                and up, hardly any work. True: that, and every layer from its input, which alone is
                kept; least memory, up to a third more work. Not the last layer, which would be run
                again at once. `attend` must not write anything then.

        Returns:
            [..., H]. `diffusion_head` of any of it gives logits over the vocabulary.
        """
        if self.leader is None:
            return self._encode(input_ids, position_ids, attend, adapter, checkpointing)
        with self.leader.forward(input_ids, position_ids, attend, adapter):
            return self._encode(input_ids, position_ids, attend, adapter, checkpointing)

    def _encode(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attend: Attend,
        adapter: AdapterSwitch | None,
        checkpointing: Checkpointing,
    ) -> Tensor:
        x = self.encoder.embed_tokens(input_ids)
        if adapter is not None:
            x = adapter.embed(x)
        angles = self.rotary(position_ids, x.dtype)
        if self.weights != "plain":
            return self._encode_packed(x, angles, attend=attend, adapter=adapter)
        is_rerun, is_selective = checkpointing is True, checkpointing is not False
        last = self.encoder.layers[-1]
        for layer in self.encoder.layers:
            x = _run(
                *(layer, x, angles),
                is_checkpointed=is_rerun and layer is not last,
                attend=attend,
                adapter=adapter,
                is_selective=is_selective,
            )
        return self.encoder.norm(x)

    @torch.no_grad()
    def _encode_packed(
        self, x: Tensor, angles: RotaryAngles, *, attend: Attend, adapter: AdapterSwitch | None
    ) -> Tensor:
        if x.is_cpu and torch.is_autocast_enabled("cpu"):
            raise ConfigError("packed weights do not autocast; call model.pack('plain') first")
        num_tokens, copies = len(x), self.encoder.layers[0].num_copies(x)  # type: ignore[operator]
        if copies > 1:
            x = torch.cat((x,) * copies)
            if adapter is not None and adapter.is_on is not None:
                adapter = AdapterSwitch(adapter.adapter, adapter.is_on.repeat(copies, 1))
        for layer in self.encoder.layers:
            x = layer(x, angles, attend=attend, adapter=adapter, copies=copies)
        x = x[:num_tokens] if copies > 1 else x
        return quick_norm(x, self.encoder.norm.weight, self.encoder.layers[0].eps)  # type: ignore[arg-type]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        pattern: str = "causal",
        adapter: AdapterSwitch | None = None,
        **unsupported: Any,
    ) -> CausalLMOutput:
        """Logits of whole sequences in one view, without K/V: for scoring, tests and tools.

        Args:
            input_ids: [B, T] int64.
            attention_mask: [B, T], nonzero where a token is real (left or right padding).
            position_ids: [B, T] int64; by default counted over the real tokens.
            pattern: `causal` (the AR view) or `bidirectional`.
            adapter: As in `encode`.

        Returns:
            `logits`: [B, T, V].
        """
        if pattern not in ("causal", "bidirectional"):
            raise ConfigError(f"pattern is {pattern!r}; allowed: causal, bidirectional")
        for name, value in unsupported.items():
            is_what_we_do = value is None or value is (name == "return_dict")
            if not is_what_we_do:
                raise ConfigError(f"forward does not take {name}")
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        elif position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        attend = DenseAttention(dense_mask(pattern, input_ids, attention_mask))
        hidden = self.encode(input_ids, position_ids, attend=attend, adapter=adapter)
        return CausalLMOutput(logits=self.diffusion_head(hidden))


class NemotronLabsDiffusionModel(TriModeModel):
    """The same network under the published name, so that what it saves names the right
    architecture."""

    config_class = NemotronLabsDiffusionConfig


MODEL_CLASSES: dict[str, type[TriModeModel]] = {
    cls.config_class.model_type: cls for cls in (TriModeModel, NemotronLabsDiffusionModel)
}
"""Model class by `model_type`."""
