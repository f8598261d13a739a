"""Sets of tokens as packed bits: small, and what the native step and llguidance work with."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Bits = NDArray[np.uint32]
"""[at least ceil(V / 32)]. Token i has bit i % 32, from the lowest, of word i // 32. Bits behind
the last token may be anything."""


def no_tokens(num_tokens: int) -> Bits:
    """The empty set.

    Args:
        num_tokens: Size of the vocabulary V.
    """
    return np.zeros((num_tokens + 31) // 32, dtype=np.uint32)


def token_set(token_ids: Sequence[int], num_tokens: int) -> Bits:
    """The set of some tokens."""
    bits = no_tokens(num_tokens)
    add_tokens(bits, token_ids)
    return bits


def add_tokens(bits: Bits, token_ids: Sequence[int]) -> None:
    """Add some tokens, in place."""
    ids = np.asarray(token_ids, dtype=np.int64)
    np.bitwise_or.at(bits, ids >> 5, np.uint32(1) << (ids & 31).astype(np.uint32))


def has_others(bits: Bits, token_ids: Collection[int], num_tokens: int) -> bool:
    """Whether a set has tokens beside these.

    Args:
        bits: The set.
        token_ids: Some ids.
        num_tokens: Size of the vocabulary V.
    """
    mask = unpacked(bits, num_tokens)
    mask[list(token_ids)] = False
    return bool(mask.any())


def packed(mask: Tensor) -> Bits:
    """The set of a mask, [V] bool."""
    octets = np.packbits(mask.cpu().numpy(), bitorder="little")
    return np.pad(octets, (0, -len(octets) % 4)).view(np.uint32)


def unpacked(bits: Bits, num_tokens: int) -> Tensor:
    """[V] bool on the CPU."""
    octets = np.unpackbits(bits.view(np.uint8), count=num_tokens, bitorder="little")
    return torch.from_numpy(octets.astype(np.bool_))
