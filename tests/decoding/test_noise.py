"""The noise: the right distribution, no pattern, and the same bits for ever."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

from trimode.decoding import noise
from trimode.decoding.noise import _log, gumbel, noise_key, noisy_argmax, random_words

EULER = 0.5772156649015329


def draws(pairs: list[tuple[int, int]], num_tokens: int) -> torch.Tensor:
    return gumbel(torch.tensor([noise_key(*pair) for pair in pairs]), num_tokens)


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_noise_is_standard_gumbel(seed: int) -> None:
    """Prevents: noise of the wrong shape or scale, which samples another law."""
    sample = draws([(seed, p) for p in range(50)], 2000).flatten()
    assert stats.kstest(torch.exp(-torch.exp(-sample)).numpy(), "uniform").pvalue > 1e-3
    assert float(sample.mean()) == pytest.approx(EULER, abs=0.02)
    assert float(sample.var()) == pytest.approx(math.pi**2 / 6, abs=0.05)


def test_every_bit_of_the_words_is_fair() -> None:
    """Prevents: a sign-extending shift, which leaves the high bits stuck together."""
    words = random_words(torch.tensor([noise_key(5, 3)]), 40_000)[0]
    for bit in range(64):
        assert float(((words >> bit) & 1).double().mean()) == pytest.approx(0.5, abs=0.015)


@pytest.mark.parametrize("base", [0, 12345, 2**63 - 2, 2**64 - 5])
def test_neighbours_are_independent(base: int) -> None:
    """Prevents: neighbouring seeds, positions or tokens sharing noise, as a counter that is only
    added up would have it."""
    num_tokens = 20_000
    by_seed = draws([(base + i, 7) for i in range(5)], num_tokens)
    by_position = draws([(base, 100 + i) for i in range(5)], num_tokens)
    diagonal = draws([(base + i, 20 - i) for i in range(5)], num_tokens)
    line = draws([(base, 0)], num_tokens)
    by_token = torch.stack([line[0].roll(-i) for i in range(5)])
    for rows in (by_seed, by_position, diagonal, by_token):
        off_diagonal = torch.corrcoef(rows) - torch.eye(5)
        assert float(off_diagonal.abs().max()) < 5 / num_tokens**0.5


def test_keys_are_distinct_and_fit_int64() -> None:
    """Prevents: an overflow for large seeds, and two seeds or positions that share their noise."""
    seeds = [*range(100), 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1]
    keys = [noise_key(seed, position) for seed in seeds for position in range(200)]
    assert len(set(keys)) == len(keys)
    assert torch.tensor(keys).dtype == torch.int64


def test_the_stream_of_state_zero_is_splitmix64() -> None:
    """Prevents: a wrong constant. The words are the published first outputs for state 0."""
    words = [word % 2**64 for word in random_words(torch.tensor([0]), 3)[0].tolist()]
    assert words == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_bits_never_change() -> None:
    """Prevents: a seed giving another text in a later version or on another machine."""
    pairs = [(0, 0), (0, 1), (1, 0), (2**64 - 1, 131071)]
    assert [noise_key(*pair) for pair in pairs] == [
        0,
        9206327630398885983,
        -8189629486265940650,
        -3679686716718994334,
    ]
    assert [[x.hex() for x in row] for row in draws(pairs, 3).tolist()] == [
        ["0x1.0b1db190387fbp+1", "0x1.640b82427af2bp-3", "-0x1.4a43538869317p+0"],
        ["0x1.a37deca80be3fp+0", "0x1.43a4d6338351cp-7", "0x1.5768be657bc96p+1"],
        ["-0x1.1b03c05affb29p+0", "0x1.8b07a6520aae3p+0", "0x1.d82f22e3fd75bp+0"],
        ["-0x1.60bcd470b2408p-2", "0x1.75fd11a06e80ap+1", "0x1.c2ae29138f4e5p+1"],
    ]


def test_noise_of_a_token_does_not_depend_on_the_vocabulary_or_the_batch() -> None:
    """Prevents: a padded vocabulary or another row changing what a seed gives."""
    pairs = [(3, 1), (4, 1)]
    assert torch.equal(draws(pairs, 100)[1, :10], draws(pairs[1:], 10)[0])


@pytest.mark.parametrize("word", [0, -1, 2**63 - 1, -(2**63), 1 << 12, (1 << 12) - 1])
def test_extreme_words_give_finite_noise(word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: an infinity or a NaN once in 2**52 draws."""
    monkeypatch.setattr("trimode.decoding.noise.random_words", lambda *_: torch.tensor([[word]]))
    [[value]] = gumbel(torch.tensor([0]), 1).tolist()
    assert math.isfinite(value)
    assert -3.7 < value < 36.8


def test_log_is_accurate() -> None:
    """Prevents: a table or an exponent off by one; extremes of what `gumbel` feeds included."""
    generator = torch.Generator().manual_seed(0)
    anywhere = torch.exp(torch.randn(20_000, generator=generator, dtype=torch.float64) * 20)
    near_one = 1 + torch.randn(5000, generator=generator, dtype=torch.float64) * 1e-3
    edges = [1.0, 2.0, 0.5, 2.0**-53, 2.0**53 - 1, 1 - 2.0**-53, 1 + 2.0**-52, 37.0, 1e-300, 1e300]
    x = torch.cat([anywhere, near_one, torch.tensor(edges, dtype=torch.float64)])
    exact = torch.tensor([math.log(v) for v in x.tolist()], dtype=torch.float64)
    # Beside the method's own 1e-12, half a last bit of a large result.
    assert float(((_log(x) - exact).abs() - exact.abs() * 2**-52).max()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 30.0, 1e6])
def test_the_quick_argmax_is_the_exact_one(scale: float, dtype: torch.dtype) -> None:
    """Prevents: the rough logarithm, or a bound on the noise, deciding between close tokens."""
    generator = torch.Generator().manual_seed(3)
    scores = (torch.randn(200, 500, generator=generator) * scale).to(dtype)
    scores[:100, ::3] = -torch.inf
    scores[::2] = scores[::2].round(decimals=1)  # with ties
    keys = torch.tensor([noise_key(seed, 5) for seed in range(200)])
    expected = (scores + gumbel(keys, 500).to(dtype)).argmax(dim=-1)
    assert noisy_argmax(scores, keys).equal(expected)


class _Largest(TorchDispatchMode):
    """Watches how large the tensors are that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            self.sizes.append(found.numel())
        return found


def test_many_rows_are_worked_on_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: 30 GiB of temporaries for the 5,120 answers that 32 branching requests want of a
    vocabulary of 131,072, and other bits where the parts meet."""
    keys = torch.tensor([noise_key(3, position) for position in range(11)])
    whole = gumbel(keys, 100)
    monkeypatch.setattr(noise, "_MOST_AT_ONCE", 400)
    with _Largest() as largest:
        parts = gumbel(keys, 100)
    assert torch.equal(parts, whole)
    assert sum(size > 400 for size in largest.sizes) == 1  # the result
