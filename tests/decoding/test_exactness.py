"""The promise of speculation: same seed, same text, whatever the schedule, the drafter, the batch.

All in float64, where rounding cannot move a choice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.reference import greedy_branching
from trimode.decoding import Event, GenerationParams, Sequence, speculation
from trimode.engine import Engine
from trimode.model import AdapterSwitch
from trimode.runtime import Generation, TriModeLM

SMALL = {"vocab_size": 12, "mask_token_id": 11, "eos_token_id": 10, "bos_token_id": 9}
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 1, 2, 0, 3, 3], [9, 2, 2, 7, 1], [0, 8]]
SEEDS = [0, 1, 2**63, 2**64 - 1, 77]
LAWS = [
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"temperature": 1.3},
    {"temperature": 1.3, "top_k": 4},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.3, "top_k": 6, "top_p": 0.9},
]
SCHEDULES: list[dict[str, Any]] = [
    {"block_length": 2},
    {"block_length": 4},
    {"block_length": 8},
    {"block_length": 4, "threshold": 0.3},
    {"block_length": 8, "threshold": 0.3, "steps": 2},
    {"block_length": 4, "steps": 4},
]


@pytest.fixture(scope="module")
def alone(tiny_model: Callable[..., Any]) -> TriModeLM:
    """Drafts with the network itself; its flat law lets the noise decide, so drafts run long."""
    return TriModeLM(tiny_model(torch.float64, initializer_range=0.2, **SMALL), None)


@pytest.fixture(scope="module")
def adapted(alone: TriModeLM, random_adapter: Callable[..., Any]) -> TriModeLM:
    """Drafts with an adapter that disagrees."""
    adapter = random_adapter(alone.model, strength=3.0)
    return TriModeLM(alone.model, None, adapter=adapter)


def generate(lm: TriModeLM, prompts: Any = PROMPTS, **options: Any) -> list[Generation]:
    defaults: dict[str, Any] = {"max_new_tokens": 16, "seed": SEEDS, "ignore_eos": True}
    found = lm.generate(prompts, **(defaults | options))
    return found if isinstance(found, list) else [found]


def texts(generations: list[Generation]) -> list[list[int]]:
    return [generation.token_ids for generation in generations]


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("ignore_eos", [True, False])
def test_linear_writes_what_ar_writes(
    alone: TriModeLM, adapted: TriModeLM, law: dict[str, Any], ignore_eos: bool
) -> None:
    """Prevents: a draft, a schedule or a block length leaking into the text."""
    expected = generate(alone, mode="ar", ignore_eos=ignore_eos, **law)
    for schedule in SCHEDULES if ignore_eos else SCHEDULES[2:3]:
        for lm in (alone, adapted):
            found = generate(lm, mode="linear", ignore_eos=ignore_eos, **law, **schedule)
            assert texts(found) == texts(expected), schedule
            assert [g.finish_reason for g in found] == [g.finish_reason for g in expected]


BRANCHINGS: list[dict[str, Any]] = [
    {"mode": "quadratic", "block_length": 2},
    {"mode": "quadratic", "block_length": 4},
    {"mode": "branching", "block_length": 4},
    {"mode": "branching", "block_length": 4, "branches": 1},
    {"mode": "branching", "block_length": 4, "branches": 7},
    {"mode": "branching", "block_length": 8, "branches": 3, "guesses": False},
    {"mode": "branching", "block_length": 8, "branches": 5, "draft_cutoff": 0.2},
    {"mode": "linear", "block_length": 8, "draft_cutoff": 0.3},
    {"mode": "linear", "block_length": 8, "min_gain": 0.2},
    {"mode": "branching", "block_length": 6, "branches": 6, "min_gain": 0.1},
]


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("ignore_eos", [True, False])
def test_branching_writes_what_ar_writes(
    alone: TriModeLM, adapted: TriModeLM, law: dict[str, Any], ignore_eos: bool
) -> None:
    """Prevents: a draft made for one outcome used for another, a guess committed, groups that see
    or are seen by what they must not."""
    expected = generate(alone, mode="ar", ignore_eos=ignore_eos, **law)
    for options in BRANCHINGS if ignore_eos else BRANCHINGS[2:3]:
        for lm in (alone, adapted):
            found = generate(lm, ignore_eos=ignore_eos, **law, **options)
            assert texts(found) == texts(expected), options
            assert [g.finish_reason for g in found] == [g.finish_reason for g in expected]


@pytest.mark.parametrize(("branches", "guesses"), [(1, True), (2, False), (4, True), (7, True)])
@pytest.mark.parametrize("is_adapted", [False, True])
def test_branching_takes_the_forwards_of_its_slow_twin(
    alone: TriModeLM, adapted: TriModeLM, branches: int, guesses: bool, is_adapted: bool
) -> None:
    """Prevents: groups ranked, fed or picked otherwise than said; drafts that see too little."""
    lm = adapted if is_adapted else alone
    for prompt in PROMPTS:
        [found] = generate(
            lm,
            prompt,
            seed=0,
            mode="branching",
            block_length=4,
            branches=branches,
            guesses=guesses,
            max_new_tokens=20,
        )
        expected = greedy_branching(
            lm.model,
            prompt,
            max_new_tokens=20,
            block_length=4,
            branches=branches,
            has_guesses=guesses,
            adapter=lm.adapter,
        )
        assert found.token_ids == expected.new_ids
        assert found.stats.num_forwards == expected.nfe


def test_quadratic_is_one_forward_a_round(adapted: TriModeLM) -> None:
    """Prevents: a length without a group. Only the first draft has a forward of its own."""
    for prompt in PROMPTS:
        [found] = generate(adapted, prompt, seed=0, mode="quadratic", block_length=4)
        stats = found.stats
        assert stats.forwards["draft"] == 1
        assert stats.forwards["verify"] == len(stats.acceptance_lengths)
        expected = greedy_branching(
            adapted.model,
            prompt,
            max_new_tokens=16,
            block_length=4,
            branches=4,
            has_guesses=False,
            adapter=adapted.adapter,
        )
        assert (found.token_ids, stats.num_forwards) == (expected.new_ids, expected.nfe)
        full = [n for n in stats.acceptance_lengths if n]
        assert stats.tokens_fed["verify"] <= len(full) * 4 * (4 + 1)


@pytest.mark.parametrize("block_length", [2, 4, 8])
def test_every_acceptance_length_happens_and_is_exact(
    alone: TriModeLM, adapted: TriModeLM, block_length: int
) -> None:
    """Prevents: an off-by-one that shows only for a draft wholly wrong or wholly right."""
    lengths = set()
    prompts, seeds = PROMPTS * 4, list(range(20))
    for temperature in (0.7, 1.3):
        options = {"temperature": temperature, "seed": seeds, "max_new_tokens": 24}
        expected = texts(generate(alone, prompts, mode="ar", **options))
        for lm in (alone, adapted):
            found = generate(lm, prompts, mode="linear", block_length=block_length, **options)
            assert texts(found) == expected
            for generation in found:
                assert sum(generation.stats.acceptance_lengths) + 1 == len(generation.token_ids)
                lengths.update(generation.stats.acceptance_lengths)
    assert lengths == set(range(1, block_length + 1))


@pytest.mark.parametrize("mode", ["ar", "linear", "diffusion", "branching", "quadratic"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_does_not_depend_on_its_batch(
    adapted: TriModeLM, mode: str, temperature: float
) -> None:
    """Prevents: padding, cell offsets or noise of one row reaching another."""
    options: dict[str, Any] = {"mode": mode, "temperature": temperature}
    together = generate(adapted, **options)
    for prompt, seed, found in zip(PROMPTS, SEEDS, together, strict=True):
        [single] = generate(adapted, prompt, seed=seed, **options)
        assert single.token_ids == found.token_ids
        assert single.stats.forwards == found.stats.forwards
        assert single.stats.acceptance_lengths == found.stats.acceptance_lengths


def _mixed(lm: TriModeLM) -> list[Sequence]:
    modes = ["ar", "branching", "diffusion", "linear", "quadratic"]
    return [
        lm.sequence(
            prompt,
            GenerationParams(
                mode=mode,
                max_new_tokens=9 + i,
                block_length=3 + i,
                seed=SEEDS[i],
                temperature=0.4 * i,
                top_k=None if i % 2 else 5,
                ignore_eos=True,
            ),
        )
        for i, (mode, prompt) in enumerate(zip(modes, PROMPTS, strict=True))
    ]


def _run(engine: Engine) -> list[Sequence]:
    finished = []
    while not engine.is_idle:
        finished += engine.step()
    return finished


@pytest.mark.parametrize("num_rows", [1, 2, 5])
def test_modes_mix_in_one_engine_and_rows_are_reused(adapted: TriModeLM, num_rows: int) -> None:
    """Prevents: a causal row beside a block row taking its mask or its adapter; stale cells of a
    row's former owner; sequences lost when there are more than rows."""
    expected = []
    for seq in _mixed(adapted):
        _run(adapted.engine([seq]))
        expected.append((seq.new_ids, seq.stats.forwards))
    engine = Engine(adapted.model, num_rows=num_rows, num_cells=128, adapter=adapted.adapter)
    sequences = _mixed(adapted)
    for seq in sequences:
        engine.submit(seq)
    finished = _run(engine)
    assert sorted(map(id, finished)) == sorted(map(id, sequences))
    assert [(seq.new_ids, seq.stats.forwards) for seq in sequences] == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_modes_switched_at_any_round_write_what_ar_writes(
    adapted: TriModeLM, temperature: float
) -> None:
    """Prevents: state that a mode leaves behind, or expects, beyond the length and `last`."""
    options: dict[str, Any] = {"max_new_tokens": 40, "block_length": 4, "ignore_eos": True}
    params = GenerationParams(mode="ar", seed=3, temperature=temperature, **options)
    expected = adapted.sequence(PROMPTS[0], params)
    _run(adapted.engine([expected]))
    for period in (1, 2, 3, 5):
        seq = adapted.sequence(PROMPTS[0], params)
        engine = adapted.engine([seq])
        for step in range(1000):
            if engine.is_idle:
                break
            seq.mode = ("ar", "linear", "branching", "quadratic")[step // period % 4]
            engine.step()
        assert seq.new_ids == expected.new_ids
        assert all(seq.stats.forwards[kind] for kind in ("decode", "draft", "verify"))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_kept_by_one_mode_serves_the_next(adapted: TriModeLM, temperature: float) -> None:
    """Prevents: branching asking a draft that quadratic left for guesses it was made without."""
    options: dict[str, Any] = {"max_new_tokens": 30, "block_length": 4, "ignore_eos": True}
    law = {"seed": 3, "temperature": temperature}
    [expected] = generate(adapted, PROMPTS[0], mode="ar", max_new_tokens=30, **law)
    for modes in (("quadratic", "branching"), ("branching", "linear"), ("linear", "quadratic")):
        seq = adapted.sequence(PROMPTS[0], GenerationParams(mode="branching", **law, **options))
        engine = adapted.engine([seq])
        while not engine.is_idle:
            seq.mode = modes[seq.stats.forwards["verify"] % 2]
            engine.step()
        assert seq.new_ids == expected.token_ids


@pytest.mark.parametrize("mode", ["linear", "branching", "quadratic"])
def test_all_drafts_are_told_alike(adapted: TriModeLM, mode: str) -> None:
    """Prevents: a watcher that must know how a draft was made before it can read the event."""
    events: list[Event] = []
    options: dict[str, Any] = {"max_new_tokens": 30, "block_length": 4, "ignore_eos": True}
    params = GenerationParams(mode=mode, seed=3, **options)
    seq = adapted.sequence(PROMPTS[0], params, on_event=events.append)
    _run(adapted.engine([seq]))
    text = [*PROMPTS[0], *seq.new_ids]
    drafts = [event for event in events if event.kind == "draft"]
    assert len(drafts) > 1 + (mode != "linear") * seq.stats.forwards["draft"]
    for event in drafts:
        assert event.token_ids[0] == text[event.position]
        assert event.is_masked == (False,) * 4
        assert len(event.token_ids) == 4


def test_a_mode_switched_to_is_that_mode(alone: TriModeLM) -> None:
    """The threshold of the mode that a sequence began in, after it has changed."""
    options: dict[str, Any] = {"max_new_tokens": 25, "block_length": 4, "seed": 3}
    params = GenerationParams(mode="ar", ignore_eos=True, **options)
    seq = alone.sequence(PROMPTS[0], params)
    engine = alone.engine([seq])
    seq.mode = "diffusion"
    _run(engine)
    [expected] = generate(alone, PROMPTS[0], mode="diffusion", **options)
    assert seq.new_ids == expected.token_ids
    assert seq.stats.forwards["denoise"] == expected.stats.forwards["denoise"]
    params = GenerationParams(mode="diffusion", ignore_eos=True, **options)
    seq = alone.sequence(PROMPTS[0], params)
    engine = alone.engine([seq])
    seq.mode = "linear"
    _run(engine)
    assert seq.stats.forwards["draft"] <= seq.stats.forwards["verify"]


def test_after_diffusion_the_other_modes_go_on_from_what_it_wrote(adapted: TriModeLM) -> None:
    """Prevents: K/V of a denoising pass being taken for committed K/V of the text."""
    options: dict[str, Any] = {"block_length": 4, "seed": 3, "ignore_eos": True}
    params = GenerationParams(mode="diffusion", max_new_tokens=24, **options)
    seq = adapted.sequence(PROMPTS[0], params)
    engine = adapted.engine([seq])
    while len(seq.new_ids) < 9:
        engine.step()
    seq.mode = "linear"  # from the end of the third block, whose first step already waits
    _run(engine)
    assert seq.stats.forwards["verify"]
    num_diffused = 1 + 3 * 4
    start = PROMPTS[0] + seq.new_ids[:num_diffused]
    [rest] = generate(adapted, start, mode="ar", seed=3, max_new_tokens=24 - num_diffused)
    assert seq.new_ids[num_diffused:] == rest.token_ids


@pytest.mark.parametrize("mode", ["ar", "linear", "diffusion"])
def test_padded_rows_of_the_vocabulary_are_never_chosen(
    tiny_model: Callable[..., Any], mode: str
) -> None:
    """Prevents: ids without a token, from a vocabulary padded to a round number."""
    lm = TriModeLM(tiny_model(torch.float64, initializer_range=0.2, **SMALL), None)
    options: dict[str, Any] = {"mode": mode, "temperature": 1.5, "max_new_tokens": 40}
    assert max(map(max, texts(generate(lm, **options)))) > 7
    lm.model.config.num_valid_tokens = 8
    prompts = [[i for i in prompt if i < 8] for prompt in PROMPTS]
    assert max(map(max, texts(generate(lm, prompts, **options)))) <= 7


def test_the_adapter_changes_drafts_and_not_text(alone: TriModeLM, adapted: TriModeLM) -> None:
    """Prevents: an adapter that is never switched on, or that is on in the verifier too."""
    options: dict[str, Any] = {"mode": "linear", "block_length": 8, "temperature": 1.0}
    without, with_it = generate(alone, **options), generate(adapted, **options)
    assert texts(without) == texts(with_it)
    assert [g.stats.acceptance_lengths for g in without] != [
        g.stats.acceptance_lengths for g in with_it
    ]


def test_accepting_one_token_too_many_is_caught(
    adapted: TriModeLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents: these tests passing whatever is accepted."""

    def take_one_more(agrees: Callable[[Any], bool], pairs: Any) -> Any:
        for pair in pairs:
            yield pair
            if not agrees(pair):
                return

    options: dict[str, Any] = {"temperature": 1.0}
    expected = texts(generate(adapted, mode="ar", **options))
    monkeypatch.setattr(speculation, "takewhile", take_one_more)
    assert texts(generate(adapted, mode="linear", **options)) != expected


def test_an_adapter_left_on_in_verify_is_caught(
    adapted: TriModeLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents: these tests passing with a verifier that is not the AR view."""
    options: dict[str, Any] = {"temperature": 1.0}
    expected = texts(generate(adapted, mode="ar", **options))
    real = AdapterSwitch.of

    def always_on(adapter: Any, is_on: Any, places: Any, *, device: Any) -> Any:
        return real(adapter, [True] * len(is_on), places, device=device)

    monkeypatch.setattr(AdapterSwitch, "of", always_on)
    assert texts(generate(adapted, mode="linear", **options)) != expected
