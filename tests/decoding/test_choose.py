"""The law of a choice: AR with fresh seeds follows the enumerated law, filters as their twin."""

from __future__ import annotations

import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy import stats

from tests.reference import next_logits
from trimode.decoding import GenerationParams
from trimode.decoding.bits import packed
from trimode.decoding.choice import Choice
from trimode.decoding.choose import choose, filter_logits
from trimode.decoding.law import RowLaw
from trimode.engine import Engine
from trimode.engine.engine import cells_needed
from trimode.model import DrafterAdapter, TriModeModel
from trimode.runtime import TriModeLM

TINY = {"vocab_size": 8, "mask_token_id": 7, "eos_token_id": 6, "bos_token_id": 5}
PROMPT = [1, 2, 3]
NUM_SEEDS = 4000
LAW: dict[str, Any] = {"temperature": 1.3, "top_k": 5, "top_p": 0.9}


def slow_law(
    logits: list[float],
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None = None,
) -> list[float]:
    """The probabilities after temperature, min-p, top-k and top-p, one token at a time."""
    top = max(logits)
    weights = [math.exp((x - top) / temperature) for x in logits]
    ranked = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    ranked = [i for i in ranked if weights[i] >= (min_p or 0.0)]  # the likeliest has 1
    ranked = ranked[: top_k or len(ranked)]
    total = sum(weights[i] for i in ranked)
    kept: list[int] = []
    for i in ranked:
        if top_p is not None and sum(weights[j] for j in kept) / total >= top_p:
            break
        kept.append(i)
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(weights))]


def enumerated_law(
    model: TriModeModel, *, num_tokens: int = 2, **law: Any
) -> dict[tuple[int, ...], float]:
    """Probability of every continuation of some tokens."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(num_tokens):
        longer = {}
        for text, chance in found.items():
            following = slow_law(next_logits(model, [*PROMPT, *text])[-1].tolist(), **law)
            longer |= {(*text, i): chance * p for i, p in enumerate(following) if p > 0}
        found = longer
    return found


def p_value(
    model: TriModeModel,
    *,
    mode: str = "ar",
    num_tokens: int = 2,
    block_length: int = 2,
    adapter: DrafterAdapter | None = None,
    num_seeds: int = NUM_SEEDS,
    **law: Any,
) -> float:
    """Chi-square of continuations of some tokens, a fresh seed each; 0 if one is impossible."""
    lm = TriModeLM(model, None)
    params = {
        "mode": mode,
        "max_new_tokens": num_tokens,
        "block_length": block_length,
        "ignore_eos": True,
        **law,
    }
    sequences = [
        lm.sequence(PROMPT, GenerationParams(seed=seed, **params)) for seed in range(num_seeds)
    ]
    engine = Engine(model, num_rows=200, num_cells=cells_needed(sequences[0]), adapter=adapter)
    for seq in sequences:
        engine.submit(seq)
    while not engine.is_idle:
        engine.step()
    if mode != "ar":
        assert sum(length > 1 for seq in sequences for length in seq.stats.acceptance_lengths) > 100
    counts = Counter(tuple(seq.new_ids) for seq in sequences)
    expected = enumerated_law(model, num_tokens=num_tokens, **law)
    if not counts.keys() <= expected.keys():
        return 0.0
    cells, rare = [], [0.0, 0.0]
    for text, probability in expected.items():
        cell = [float(counts[text]), probability * num_seeds]
        if cell[1] >= 5:
            cells.append(cell)
        else:
            rare = [rare[0] + cell[0], rare[1] + cell[1]]
    if rare[1] > 0:
        cells.append(rare)
    assert len(cells) > 5, "the law is too narrow to test anything"
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    return float(stats.chi2.sf(statistic, len(cells) - 1))


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., TriModeModel]) -> TriModeModel:
    return tiny_model(torch.float64, initializer_range=0.2, **TINY)


@pytest.mark.parametrize(
    "law",
    [
        {"temperature": 1.0, "top_k": None, "top_p": None},
        {"temperature": 0.7, "top_k": 4, "top_p": None},
        LAW,
        {"temperature": 1.4, "top_k": None, "top_p": None, "min_p": 0.2},
        {"temperature": 1.4, "top_k": 6, "top_p": 0.8, "min_p": 0.1},
    ],
    ids=str,
)
def test_ar_follows_the_enumerated_law(model: TriModeModel, law: dict[str, Any]) -> None:
    """Prevents: sampling from another law than the one asked for."""
    assert p_value(model, **law) > 1e-3


@pytest.mark.parametrize("mode", ["linear", "branching", "quadratic"])
def test_speculation_follows_the_enumerated_law(
    model: TriModeModel, random_adapter: Callable[..., DrafterAdapter], mode: str
) -> None:
    """Prevents: a law bent by which drafts are accepted, with a drafter that disagrees."""
    adapter = random_adapter(model, strength=2.0)
    run = {"mode": mode, "num_tokens": 3, "block_length": 4, "num_seeds": 2000}
    assert p_value(model, adapter=adapter, **run, **LAW) > 1e-3


@pytest.mark.parametrize(
    ("name", "replacement"),
    [
        ("noise_key", lambda real: lambda seed, position: real(seed, 0)),
        ("noise_key", lambda real: lambda seed, position: real(0, position)),
        # A filter after the noise keeps the winner, whatever it is: it filters nothing.
        ("filter_logits", lambda real: lambda logits, **_: logits),
        ("noisy_argmax", lambda real: lambda scores, keys: real(scores / 0.8, keys)),
    ],
    ids=["noise reused", "seed ignored", "filter after noise", "noise too small"],
)
def test_the_test_of_the_law_catches_mutants(
    model: TriModeModel, monkeypatch: pytest.MonkeyPatch, name: str, replacement: Any
) -> None:
    """Prevents: a chi-square test that would pass whatever is sampled."""
    module = sys.modules["trimode.decoding.choose"]
    monkeypatch.setattr(module, name, replacement(getattr(module, name)))
    assert p_value(model, **LAW) < 1e-6


TIED = [0.0, 1.0, 1.0, -2.0, 1.0, 0.5, 0.5, -9.0]


@pytest.mark.parametrize("top_k", [None, 1, 2, 3, 5, 8, 100])
@pytest.mark.parametrize("top_p", [None, 1.0, 0.95, 0.5, 1e-9])
def test_filter_agrees_with_its_slow_twin(top_k: int | None, top_p: float | None) -> None:
    """Prevents: an off-by-one at the edge of a filter, or ties that all stay or fall by chance."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(6, 8, generator=generator, dtype=torch.float64) * 2
    logits[0] = torch.tensor(TIED)
    logits[1, 7] = -torch.inf
    for min_p in (None, 0.02, 0.3, 1.0):
        found = filter_logits(logits, min_p=[min_p] * 6, top_k=[top_k] * 6, top_p=[top_p] * 6)
        for row, kept in zip(logits.tolist(), found.softmax(-1).tolist(), strict=True):
            law = {"temperature": 1, "min_p": min_p, "top_k": top_k, "top_p": top_p}
            assert kept == pytest.approx(slow_law(row, **law))


def test_min_p_is_before_top_p_and_behind_the_temperature() -> None:
    """Prevents: a share of what min-p drops, or probabilities of another temperature."""
    row = torch.tensor([[0.5, 0.2, 0.12, 0.09, 0.09]], dtype=torch.float64).log()
    found = filter_logits(row, min_p=[0.2], top_k=[None], top_p=[0.85])
    # 0.7 of 0.82 is enough; of 1 it would not be, nor 0.82.
    assert found.isfinite().tolist() == [[True, True, False, False, False]]
    hot = pick(row.expand(400, -1), temperature=3.0, min_p=0.5)
    assert set(hot.token_ids) == {0, 1, 2, 3, 4}  # cube roots: 0.09 is 0.56 of 0.5
    cold = pick(row.expand(400, -1), temperature=1.0, min_p=0.5)
    assert set(cold.token_ids) == {0}


def test_filters_of_one_row_leave_the_others_alone() -> None:
    """Prevents: one request's top_k applied to the whole batch."""
    logits = torch.tensor([TIED] * 3, dtype=torch.float64)
    found = filter_logits(
        logits, min_p=[None, None, 0.5], top_k=[None, 2, None], top_p=[None, None, 0.3]
    )
    assert found[0].tolist() == TIED
    assert found[1].isfinite().nonzero()[:, 0].tolist() == [1, 2]
    assert found[2].isfinite().nonzero()[:, 0].tolist() == [1, 2]


def pick(logits: torch.Tensor, *, banned: list[int] = (), **law: Any) -> Choice:
    num_wanted = len(logits)
    params = [
        GenerationParams(mode="ar", max_new_tokens=1, block_length=2, seed=s, **law)
        for s in range(num_wanted)
    ]
    return choose(
        logits.clone(),
        params=params,
        positions=range(num_wanted),
        banned=torch.tensor(banned, dtype=torch.int64),
        wants_confidence=True,
    )


@pytest.mark.parametrize(
    "law", [{}, {"temperature": 5.0}, {"temperature": 2.0, "top_k": 8, "top_p": 1.0}], ids=str
)
def test_banned_ids_are_never_chosen(law: dict[str, Any]) -> None:
    """Prevents: the mask token, or a padded row, in the text."""
    logits = torch.tensor([[9.0, 0, 0, 0, 0, 0, 0, 9.0]], dtype=torch.float64).expand(500, 8)
    assert set(pick(logits, banned=[0, 7], **law).token_ids) <= set(range(1, 7))


@pytest.mark.parametrize("law", [{}, {"temperature": 3.0, "top_k": 2}], ids=str)
def test_confidence_is_the_plain_probability_after_the_ban(law: dict[str, Any]) -> None:
    """Prevents: confidence that moves with temperature or filters, or that counts banned ids."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(20, 8, generator=generator, dtype=torch.float64)
    choice = pick(logits, banned=[7], **law)
    for row, token_id, confidence in zip(
        logits.tolist(), choice.token_ids, choice.confidences, strict=True
    ):
        total = sum(math.exp(x) for x in row[:7])
        assert confidence == pytest.approx(math.exp(row[token_id]) / total, rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("law", [{}, {"temperature": 1.0, "top_p": 0.9}], ids=str)
def test_a_bad_row_is_flagged_and_alone(bad: float, law: dict[str, Any]) -> None:
    """Prevents: a token chosen from NaN, and one bad row spoiling the choices beside it."""
    logits = torch.tensor([TIED] * 3, dtype=torch.float64)
    good = pick(logits, **law)
    logits[1, 4] = bad
    found = pick(logits, **law)
    assert found.is_finite == [True, False, True]
    assert [found.token_ids[i] for i in (0, 2)] == [good.token_ids[i] for i in (0, 2)]


@pytest.mark.parametrize("mode", ["ar", "linear", "diffusion"])
def test_a_nan_sequence_is_aborted_and_its_row_scrubbed(
    tiny_model: Callable[..., TriModeModel], mode: str
) -> None:
    """Prevents: NaN K/V left in a row, which masked attention then multiplies by zero into NaN for
    whoever gets the row next; and one bad request ending the others."""
    model = tiny_model(torch.float64)
    lm = TriModeLM(model, None)
    poison = 200

    def sequences() -> list[Any]:
        params = GenerationParams(
            mode=mode, max_new_tokens=8, block_length=4, seed=1, temperature=0.0, ignore_eos=True
        )
        # Poison far behind the text of the row's next owner, which would else write over it.
        prompts = [[1, 2, 3], [4] * 19 + [poison], [5, 6], [7]]
        return [lm.sequence(prompt, params) for prompt in prompts]

    def run(engine: Engine, seqs: list[Any]) -> None:
        for seq in seqs:
            engine.submit(seq)
        while not engine.is_idle:
            engine.step()

    expected = sequences()
    for seq in expected:
        run(Engine(model, num_rows=1, num_cells=32), [seq])
    assert not any(poison in expected[i].new_ids for i in (0, 2, 3))

    def plant(_module: Any, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return output.masked_fill((args[0] == poison)[..., None], math.nan)

    hook = model.encoder.embed_tokens.register_forward_hook(plant)
    try:
        engine = Engine(model, num_rows=2, num_cells=32)
        found = sequences()
        run(engine, found)
    finally:
        hook.remove()
    assert [seq.finish_reason for seq in found] == ["length", "abort", "length", "length"]
    for i in (0, 2, 3):
        assert found[i].new_ids == expected[i].new_ids
    assert found[1].new_ids == []
    cache = engine._runner._cache
    assert bool(cache.keys.isfinite().all())
    assert bool(cache.values.isfinite().all())


def test_all_pairs_of_the_plain_law_sum_to_one(model: TriModeModel) -> None:
    """Prevents: an enumeration that misses outcomes, which would hide them from the chi-square."""
    law = enumerated_law(model, **LAW)
    assert sum(law.values()) == pytest.approx(1)
    assert law.keys() < set(itertools.product(range(7), repeat=2))


@pytest.mark.parametrize(
    "law", [{"temperature": 0.0}, {"temperature": 1.3}, LAW, {"temperature": 1.0, "top_k": 1}]
)
def test_the_runner_up_is_the_choice_once_the_first_is_banned(law: dict[str, Any]) -> None:
    """Prevents: a second choice under other noise, or of another row of a mixed batch."""
    torch.manual_seed(0)
    logits = torch.randn(40, 8, dtype=torch.float64) * 2
    options = {"mode": "ar", "max_new_tokens": 1, "block_length": 4, "seed": 5}
    params = [GenerationParams(**options, **(law if w % 3 else {})) for w in range(40)]
    banned, positions = torch.tensor([7]), list(range(40))

    def run(some: torch.Tensor, *, wants_runner_up: bool) -> Choice:
        return choose(
            some.clone(),
            params=params,
            positions=positions,
            banned=banned,
            wants_confidence=True,
            wants_runner_up=wants_runner_up,
        )

    found, plain = run(logits, wants_runner_up=True), run(logits, wants_runner_up=False)
    assert (found.token_ids, found.confidences) == (plain.token_ids, plain.confidences)
    assert plain.runner_ups == []
    probabilities = logits[:, :7].softmax(-1)
    for w, second in enumerate(found.runner_ups):
        if found.runner_up_confidences[w] == 0:  # the filters have left one token
            assert params[w].top_k
            continue
        assert second != found.token_ids[w]
        assert found.runner_up_confidences[w] == pytest.approx(float(probabilities[w, second]))
        if not params[w].top_p:  # a ban changes what top-p keeps
            without = logits.clone()
            without[w, found.token_ids[w]] = -torch.inf
            assert run(without, wants_runner_up=False).token_ids[w] == second
    assert any(found.runner_up_confidences)


@pytest.mark.parametrize("law", [{"temperature": 0.0}, {"temperature": 1.3}, LAW], ids=str)
def test_a_law_comes_before_temperature_and_filters_and_leaves_confidences(
    law: dict[str, Any],
) -> None:
    """Prevents: top-k filled with tokens that are not allowed; a confidence of the narrowed law,
    which is 1 wherever one token is left; one row's law on its neighbours."""
    logits = torch.randn(30, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 2
    allowed = torch.tensor([True, False, True, True, False, False, True, True])
    laws = [
        RowLaw(allowed=packed(allowed), bias={2: 1.5, 1: 99.0}) if w % 2 else None
        for w in range(30)
    ]
    narrowed = logits.clone()
    narrowed[1::2, 2] += 1.5
    narrowed[1::2, ~allowed] = -torch.inf
    options = {"mode": "ar", "max_new_tokens": 1, "block_length": 2}
    given: dict[str, Any] = {
        "params": [GenerationParams(**options, seed=s, **law) for s in range(30)],
        "positions": range(30),
        "banned": torch.tensor([7]),
        "wants_runner_up": True,
        "wants_confidence": True,
        "wants_entropy": True,
    }
    found = choose(logits.clone(), laws=laws, **given)
    expected = choose(narrowed, **given)
    plain = choose(logits.clone(), **given)
    assert found.token_ids == expected.token_ids
    sure = [w for w in range(30) if found.runner_up_confidences[w]]
    assert [found.runner_ups[w] for w in sure] == [expected.runner_ups[w] for w in sure]
    assert found.entropies == plain.entropies
    probabilities = logits[:, :7].softmax(-1)
    for w, token_id in enumerate(found.token_ids):
        assert found.confidences[w] == pytest.approx(float(probabilities[w, token_id]))
    assert found.token_ids[::2] == plain.token_ids[::2]
    assert found.token_ids != plain.token_ids


def test_a_law_that_leaves_nothing_is_flagged_and_alone() -> None:
    """Prevents: a token that nobody allowed, and a NaN hidden behind a law."""
    logits = torch.zeros(4, 8, dtype=torch.float64)
    logits[2, 5] = math.nan
    only = {i: packed(torch.arange(8) == i) for i in (3, 7)}
    laws = [RowLaw(allowed=only[7]), RowLaw(allowed=only[3]), RowLaw(allowed=only[3]), None]
    options = {"mode": "ar", "max_new_tokens": 1, "block_length": 2, "seed": 0}
    found = choose(
        logits,
        params=[GenerationParams(**options)] * 4,
        positions=range(4),
        banned=torch.tensor([7]),
        laws=laws,
    )
    assert found.is_finite == [False, True, False, True]
    assert found.token_ids[1] == 3
