"""Sets of tokens as packed bits."""

from __future__ import annotations

import pytest
import torch

from trimode.decoding.bits import add_tokens, no_tokens, packed, unpacked


@pytest.mark.parametrize("num_tokens", [1, 8, 31, 32, 33, 259])
def test_a_mask_comes_back(num_tokens: int) -> None:
    """Prevents: bits of another token, or a last word cut off."""
    mask = torch.rand(num_tokens, generator=torch.Generator().manual_seed(num_tokens)) < 0.5
    bits = packed(mask)
    assert len(bits) == len(no_tokens(num_tokens)) == -(-num_tokens // 32)
    assert unpacked(bits, num_tokens).equal(mask)
    for token_id in range(num_tokens):
        assert bool(bits[token_id // 32] >> (token_id % 32) & 1) == bool(mask[token_id])


def test_tokens_are_added() -> None:
    """Prevents: a token that is named twice, or beside another of its word, dropped."""
    bits = no_tokens(70)
    add_tokens(bits, [])
    assert not bits.any()
    add_tokens(bits, [31, 0, 31, 1, 69])
    add_tokens(bits, [1, 64])
    assert unpacked(bits, 70).nonzero()[:, 0].tolist() == [0, 1, 31, 64, 69]
