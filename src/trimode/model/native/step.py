"""The network packed for the native step: its weights, and one forward of it.

Nothing here is torch's but the tensors that come in and go out; source/forward.h is the forward.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from ctypes import Structure, byref, c_float, c_int32, c_void_p
from typing import Any, Self
from weakref import WeakKeyDictionary, WeakSet, finalize

import numpy as np
import torch
from torch import Tensor

from trimode.errors import CapacityError, ConfigError
from trimode.model.adapter import TARGETS, DrafterAdapter
from trimode.model.attention import RowFeed
from trimode.model.cache import KVCache
from trimode.model.configuration import TriModeConfig
from trimode.model.native.adapter_parts import first_halves, padded_ranks, second_half
from trimode.model.native.fed import Fed
from trimode.model.native.library import Library, load
from trimode.model.rotary import Rotary
from trimode.model.weights import Weights

FORMS = {torch.float32: 0, torch.bfloat16: 1}
"""Numbers of the forms in source/model.h."""

INT8 = 2
"""The form of weights that are rounded to 8 bits."""

HEAD = -1
"""Stands for the head where a layer's index is asked for, and for the last norm."""

NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
"""Norms of a layer, in the order of their numbers."""

_POSITIONS_AT_ONCE = 1024


class _Shape(Structure):
    _fields_ = (
        *[(name, c_int32) for name in ("vocab_size", "hidden_size", "intermediate_size")],
        *[(name, c_int32) for name in ("num_layers", "num_heads", "num_kv_heads", "head_dim")],
        ("form", c_int32),
        ("eps", c_float),
    )


class _Source(Structure):
    _fields_ = (
        ("data", c_void_p),
        ("form", c_int32),
        ("out", c_int32),
        ("inner", c_int32),
        ("bias", c_void_p),
    )


class _Forward(Structure):
    _fields_ = (
        ("num_tokens", c_int32),
        ("num_wanted", c_int32),
        *[(name, c_void_p) for name in ("ids", "positions", "rows", "cells", "prefixes")],
        *[(name, c_void_p) for name in ("starts", "stops", "places", "is_on", "wanted")],
        *[(name, c_void_p) for name in ("adapter", "keys", "values")],
        *[(name, c_int32) for name in ("cache_form", "num_rows", "num_cells")],
        ("hidden", c_void_p),
        ("logits", c_void_p),
    )


class PackedRows:
    """The head's rows as the library reads input embeddings, where these are tied.

    Attributes:
        address: Of an `EmbeddingView`, good as long as the network.
    """

    __slots__ = ("_network", "address")

    def __init__(self, network: NativeNetwork, address: int) -> None:
        self._network = network
        self.address = address


class NativeNetwork:
    """A network whose weights are packed, in memory of its own.

    A lock makes a second thread wait.

    Args:
        library: Compiled.
        config: Of the network.
        dtype: Of the original: float32 or bfloat16, which `native` keeps.
        weights: `native` or `int8`.
        rotary: Makes angles of positions.

    Raises:
        CapacityError: the weights do not fit into memory.
    """

    def __init__(
        self,
        library: Library,
        config: TriModeConfig,
        *,
        dtype: torch.dtype,
        weights: Weights = "native",
        rotary: Rotary,
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.weights = weights
        self._c = library.c
        self._library = library
        self._rotary = rotary
        self._lock = threading.RLock()
        _networks.add(self)
        shape = _Shape(
            *(config.vocab_size, config.hidden_size, config.intermediate_size),
            *(config.num_hidden_layers, config.num_attention_heads),
            *(config.num_key_value_heads, config.head_dim),
            INT8 if weights == "int8" else FORMS[dtype],
            config.rms_norm_eps,
        )
        model = self._c.trimode_model_new(library.kernels, library.threads, byref(shape))
        if not model:
            raise CapacityError("the packed weights do not fit into memory")
        self._model = c_void_p(model)
        _freed_with(self, self._c.trimode_model_free, self._model)
        self._kept: dict[str, Any] = {}  # what C++ has pointers to
        self._small: dict[tuple[int, str], Tensor] = {}  # norms and biases, as they were given
        self._num_positions = 0
        self._adapters: WeakKeyDictionary[DrafterAdapter, c_void_p] = WeakKeyDictionary()

    @property
    def embedding(self) -> PackedRows:
        """Of a tied head."""
        return PackedRows(self, self._c.trimode_model_embedding(self._model))

    @property
    def num_bytes(self) -> int:
        """Of the packed weights."""
        return int(self._c.trimode_model_bytes(self._model))

    def is_forked(self) -> None:
        """Make it usable in a child, whatever the parent's threads were doing."""
        self._lock = threading.RLock()
        self._c.trimode_model_is_forked(self._model)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # packed weights never change

    def __reduce__(self) -> tuple[Any, ...]:
        config, weights = self.config, {}
        for layer in range(config.num_hidden_layers):
            for target in TARGETS:
                weights[layer, target] = self.get(layer, target)
        weights[HEAD, ""] = self.get(HEAD, "")
        return _made_again, (config, self.dtype, self._rotary, weights, self._small, self._kept)

    def set(self, layer: int, target: str, weight: Tensor, bias: Tensor | None = None) -> None:
        """Pack one weight [out, in], which may be thrown away afterwards."""
        source, kept = _source(weight, bias)
        if bias is not None:
            self._small[layer, target] = bias.detach().clone()
        index = TARGETS.index(target) if layer != HEAD else 0
        is_done = self._c.trimode_model_set(self._model, layer, index, byref(source))
        del kept
        if not is_done:
            raise CapacityError("the packed weights do not fit into memory")

    def get(self, layer: int, target: str) -> Tensor:
        """[out, in]: a weight as it was given, bit for bit.

        Raises:
            ConfigError: it was rounded to int8.
        """
        if self.weights == "int8":
            raise ConfigError(
                "the weights are int8 and the original ones are gone; load with weights='native' or"
                " 'plain' to save, convert, copy or move the model"
            )
        index = TARGETS.index(target) if layer != HEAD else 0
        out = _empty(*self._shape_of(layer, target))
        self._c.trimode_model_get(self._model, layer, index, c_void_p(out.data_ptr()))
        return out.to(self.dtype)

    def _shape_of(self, layer: int, target: str) -> tuple[int, int]:
        config, dim = self.config, self.config.head_dim
        hidden, inner = config.hidden_size, config.intermediate_size
        if layer == HEAD:
            return config.vocab_size, hidden
        return {
            "q_proj": (config.num_attention_heads * dim, hidden),
            "k_proj": (config.num_key_value_heads * dim, hidden),
            "v_proj": (config.num_key_value_heads * dim, hidden),
            "o_proj": (hidden, config.num_attention_heads * dim),
            "gate_proj": (inner, hidden),
            "up_proj": (inner, hidden),
            "down_proj": (hidden, inner),
        }[target]

    def set_norm(self, layer: int, name: str, weight: Tensor) -> None:
        """Copy the weight of a norm; `name` is from `NORMS`, of no meaning for the last one."""
        which = NORMS.index(name) if layer != HEAD else 0
        self._small[layer, name] = weight.detach().clone()
        plain = weight.detach().float().contiguous()
        pointer = c_void_p(plain.data_ptr())
        if not self._c.trimode_model_set_norm(self._model, layer, which, pointer, plain.numel()):
            raise CapacityError("the packed weights do not fit into memory")

    def set_embedding(self, weight: Tensor) -> None:
        """Read input embeddings from this [V, H]; without it they are the head's rows."""
        self._kept["embedding"] = weight.detach()
        pointer, form = c_void_p(weight.data_ptr()), FORMS[weight.dtype]
        self._c.trimode_model_set_embedding(self._model, pointer, form)

    def rows_of(self, ids: Tensor) -> Tensor:
        """[..., H] float32: input embeddings of tokens where the head's rows are these."""
        flat = ids.reshape(-1).to(torch.int32).contiguous()
        _check("token id", flat.numpy(), self.config.vocab_size)
        out = _empty(len(flat), self.config.hidden_size)
        self._c.trimode_model_rows(
            *(self._model, c_void_p(flat.data_ptr()), len(flat), c_void_p(out.data_ptr()))
        )
        return out.view(*ids.shape, -1)

    def logits(self, states: Tensor) -> Tensor:
        """[..., H] -> [..., V] float32: the head alone."""
        if states.shape[-1] != self.config.hidden_size:
            raise IndexError(f"states of {states.shape[-1]}; allowed: {self.config.hidden_size}")
        flat = states.reshape(-1, states.shape[-1]).float().contiguous()
        out = _empty(len(flat), self.config.vocab_size)
        with self._lock:
            is_done = self._c.trimode_head(
                *(self._model, c_void_p(flat.data_ptr()), len(flat), c_void_p(out.data_ptr()))
            )
        if not is_done:
            raise CapacityError(f"the head of {len(flat)} tokens at once does not fit into memory")
        return out.view(*states.shape[:-1], -1)

    def forward(
        self,
        token_ids: Sequence[int] | Tensor,
        positions: Sequence[int] | Tensor,
        *,
        cache: KVCache,
        feeds: Sequence[RowFeed],
        adapter: DrafterAdapter | None = None,
        is_on: Sequence[bool] | Tensor | None = None,
        mask_places: Sequence[int] | Tensor | None = None,
        wanted: Sequence[int] | None = None,
        wants_logits: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """One forward; K/V of the fed tokens are written into their cells.

        Args:
            token_ids, positions: [P].
            cache: K/V rows.
            feeds: One per sequence, in packed order.
            adapter: On where `is_on` says; None for none.
            is_on: [P]; None: on for all.
            mask_places: [P] place of each masked token, 0 for any other; None: none is masked.
            wanted: Tokens whose states are wanted; None: all.
            wants_logits: Whether their logits are wanted too.

        Returns:
            [W, H] float32 and [W, V] float32 or None.

        Raises:
            CapacityError: the tokens' intermediate values do not fit into memory.
            IndexError: a token id, position, row or cell that is none.
        """
        fed = Fed.of(feeds)
        tokens = np.array([token_ids, positions], dtype=np.int32)
        num_tokens = tokens.shape[1]
        index = np.arange(num_tokens, dtype=np.int32)
        if wanted is not None:
            index = np.array(wanted, dtype=np.int32)
        _check("token id", tokens[0], self.config.vocab_size)
        _check("position", tokens[1], None)
        _check("row", fed.rows, cache.num_rows)
        _check("cell", fed.cells, cache.num_cells)
        _check("wanted token", index, num_tokens)
        hidden = _empty(len(index), self.config.hidden_size)
        logits = _empty(len(index), self.config.vocab_size) if wants_logits else None
        handle, on, places = None, None, None
        if adapter is not None:
            on = np.ones(num_tokens, dtype=np.uint8)
            if is_on is not None:
                on = np.array(is_on, dtype=np.uint8).reshape(-1)
            if mask_places is not None:
                places = np.array(mask_places, dtype=np.int32)
        with self._lock:
            self._know_positions(int(tokens[1].max()) + 1 if num_tokens else 0)
            if adapter is not None:
                handle = self._adapter(adapter)
            forward = _Forward(
                *(num_tokens, len(index), tokens.ctypes.data, tokens[1:].ctypes.data),
                *(fed.rows.ctypes.data, fed.cells.ctypes.data, fed.prefixes.ctypes.data),
                *(fed.starts.ctypes.data, fed.stops.ctypes.data),
                None if places is None else places.ctypes.data,
                None if on is None else on.ctypes.data,
                index.ctypes.data,
                *(handle, cache.keys.data_ptr(), cache.values.data_ptr()),
                *(FORMS[cache.keys.dtype], cache.num_rows, cache.num_cells),
                hidden.data_ptr(),
                None if logits is None else logits.data_ptr(),
            )
            is_done = self._c.trimode_forward(self._model, byref(forward))
        if not is_done:
            raise CapacityError(f"a forward of {num_tokens} tokens does not fit into memory")
        return hidden, logits

    def _know_positions(self, count: int) -> None:
        """Have angles for the first `count` positions, made in pieces that are always the same."""
        if count <= self._num_positions:
            return
        num = max(-(-count // _POSITIONS_AT_ONCE) * _POSITIONS_AT_ONCE, 2 * self._num_positions)
        pieces = [
            self._rotary.table(torch.arange(first, first + _POSITIONS_AT_ONCE, device="cpu"))
            for first in range(0, num, _POSITIONS_AT_ONCE)
        ]
        cos = torch.cat([piece[0] for piece in pieces])
        sin = torch.cat([piece[1] for piece in pieces])
        scales = [piece[2] for piece in pieces if piece[2] is not None]
        scale = torch.cat(scales) if scales else None
        self._kept["positions"] = cos, sin, scale
        self._c.trimode_model_set_positions(
            *(self._model, c_void_p(cos.data_ptr()), c_void_p(sin.data_ptr())),
            None if scale is None else c_void_p(scale.data_ptr()),
        )
        self._num_positions = num

    def _adapter(self, adapter: DrafterAdapter) -> c_void_p:
        """The adapter, packed when it is first used; it must not change afterwards."""
        known = self._adapters.get(adapter)
        if known is not None:
            return known
        for layer, target, pair in adapter.items():
            found = pair.up.shape[0], pair.down.shape[1]
            if found != self._shape_of(layer, target):
                raise ConfigError(
                    f"the adapter's pair of layer {layer}, {target} is for a weight of {found};"
                    f" allowed: {self._shape_of(layer, target)}"
                )
        masks = adapter.mask_embeddings
        if masks is not None and masks.shape[1] != self.config.hidden_size:
            raise ConfigError(
                f"the adapter's mask embeddings are of {masks.shape[1]}; allowed:"
                f" {self.config.hidden_size}"
            )
        ranks = padded_ranks(adapter, num_layers=self.config.num_hidden_layers)
        handle = self._c.trimode_adapter_new(self._model, c_void_p(ranks.ctypes.data))
        _check_memory(handle)
        packed = c_void_p(handle)
        _freed_with(adapter, self._c.trimode_adapter_free, packed)
        for layer, target, pair in adapter.items():
            index = TARGETS.index(target)
            up = _source(second_half(pair, int(ranks[layer, index])), None)
            set_up = self._c.trimode_adapter_set_up
            _check_memory(set_up(self._model, packed, layer, index, byref(up[0])))
        for layer, number, halves, scales in first_halves(adapter, ranks):
            down, pointer = _source(halves, None), c_void_p(scales.ctypes.data)
            set_down = self._c.trimode_adapter_set_down
            _check_memory(set_down(self._model, packed, layer, number, byref(down[0]), pointer))
        if masks is not None:
            plain = masks.detach().float().contiguous()
            pointer = c_void_p(plain.data_ptr())
            _check_memory(self._c.trimode_adapter_set_masks(packed, pointer, *plain.shape))
        self._adapters[adapter] = packed
        return packed


_networks: WeakSet[NativeNetwork] = WeakSet()


def _forked() -> None:
    """In a child: another thread of the parent may have been in a forward."""
    for network in _networks:
        network.is_forked()


os.register_at_fork(after_in_child=_forked)


def _freed_with(owner: object, free: Any, handle: c_void_p) -> None:
    """Not at exit, when a daemon thread may still be in a forward."""
    finalize(owner, free, handle).atexit = False


def _empty(*shape: int) -> Tensor:
    """Float32 on the CPU, whatever torch's defaults are."""
    return torch.empty(*shape, dtype=torch.float32, device="cpu")


def _check(what: str, numbers: np.ndarray, stop: int | None) -> None:
    """C++ checks nothing.

    Raises:
        IndexError: one is below 0, or not below `stop`.
    """
    if not numbers.size:
        return
    least, most = int(numbers.min()), int(numbers.max())
    if least < 0 or (stop is not None and most >= stop):
        wrong = least if least < 0 else most
        raise IndexError(f"{what} {wrong}; allowed: 0 to {'...' if stop is None else stop - 1}")


def _made_again(
    config: TriModeConfig,
    dtype: torch.dtype,
    rotary: Rotary,
    weights: dict[tuple[int, str], Tensor],
    small: dict[tuple[int, str], Tensor],
    kept: dict[str, Any],
) -> NativeNetwork:
    """The network that was pickled."""
    library = load()
    if library is None:
        raise ConfigError(
            "a model with packed weights was pickled, and there is no native step here"
        )
    network = NativeNetwork(library, config, dtype=dtype, rotary=rotary)
    for (layer, name), weight in small.items():
        if name in NORMS or not name:
            network.set_norm(layer, name, weight)
    for (layer, target), weight in weights.items():
        network.set(layer, target, weight, small.get((layer, target)) if target else None)
    if "embedding" in kept:
        network.set_embedding(kept["embedding"])
    return network


def _check_memory(is_done: object) -> None:
    if not is_done:
        raise CapacityError("the packed adapter does not fit into memory")


def _source(weight: Tensor, bias: Tensor | None) -> tuple[_Source, tuple[Tensor, ...]]:
    """A weight as C++ takes it, and what must live as long."""
    plain = weight.detach()
    if plain.dtype not in FORMS:
        plain = plain.float()
    plain = plain.contiguous()
    bias = None if bias is None else bias.detach().float().contiguous()
    pointer = None if bias is None else bias.data_ptr()
    source = _Source(plain.data_ptr(), FORMS[plain.dtype], *plain.shape, pointer)
    return source, (plain,) if bias is None else (plain, bias)
