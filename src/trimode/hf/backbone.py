"""The network up to its head, as transformers' callers want it: masks, positions, a cache."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from trimode.errors import RequestError, UnsupportedError
from trimode.model import modeling
from trimode.model.attention import DenseAttention
from trimode.model.masks import dense_mask

_SAID_ANYWAY = ("cache_position",)
"""Arguments of older transformers, which say what other arguments say as well."""

CACHE_FIELD = next(
    field.name
    for field in fields(BaseModelOutputWithPast)
    if field.name in ("cache", "past_key_values")
)
"""What this transformers calls the cache in an output; `forward` takes both names."""


class Backbone:
    """The AR view of a network up to its head. It holds nothing of its own.

    Args:
        network: Its weights are read at every call, so that what wraps them counts.
        checkpointing: Whether the backward recomputes layers.
    """

    _tp_plan = None  # transformers asks a `base_model` for plans to share it out
    _pp_plan = None

    def __init__(self, network: modeling.TriModeModel, *, checkpointing: bool) -> None:
        self._network = network
        self._checkpointing = checkpointing

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **options: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states; arguments as `TriModeForCausalLM.forward` has them.

        Returns:
            `last_hidden_state` [B, T, H]; the cache, if there is one.

        Raises:
            RequestError: no tokens, or an argument that it does not take.
            UnsupportedError: packed weights, or as `forward`.
        """
        input_ids = checked_inputs(input_ids, attention_mask, inputs_embeds, options)
        if self._network.native is not None:
            raise UnsupportedError("weights are packed; supported: plain, model.pack('plain')")
        if cache is None and use_cache:
            cache = DynamicCache()
        num_cached = 0 if cache is None else int(cache.get_seq_length())
        positions = position_ids
        if positions is None:
            positions = positions_of(input_ids, attention_mask, num_cached=num_cached)
        if cache is None:
            attend = DenseAttention(causal_mask(input_ids, attention_mask, position_ids))
            hidden = self._network.encode(
                input_ids, positions, attend=attend, checkpointing=self._checkpointing
            )
            return BaseModelOutputWithPast(last_hidden_state=hidden)
        mask = cached_mask(input_ids, attention_mask, num_cached=num_cached)
        hidden = self._network.encode(input_ids, positions, attend=CacheAttention(cache, mask))
        return BaseModelOutputWithPast(last_hidden_state=hidden, **{CACHE_FIELD: cache})


def checked_inputs(
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    inputs_embeds: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """The tokens, where all else is what a forward can do.

    Raises:
        RequestError: no tokens, or an option that is not off.
        UnsupportedError: embeddings, or a mask that is not [B, T].
    """
    for name, value in options.items():
        is_off = value is None or value is False or (name == "return_dict" and value is True)
        if not (is_off or name in _SAID_ANYWAY):
            raise RequestError(f"forward does not take {name}; it gives AR logits and their loss")
    if inputs_embeds is not None:
        raise UnsupportedError("inputs_embeds is a tensor; supported: None, with input_ids")
    if input_ids is None:
        raise RequestError("input_ids is None; allowed: an integer tensor [B, T]")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise UnsupportedError(
            f"attention_mask is {tuple(attention_mask.shape)}; supported: None or [B, T]"
        )
    return input_ids


class CacheAttention:
    """Attention over a transformers cache, which every layer extends.

    Args:
        cache: Grows by what is fed.
        attn_mask: [B or 1, 1, T, cached + T] bool, True = may attend.
    """

    def __init__(self, cache: Cache, attn_mask: Tensor) -> None:
        self.cache = cache
        self.attn_mask = attn_mask

    def __call__(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query: [B, T, N, D]; key, value: [B, T, G, D] -> [B, T, N, D].

        Raises:
            UnsupportedError: the cache does not grow token by token.
        """
        keys, values = self.cache.update(key.transpose(1, 2), value.transpose(1, 2), layer_index)
        if keys.shape[2] != self.attn_mask.shape[-1]:
            raise UnsupportedError(
                f"past_key_values is a {type(self.cache).__name__}; supported: DynamicCache"
            )
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            keys,
            values,
            attn_mask=self.attn_mask,
            enable_gqa=query.shape[2] != keys.shape[1],
        )
        return attended.transpose(1, 2)


def positions_of(input_ids: Tensor, attention_mask: Tensor | None, *, num_cached: int) -> Tensor:
    """[B or 1, T] int64: positions counted over the real tokens.

    Args:
        input_ids: [B, T].
        attention_mask: [B, cached + T], or None if all are real.
        num_cached: Tokens in the cache, padding included.
    """
    num_tokens = input_ids.shape[1]
    if attention_mask is None:
        return torch.arange(num_cached, num_cached + num_tokens, device=input_ids.device)[None]
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -num_tokens:]


def causal_mask(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
) -> Tensor | None:
    """The mask of whole sequences; see `trimode.model.masks.dense_mask`.

    Where positions begin anew within a row and no mask is given, the row holds several texts, as
    packing collators make it; none of them sees another.
    """
    if attention_mask is not None or position_ids is None:
        return dense_mask("causal", input_ids, attention_mask)
    is_start = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if not bool(is_start.any()):
        return None
    text = F.pad(is_start.long().cumsum(-1), (1, 0))
    is_same_text = text[:, :, None] == text[:, None, :]
    return (is_same_text.tril())[:, None]


def cached_mask(input_ids: Tensor, attention_mask: Tensor | None, *, num_cached: int) -> Tensor:
    """[B or 1, 1, T, cached + T] bool: causal, behind what is cached.

    Args:
        input_ids: [B, T]. Only its shape and device are used.
        attention_mask: [B, cached + T], nonzero where a token is real; None if all are.
        num_cached: Tokens in the cache.
    """
    num_tokens, device = input_ids.shape[1], input_ids.device
    shape = (num_tokens, num_cached + num_tokens)
    allowed = torch.ones(shape, dtype=torch.bool, device=device).tril(num_cached)[None, None]
    if attention_mask is None:
        return allowed
    if attention_mask.shape[-1] != shape[1]:
        raise UnsupportedError(
            f"attention_mask is {tuple(attention_mask.shape)}; supported: [B, {shape[1]}],"
            f" {num_cached} cached tokens included"
        )
    # A padded token sees itself, so that its softmax is over something; nobody else sees it.
    itself = torch.zeros(shape, dtype=torch.bool, device=device)
    itself[:, num_cached:].fill_diagonal_(True)
    return (allowed & attention_mask.bool()[:, None, None, :]) | itself
