"""The compiled choice against its twin in torch, and a row's bits whatever is chosen beside it."""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable
from dataclasses import fields
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trimode.decoding import GenerationParams
from trimode.decoding.bits import add_tokens, no_tokens, packed
from trimode.decoding.choice import Choice
from trimode.decoding.choose import choose, choose_by_torch
from trimode.decoding.law import RowLaw, under
from trimode.decoding.native_choice import choose_natively, is_native
from trimode.decoding.noise import gumbel, noise_key
from trimode.engine.correction import Before, choose_in_waves, native_correction, native_corrector
from trimode.model.corrector import Corrector
from trimode.model.native import choice as native

NUM_TOKENS = 9001  # more than two chunks, and a tail of one lane
ALL = native.Readings(confidence=True, runner_up=True, entropy=True, log_prob=True)
NONE = native.Readings()
LAWS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.3, "top_k": 50},
    {"temperature": 0.7, "top_p": 0.95},
    {"temperature": 2.0, "top_p": 0.3},
    {"temperature": 1.0, "top_p": 1e-9},
    {"temperature": 0.7, "top_k": 200, "top_p": 0.9},
    {"temperature": 1e-3, "top_p": 1.0, "top_k": 20_000},
    {"temperature": 0.8, "min_p": 0.05},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 1.2, "min_p": 0.1, "top_k": 30},
    {"temperature": 0.9, "min_p": 0.02, "top_p": 0.7},
    {"temperature": 1.5, "min_p": 0.3, "top_k": 300, "top_p": 0.8},
]


@pytest.fixture(params=["generic", "avx2", "avx512", "avx512_bf16"])
def isa(request: pytest.FixtureRequest) -> str:
    if not native.is_available():
        pytest.skip("the library cannot be built")
    if not native.loaded().c.trimode_kernels(request.param.encode()):
        pytest.skip(f"this CPU lacks {request.param}")
    return str(request.param)


@pytest.fixture(autouse=True)
def _built() -> None:
    if not native.is_available():
        pytest.skip("the library cannot be built")


@pytest.fixture(scope="module")
def pools() -> Callable[[int], ctypes.c_void_p]:
    """`pools(num_threads)`: a pool of threads, made once."""

    @cache
    def make(num_threads: int) -> ctypes.c_void_p:
        return ctypes.c_void_p(native.loaded().c.trimode_threads_new(num_threads))

    return make


def params_of(law: dict[str, Any], seed: int) -> GenerationParams:
    return GenerationParams(mode="ar", max_new_tokens=1, block_length=2, seed=seed, **law)


def random_logits(num_rows: int, *, seed: int, num_tokens: int = NUM_TOKENS) -> Tensor:
    """Flat rows, peaked ones, coarse ones with ties, and all of one value."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, num_tokens, generator=generator)
    logits *= torch.tensor([1.0, 3.0, 10.0, 0.01])[torch.arange(num_rows) % 4, None]
    logits[::5] = (logits[::5] * 4).round() / 4
    logits[7::16] = 0.5
    return logits


def asked(params: list[GenerationParams], **options: Any) -> dict[str, Any]:
    """Arguments that `choose_natively` and its twin share."""
    given: dict[str, Any] = {
        "params": params,
        "positions": range(100, 100 + len(params)),
        "banned": torch.tensor([3, NUM_TOKENS - 1]),
        "readings": NONE,
        "targets": [],
        "laws": [],
        "num_logprobs": [],
        "none_id": None,
    }
    return given | options


def same_readings(found: Choice, expected: Choice, rows: list[int]) -> None:
    for name in ("confidences", "runner_up_confidences", "entropies", "log_probs"):
        left, right = getattr(found, name), getattr(expected, name)
        assert len(left) == len(right)
        for w in rows:
            assert left[w] == pytest.approx(right[w], rel=2e-5, abs=1e-6), name
    for w in rows:
        left, right = found.logprobs[w], expected.logprobs[w]
        assert left.logprob == pytest.approx(right.logprob, rel=1e-5, abs=1e-5)
        values = [[value for _, value in one.top] for one in (left, right)]
        assert values[0] == pytest.approx(values[1], rel=1e-5, abs=1e-5)


def test_structures_are_mirrored() -> None:
    """Prevents: a field that Python and C++ have in different places."""
    sizes = (ctypes.c_int64 * 3)()
    native.loaded().c.trimode_choice_sizes(sizes)
    mirrored = (native.ChoiceRow, native.ChoiceBatch, native.CorrectorView)
    assert list(sizes) == [ctypes.sizeof(one) for one in mirrored]


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_tokens_and_readings_are_the_twin_s(isa: str, law: dict[str, Any]) -> None:
    """Prevents: another token, reading or tie than the law's; noise of other bits. Only where the
    sum of top-p decides, rounding may keep one token more or less."""
    num_rows, seeds = 48, [2**64 - 1, 2**63, *range(46)]
    logits = random_logits(num_rows, seed=len(str(law)))
    given = asked(
        [params_of(law, seed) for seed in seeds],
        readings=ALL,
        targets=[w * 37 for w in range(num_rows)],
        num_logprobs=[w % 6 for w in range(num_rows)],
    )
    expected = choose_by_torch(logits.clone(), **given)
    found = choose_natively(logits.clone(), isa=isa, **given)
    assert found.is_finite == expected.is_finite == [True] * num_rows
    same = [
        w
        for w in range(num_rows)
        if (found.token_ids[w], found.runner_ups[w])
        == (expected.token_ids[w], expected.runner_ups[w])
    ]
    num_edges = 2 if law.get("top_p", 1.0) < 1 else 0
    assert num_rows - len(same) <= num_edges
    same_readings(found, expected, same)
    alone = choose_natively(logits.clone(), isa=isa, **asked(given["params"]))
    assert alone.token_ids == found.token_ids  # with another bound on the noise


def close_calls(base: Tensor, noise: Tensor, lucky: int) -> list[Tensor]:
    """[V] scores with which a token far below the best one wins by a last bit, draws, or loses."""
    best = (base + noise).index_fill(0, torch.tensor([lucky]), -math.inf).max()
    level = best - noise[lucky]
    while level + noise[lucky] >= best:
        level = level.nextafter(torch.tensor(-math.inf))
    rows = []
    for _ in range(4):  # a step of the level may be less than one of the sum
        rows.append(base.index_fill(0, torch.tensor([lucky]), float(level)))
        level = level.nextafter(torch.tensor(math.inf))
    return rows


def chosen_by_noise(calls: list[tuple[list[Tensor], int, int]], isa: str) -> None:
    """Choose from rows, each with its seed and position, and compare with all noise computed."""
    logits = torch.stack([row for rows, _, _ in calls for row in rows])
    seeds, positions = zip(*((s, p) for rows, s, p in calls for _ in rows), strict=True)
    params = [params_of({"temperature": 1.0}, seed) for seed in seeds]
    keys = torch.tensor([noise_key(*pair) for pair in zip(seeds, positions, strict=True)])
    none = torch.tensor([], dtype=torch.int64)
    expected = (logits + gumbel(keys, logits.shape[1]).float()).argmax(dim=-1).tolist()
    found = choose_natively(
        logits, isa=isa, **asked(params, positions=list(positions), banned=none)
    )
    assert found.token_ids == expected
    per_call = [set(expected[i : i + 4]) for i in range(0, len(expected), 4)]
    assert sum(len(winners) == 2 for winners in per_call) > 0.6 * len(per_call)


def test_every_token_can_win_by_its_noise(isa: str) -> None:
    """Prevents: a test of the noise so strict that it loses the winner."""
    generator, calls = torch.Generator().manual_seed(1), []
    for seed in range(40):
        noise = gumbel(torch.tensor([noise_key(seed, 9)]), 50_000)[0].float()
        base = torch.full((50_000,), -60.0)
        first = int(torch.randint(50_000, (1,), generator=generator))
        base[first] = float(torch.randn(1, generator=generator)) * 10
        lucky = int(noise.topk(400).indices[seed * 9])
        calls.append((close_calls(base, noise, lucky), seed, 9))
    chosen_by_noise(calls, isa)


def unmixed(word: int) -> int:
    """The word that the generator's last step makes this one of."""
    for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
        unshifted = word
        for _ in range(64 // shift + 1):
            unshifted = word ^ (unshifted >> shift)
        word = unshifted * pow(factor, -1, 2**64) % 2**64
    return word


def test_the_rarest_noise_wins(isa: str) -> None:
    """Prevents: extreme noise, whose logarithm is rough and which no ordinary draw has, dropped."""
    gamma, calls = 0x9E3779B97F4A7C15, []
    # A key is mixed from a stream of the seed and one of the position; seed -gamma's is 0.
    of_position = unmixed(noise_key(2**64 - gamma, 0) % 2**64)
    for distance in (0, 1, 2**12, 2**20, 2**33, 3 * 2**33, 2**36, 2**38):
        key = (unmixed(2**64 - 1 - distance) - gamma) % 2**64  # under which token 0 draws it
        seed = (unmixed(unmixed(key) ^ of_position) - gamma) % 2**64
        noise = gumbel(torch.tensor([noise_key(seed, 0)]), 64)[0].float()
        assert float(noise[0]) > 16
        calls.append((close_calls(torch.zeros(64), noise.clone(), 0), seed, 0))
    chosen_by_noise(calls, isa)


def mixed_laws(num_rows: int, num_tokens: int = NUM_TOKENS) -> list[RowLaw | None]:
    """Every third row without a law; masks, biases and penalties that share what they can."""
    generator = torch.Generator().manual_seed(8)
    seen, bias = no_tokens(num_tokens), {5: 9.5, 17: -3.0, num_tokens - 2: 8.0}
    add_tokens(seen, range(0, num_tokens, 7))
    counts = np.zeros(num_tokens, dtype=np.int32)
    counts[::5], counts[1], counts[num_tokens - 2] = 1, 4, 7
    laws: list[RowLaw | None] = []
    for w in range(num_rows):
        mask = torch.rand(num_tokens, generator=generator) < (0.001, 0.5, 0.999)[w % 3]
        fed = [1, 1, 7, num_tokens - 2] if w % 5 else []
        laws.append(
            RowLaw(
                allowed=packed(mask) if w % 2 else None,
                bias={**bias, 11: -math.inf} if w % 4 == 1 else bias if w % 4 else {},
                seen=seen if w % 7 else None,
                fed=fed,
                penalty=(1.6, 0.5)[w % 2],
                counts=counts if w % 8 else None,
                counted=[1, 1, 9, num_tokens - 2, num_tokens - 2] if w % 4 < 3 else [],
                frequency=(0.37, -0.9, 0.0)[w % 3],
                presence=(-0.2, 1.1)[w % 2],
            )
            if w % 3
            else None
        )
    return laws


@pytest.mark.parametrize("law", [LAWS[0], LAWS[1], LAWS[7]], ids=str)
def test_laws_are_those_of_under(isa: str, law: dict[str, Any]) -> None:
    """Prevents: bits of another token, a penalty taken twice or before the bias, a law on the
    readings or on the row below."""
    logits = random_logits(42, seed=2)
    laws = mixed_laws(42)
    given = asked([params_of(law, w) for w in range(42)], laws=laws, readings=ALL, targets=[9] * 42)
    given["num_logprobs"] = [2] * 42
    expected = choose_by_torch(logits.clone(), **given)
    found = choose_natively(logits.clone(), isa=isa, **given)
    assert found.token_ids == expected.token_ids
    assert found.runner_ups == expected.runner_ups
    same_readings(found, expected, list(range(42)))
    plain = choose_natively(logits.clone(), isa=isa, **(given | {"laws": []}))
    assert found.token_ids != plain.token_ids
    assert (found.entropies, found.log_probs) == (plain.entropies, plain.log_probs)
    if law["temperature"] == 0:
        logits[:, given["banned"]] = -torch.inf
        assert found.token_ids == under(logits, laws).argmax(-1).tolist()


@pytest.mark.parametrize("num_rows", [1, 6])
def test_logits_may_lie_anywhere(num_rows: int) -> None:
    """Prevents: rows read side by side that lie elsewhere: transposed, or cut out of wider ones."""
    logits = random_logits(num_rows, seed=3)
    given = asked([params_of(LAWS[4], w) for w in range(num_rows)], readings=ALL)
    expected = choose_natively(logits.clone(), **given)
    wider = torch.full((2 * num_rows, NUM_TOKENS + 5), 99.0)
    wider[::2, 2:-3] = logits
    assert choose_natively(wider[::2, 2:-3], **given) == expected
    assert bool((wider[1::2] == 99).all())
    assert choose_natively(logits.T.contiguous().T, **given) == expected


def test_what_cannot_be_chosen_from(isa: str) -> None:
    """Prevents: a NaN that only some lane saw, a token that nobody allowed, one bad row spoiling
    others; and a NaN behind a mask taken for a number."""
    for law in (LAWS[0], LAWS[1], LAWS[5]):
        logits = random_logits(8, seed=4)
        logits[0, 8999] = math.nan
        logits[1, 4096] = math.inf
        logits[2] = -math.inf
        logits[3, 17] = -math.inf  # fine
        only = packed(torch.arange(NUM_TOKENS) == 3)  # which is banned
        laws = [None, None, None, None, RowLaw(allowed=only), RowLaw(allowed=no_tokens(NUM_TOKENS))]
        laws += [RowLaw(allowed=packed(torch.arange(NUM_TOKENS) == 40)), None]
        logits[6, 41] = math.nan
        for none_id in (None, 3):
            given = asked([params_of(law, w) for w in range(8)], laws=laws, none_id=none_id)
            given |= {"readings": ALL, "targets": [0] * 8, "num_logprobs": [1] * 8}
            expected = choose_by_torch(logits.clone(), **given)
            found = choose_natively(logits.clone(), isa=isa, **given)
            assert found.is_finite == expected.is_finite
            assert found.is_finite[3:] == [True, none_id == 3, none_id == 3, False, True]
            good = [w for w in range(8) if found.is_finite[w]]
            for w in good:
                assert found.token_ids[w] == expected.token_ids[w]
                assert found.runner_up_confidences[w] == pytest.approx(
                    expected.runner_up_confidences[w], abs=1e-6
                )
            assert all(0 <= i < NUM_TOKENS for i in found.token_ids)


def rows_of(choice: Choice, rows: list[int]) -> list[tuple[Any, ...]]:
    columns = [getattr(choice, field.name) for field in fields(Choice)]
    return [tuple(column[w] for column in columns if column) for w in rows]


@pytest.mark.parametrize("law", [LAWS[0], LAWS[1], LAWS[4], LAWS[7], LAWS[-1]], ids=str)
def test_a_row_has_the_same_bits_in_any_company(
    isa: str, law: dict[str, Any], pools: Callable[[int], ctypes.c_void_p]
) -> None:
    """Prevents: sums that depend on threads, on the number of rows, or on what a thread did
    before."""
    logits = random_logits(32, seed=6)
    given = asked([params_of(law, w) for w in range(32)], readings=ALL, laws=mixed_laws(32))
    given |= {"targets": [5] * 32, "num_logprobs": [3] * 32}
    per_row = ("params", "positions", "laws", "targets", "num_logprobs")
    expected = rows_of(
        choose_natively(logits.clone(), isa=isa, workers=pools(1), **given), list(range(32))
    )
    for workers in map(pools, (1, 2, 5)):
        together = choose_natively(logits.clone(), isa=isa, workers=workers, **given)
        assert rows_of(together, list(range(32))) == expected
        for some in ([0], [7], [31], [3, 2], [8, 1, 30, 4, 4, 9]):
            part = {name: [given[name][w] for w in some] for name in per_row}
            found = choose_natively(logits[some], isa=isa, workers=workers, **(given | part))
            assert rows_of(found, list(range(len(some)))) == [expected[w] for w in some]


def test_two_engines_share_the_threads(pools: Callable[[int], ctypes.c_void_p]) -> None:
    """Prevents: two callers of one pool at the same time mixing up their chunks."""
    logits = random_logits(6, seed=9)
    given = asked([params_of(LAWS[4], w) for w in range(6)], readings=ALL)
    run = partial(choose_natively, workers=pools(3), **given)
    expected, wrong = run(logits.clone()), []

    def often() -> None:
        for _ in range(40):
            if run(logits.clone()) != expected:
                wrong.append(1)

    callers = [threading.Thread(target=often) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


class Correctable:
    """Twelve answers, of which some wait for others, and what corrects them."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(3)
        draw = partial(torch.randn, generator=generator)
        hidden_size, rank = 70, 9
        matrices = [(draw(rank, hidden_size) * 0.2).to(dtype) for _ in range(3)]
        self.corrector = Corrector(*matrices, num_candidates=16)
        self.embeddings = draw(NUM_TOKENS, hidden_size).to(dtype)
        self.states = draw(12, hidden_size)
        self.logits = draw(12, NUM_TOKENS) * 2
        waiting = [None, 41, 1, 2, 3, None, 5, 6, 7, 0, 9, 40]
        self.before = [
            None if one is None else Before(one) if one > 11 else Before(None, one)
            for one in waiting
        ]

    def by_torch(self, given: dict[str, Any]) -> Choice:
        """Changes `logits`."""

        def choose_rows(logits: Tensor, rows: Any) -> Choice:
            some = {name: [given[name][row] for row in rows] for name in ("params", "positions")}
            return choose_by_torch(logits, **(given | some))

        return choose_in_waves(
            self.logits,
            self.states,
            before=self.before,
            corrector=self.corrector.float(),
            embeddings=self.embeddings.float(),
            banned=given["banned"],
            choose_rows=choose_rows,
        )

    def natively(self, given: dict[str, Any], **how: Any) -> Choice:
        """Changes `logits`."""
        corrector = native_corrector(self.corrector, self.embeddings)
        assert corrector is not None
        correction = native_correction(corrector, self.states, self.before)
        return choose_natively(self.logits, correction=correction, **given, **how)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("law", [LAWS[0], LAWS[4]], ids=str)
def test_corrections_are_those_in_waves(
    isa: str,
    law: dict[str, Any],
    dtype: torch.dtype,
    pools: Callable[[int], ctypes.c_void_p],
) -> None:
    """Prevents: a place that does not wait for the one before it, candidates or embeddings of
    another token, a term added to the wrong place."""
    given = asked([params_of(law, w) for w in range(12)])
    slow, plain = Correctable(dtype), Correctable(dtype)
    with torch.no_grad():
        expected = slow.by_torch(given)
    uncorrected = choose_natively(plain.logits.clone(), isa=isa, **given)
    assert sum(a != b for a, b in zip(expected.token_ids, uncorrected.token_ids, strict=True)) > 4
    for workers in map(pools, (1, 2, 8)):
        quick = Correctable(dtype)
        assert quick.natively(given, isa=isa, workers=workers).token_ids == expected.token_ids
        slow.logits[:, given["banned"]] = -math.inf
        assert torch.allclose(quick.logits, slow.logits, rtol=0, atol=1e-4)
        assert bool(
            (quick.logits != plain.logits)
            .sum(-1)
            .gt(2)
            .eq(torch.tensor([one is not None for one in quick.before]))
            .all()
        )


def test_a_corrected_nan_is_flagged_and_alone(isa: str) -> None:
    """Prevents: an embedding looked up for a token that was never chosen."""
    given = asked([params_of(LAWS[1], w) for w in range(12)], none_id=3)
    bad, good = Correctable(), Correctable()
    bad.logits[2, 77] = math.nan
    bad.states[9] = math.nan
    expected = good.natively(given, isa=isa)
    found = bad.natively(given, isa=isa)
    assert [w for w in range(12) if not found.is_finite[w]] == [2, 9]
    assert all(found.token_ids[w] == expected.token_ids[w] for w in (0, 1, 5, 6, 7, 8, 11))


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: a machine without a compiler on which nothing is chosen, or something else."""
    logits = random_logits(6, seed=1)
    given: dict[str, Any] = {
        "params": [params_of(law, 4) for law in LAWS[:4] + LAWS[:2]],
        "positions": range(6),
        "banned": torch.tensor([3]),
        "wants_confidence": True,
    }
    assert is_native(logits)
    found = choose(logits.clone(), **given)
    monkeypatch.setattr(native, "is_available", lambda: False)
    assert not is_native(logits)
    twin = choose(logits.clone(), **given)
    assert twin.token_ids == found.token_ids
    assert twin.confidences != found.confidences  # other sums: it was the other code


def test_ids_outside_the_vocabulary_are_refused() -> None:
    """Prevents: the library writing where it should not."""
    row = params_of(LAWS[0], 0)
    laws: list[Callable[[], RowLaw]] = [
        lambda: RowLaw(bias={NUM_TOKENS: 1.0}),
        lambda: RowLaw(bias={-1: 1.0}),
        lambda: RowLaw(seen=no_tokens(NUM_TOKENS), fed=[NUM_TOKENS], penalty=2.0),
        lambda: RowLaw(allowed=no_tokens(NUM_TOKENS - 64)),
        lambda: RowLaw(counts=np.zeros(NUM_TOKENS - 1, dtype=np.int32)),
        lambda: RowLaw(counts=np.zeros(NUM_TOKENS, dtype=np.int32), counted=[NUM_TOKENS]),
    ]
    for law in laws:
        with pytest.raises(AssertionError, match="9001"):
            choose_natively(random_logits(1, seed=0), **asked([row], laws=[law()]))
    assert choose_natively(torch.empty(0, 8), **asked([])).token_ids == []
