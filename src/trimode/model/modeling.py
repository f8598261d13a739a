"""The network: a Llama-style decoder whose view (attention, positions, adapter) is an argument.

Source: facts 1.3 and 1.4; Ministral 3, Llama, Qwen2/3 as in transformers. Parameter names are the
published ones (`encoder.*`, `diffusion_head.weight`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from trimode.errors import ConfigError
from trimode.model.adapter import AdapterSwitch
from trimode.model.attention import Attend, DenseAttention, RowAttention, RowFeed
from trimode.model.cache import KVCache
from trimode.model.configuration import NemotronLabsDiffusionConfig, TriModeConfig
from trimode.model.linear import Linear
from trimode.model.masks import TRUNK, dense_mask, fed_mask
from trimode.model.native import modules as native_modules
from trimode.model.native.step import NativeNetwork, PackedRows
from trimode.model.rotary import Rotary, RotaryAngles
from trimode.model.weights import Weights, as_weights

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
        self.native: NativeNetwork | None = None  # changed by `pack` only
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

    @property
    def embedding_rows(self) -> Tensor | PackedRows:
        """Input embeddings of all tokens [V, H]; where they are packed, what the library reads."""
        if self.native is not None and self.config.tie_word_embeddings:
            return self.native.embedding
        return self.encoder.embed_tokens.weight

    @property
    def weights(self) -> Weights:
        """The form of the weights."""
        return "plain" if self.native is None else self.native.weights

    def pack(self, weights: Weights = "native") -> Self:
        """Bring the weights into a form for decoding, in place; they are not held twice.

        Training, adapters that are to be merged and tools that look for linear layers need the
        plain form.

        Args:
            weights: `native`: for the native step, on the CPU, in the model's dtype. A forward is
                one call, and every sum has one order (`trimode.model.native`). `int8`: the same,
                all matrices rounded to 8 bits, a tied embedding too; quicker, at a price in
                quality, and the original weights are gone. `plain`: back to what was, layers and
                head trainable.

        Raises:
            ConfigError: no such form; the native step cannot run the model, and why; another form
                after int8; a part that is not ours (PEFT's, say), whose share would be lost; or
                weights that are shared out over ranks.
            CapacityError: the packed weights do not fit into memory.
        """
        if as_weights(weights) == self.weights:
            return self
        if self.num_ranks > 1:
            raise ConfigError(f"weights is {weights!r}; a model shared out over ranks is plain")
        if self.native is not None:
            native_modules.unpack(self)
            self.native = None
        if weights != "plain":
            self._refuse_foreign_parts()
            self.eval()
            self.native = native_modules.pack(self, weights)
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
        if self.native is not None:
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
        cache = KVCache(
            self.config,
            num_rows=num_rows,
            num_cells=num_cells,
            device=self.device,
            dtype=self.dtype,
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
        if self.native is not None:
            if torch.is_autocast_enabled("cpu"):
                raise ConfigError("packed weights do not autocast; call model.pack('plain') first")
            assert isinstance(attend, RowAttention), "packed weights run over K/V rows only"
            return native_modules.run(
                *(self.native, input_ids, position_ids), attend=attend, adapter=adapter
            )[0]
        if self.leader is None:
            return self._encode(input_ids, position_ids, attend, adapter, checkpointing)
        with self.leader.forward(input_ids, position_ids, attend, adapter):
            return self._encode(input_ids, position_ids, attend, adapter, checkpointing)

    def answer(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        *,
        attend: RowAttention,
        adapter: AdapterSwitch | None,
        wanted: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """The forward of decoding: `encode`, then the head for some tokens.

        Args:
            input_ids, position_ids: [P] int64.
            attend: Over K/V rows, which it writes.
            adapter: As in `encode`.
            wanted: W of the tokens.

        Returns:
            Their hidden states [W, H] and logits [W, V].
        """
        if self.native is not None:
            hidden, logits = native_modules.run(
                *(self.native, input_ids, position_ids),
                attend=attend,
                adapter=adapter,
                wanted=wanted,
                wants_logits=True,
            )
            assert logits is not None
            return hidden, logits
        hidden = self.encode(input_ids, position_ids, attend=attend, adapter=adapter)
        if len(wanted) < len(hidden):
            hidden = hidden[torch.tensor(wanted, device=hidden.device)]
        return hidden, self.diffusion_head(hidden)

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

    def encode_text(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        *,
        groups: Sequence[int],
        anchors: Sequence[int],
        adapter: AdapterSwitch | None = None,
    ) -> Tensor:
        """One text in one forward, of which no K/V are kept.

        Args:
            input_ids, position_ids: [T] int64.
            groups, anchors: [T]. See `masks.fed_mask`.
            adapter: As in `encode`; [T].

        Returns:
            [T, H].
        """
        positions = position_ids.tolist()
        if self.native is not None:
            cache = self.new_cache(num_rows=1, num_cells=len(positions))
            attend = RowAttention(cache, [RowFeed(0, 0, groups, positions, anchors)])
            return self.encode(input_ids, position_ids, attend=attend, adapter=adapter)
        attn_mask = None
        if any(group != TRUNK for group in groups):
            attn_mask = fed_mask(groups, positions, anchors)[None, None].to(input_ids.device)
        batch = None if adapter is None else adapter.batched()
        dense = DenseAttention(attn_mask)
        return self.encode(input_ids[None], position_ids[None], attend=dense, adapter=batch)[0]

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
        if self.native is not None:
            is_real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            logits = native_modules.whole_sequences(
                *(self, input_ids, is_real.bool(), position_ids.expand_as(input_ids)),
                is_causal=pattern == "causal",
                adapter=adapter,
            )
            return CausalLMOutput(logits=logits)
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
