"""Gumbel noise that is a pure function of (seed, position, token id), bit for bit the same on
every device.

Integers come from SplitMix64 (Steele, Lea, Flood 2014: "Fast splittable pseudorandom number
generators") used as a counter-based generator: a (seed, position) pair is hashed into a 64-bit
state on the host, and token v draws the (v+1)-th output from it. Logarithms are taken with a table
and a quadratic, using only exact integer operations and single IEEE additions and multiplications
in float64, because `torch.log` differs between devices in its last bit.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_WORD = 2**64
_TABLE_BITS = 12
_MANTISSA_BITS = 52
_LN2 = math.log(2.0)
_NOISE_RANGE = 41.0
"""No two draws of the noise are farther apart."""

_MOST_AT_ONCE = 2**24
"""Draws that are worked on together; 128 rows of a vocabulary of 131,072."""

_MOST_ROUGH, _ROUGH_ERROR = 20.0, 1e-3
"""Noise up to which torch's own logarithm is trusted, and by how much it is off at most."""


def _signed(word: int) -> int:
    """The int64 that has the bits of an unsigned 64-bit word."""
    return word - _WORD if word >= _WORD // 2 else word


def _mix_int(word: int) -> int:
    word = (word ^ (word >> 30)) * _MIX_1 % _WORD
    word = (word ^ (word >> 27)) * _MIX_2 % _WORD
    return word ^ (word >> 31)


def noise_key(seed: int, position: int) -> int:
    """The generator state for one position of one seed, as a signed 64-bit integer.

    Args:
        seed: 0 .. 2**64 - 1.
        position: Absolute position of the token to be chosen.
    """
    stream = _mix_int((seed + _GAMMA) % _WORD)
    return _signed(_mix_int((stream ^ _mix_int((position + 1) * _GAMMA % _WORD)) % _WORD))


def _shift_right(words: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 words."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def random_words(keys: Tensor, num_tokens: int) -> Tensor:
    """Outputs 1 .. num_tokens of SplitMix64 from each state.

    Args:
        keys: [W] int64, from `noise_key`.
        num_tokens: V.

    Returns:
        [W, V] int64, uniform over all 64-bit words.
    """
    return _mix(keys[:, None] + _steps(num_tokens, keys.device))


def _mix(words: Tensor) -> Tensor:
    """SplitMix64's output for each state."""
    words = (words ^ _shift_right(words, 30)) * _signed(_MIX_1)
    words = (words ^ _shift_right(words, 27)) * _signed(_MIX_2)
    return words ^ _shift_right(words, 31)


def gumbel(keys: Tensor, num_tokens: int) -> Tensor:
    """Standard Gumbel noise: -ln(-ln u) with u uniform in (0, 1).

    Args:
        keys: [W] int64, from `noise_key`.
        num_tokens: V.

    Returns:
        [W, V] float64, finite, within (-3.7, 36.8). No more than `_MOST_AT_ONCE` of it is worked on
        at a time: each number takes several temporary ones.
    """
    num_rows = max(1, _MOST_AT_ONCE // max(num_tokens, 1))
    if len(keys) <= num_rows:
        return _gumbel_of(random_words(keys, num_tokens))
    found = torch.empty(len(keys), num_tokens, dtype=torch.float64, device=keys.device)
    for start in range(0, len(keys), num_rows):
        rows = slice(start, start + num_rows)
        found[rows] = _gumbel_of(random_words(keys[rows], num_tokens))
    return found


def noisy_argmax(scores: Tensor, keys: Tensor) -> Tensor:
    """`(scores + gumbel(keys)).argmax(-1)`, bit for bit, with exact noise for few tokens only.

    Args:
        scores: [W, V] float32 or float64. What cannot be chosen is -inf.
        keys: [W] int64, from `noise_key`.

    Returns:
        [W] int64. Of no meaning for a row with a NaN, or with nothing to choose.
    """
    best_ids = [_noisy_best(*pair) for pair in zip(scores, keys, strict=True)]  # fits the cache
    return torch.stack(best_ids)


def _noisy_best(scores: Tensor, key: Tensor) -> Tensor:
    """The same for one row: scores [V], key []."""
    highest = scores.max()
    if not highest.isfinite():
        return scores.argmax()
    ids = (scores >= highest - _NOISE_RANGE).nonzero()[:, 0]
    scores = scores[ids]
    words = _mix(key + _steps_of(ids))
    exponential = (53 * _LN2 - _odd(words).double().log_()).clamp_(min=2.0**-53)
    noise = exponential.log_().neg_()
    is_extreme = noise > _MOST_ROUGH
    rough = noise.add_(scores)
    best = rough.masked_fill(is_extreme, -torch.inf).max()
    rounding = 8 * torch.finfo(scores.dtype).eps * best.abs()
    may_win = ((rough >= best - (_ROUGH_ERROR + rounding)) | is_extreme).nonzero()[:, 0]
    exact = scores[may_win] + _gumbel_of(words[may_win]).to(scores.dtype)
    return ids[may_win[exact.argmax()]]


def _odd(words: Tensor) -> Tensor:
    """Odd integers below 2**53, which float64 holds exactly."""
    return (_shift_right(words, 12) << 1) | 1


def _gumbel_of(words: Tensor) -> Tensor:
    exponential = -(_log(_odd(words).double()) - 53 * _LN2)
    return -_log(exponential.clamp(min=2.0**-53))


@lru_cache(maxsize=8)
def _steps(num_tokens: int, device: torch.device) -> Tensor:
    return _steps_of(torch.arange(num_tokens, device=device))


def _steps_of(token_ids: Tensor) -> Tensor:
    """How far the state of each token lies behind that of its position."""
    return (token_ids + 1) * _signed(_GAMMA)


@lru_cache(maxsize=8)
def log_table(device: torch.device | None = None) -> Tensor:
    """Interval centres c of [1, 2), 1/c and ln c. Rounded to 2**-44, so that a host's own last bit
    cannot show.

    Args:
        device: None for the CPU.

    Returns:
        [3, 4096] float64, contiguous.
    """
    size = 1 << _TABLE_BITS
    centres = [1 + (i + 0.5) / size for i in range(size)]
    columns = (
        centres,
        [1 / c for c in centres],
        [round(math.log(c) * 2**44) / 2**44 for c in centres],
    )
    return torch.tensor(columns, dtype=torch.float64, device=device)


def _log(x: Tensor) -> Tensor:
    """Natural logarithm of positive normal float64, error below 1e-12, the same bits everywhere."""
    bits = x.view(torch.int64)
    exponent = ((bits >> _MANTISSA_BITS) - 1023).double()
    one = 1023 << _MANTISSA_BITS
    mantissa = ((bits & ((1 << _MANTISSA_BITS) - 1)) | one).view(torch.float64)
    index = (bits >> (_MANTISSA_BITS - _TABLE_BITS)) & ((1 << _TABLE_BITS) - 1)
    centre, inverse, log_centre = log_table(x.device)
    r = (mantissa - centre[index]) * inverse[index]
    return (log_centre[index] + exponent * _LN2) + (r - r * r * 0.5)
