"""Requests that come and go at any step: the text of each is what it is alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from trimode.decoding import Event, GenerationParams, Sequence
from trimode.decoding.control import Control
from trimode.decoding.gap import Gap
from trimode.decoding.setting import Setting
from trimode.engine import Engine
from trimode.engine.engine import cells_needed
from trimode.engine.rows import Rows, shared_len
from trimode.errors import CapacityError, ConfigError, RequestError
from trimode.runtime import TriModeLM

SYSTEM = list(range(40, 60))
"""What many prompts begin with."""


class AnyPlanner:
    """Picks whatever comes: the text of `auto` must not show it."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)

    def choose(self, seq: Sequence) -> Setting:
        length = self._chance.choice([2, 3, seq.params.block_length])
        num_groups = self._chance.randrange(0, 2 * length)
        return self._chance.choice(
            [
                Setting("ar", length),
                Setting("linear", length),
                Setting("branching", length, num_groups, self._chance.random() < 0.5),
            ]
        )

    def note_forward(self, fed: Any, num_tokens: int, *, drafts: bool) -> None:
        assert num_tokens >= len(fed) >= 1

    def note_seconds(self, seconds: float) -> None:
        assert seconds > 0


@pytest.fixture(scope="module")
def lm(tiny_model: Callable[..., Any], random_adapter: Callable[..., Any]) -> TriModeLM:
    model = tiny_model(torch.float64)
    return TriModeLM(model, None, adapter=random_adapter(model))


def make(lm: TriModeLM, prompt: list[int], **options: Any) -> Sequence:
    values: dict[str, Any] = {"mode": "linear", "max_new_tokens": 10, "block_length": 4, "seed": 0}
    return lm.sequence(prompt, GenerationParams(**(values | {"ignore_eos": True} | options)))


def gap(lm: TriModeLM, prompt: list[int], **options: Any) -> Sequence:
    params = GenerationParams(
        **{"mode": "diffusion", "max_new_tokens": 3, "block_length": 4, "seed": 0, **options}
    )
    found = Gap((7, 8, 9), (1, 3))
    return Sequence(prompt, params, mask_token_id=lm.model.config.mask_token_id, gap=found)


def outcome(seq: Sequence) -> Any:
    return seq.new_ids if seq.gap is None else [one.token_ids for one in seq.gap.candidates]


def engine(lm: TriModeLM, num_rows: int, **options: Any) -> Engine:
    options = {"num_cells": 128, "planner": AnyPlanner(0), **options}
    return Engine(lm.model, num_rows=num_rows, adapter=lm.adapter, **options)


def alone(lm: TriModeLM, seq: Sequence) -> Any:
    one = engine(lm, 1)
    one.submit(seq)
    one.run()
    return outcome(seq)


Maker = Callable[[], Sequence]


@pytest.fixture(scope="module")
def requests(lm: TriModeLM) -> list[tuple[Maker, Any]]:
    """Makers of requests of all kinds, with what each writes alone."""
    modes: list[dict[str, Any]] = [
        {"mode": "ar"},
        {"mode": "linear"},
        {"mode": "linear", "steps": 2, "draft_cutoff": 0.3},
        {"mode": "branching", "branches": 3},
        {"mode": "quadratic"},
        {"mode": "auto", "block_length": 6},
        {"mode": "diffusion", "threshold": 0.3},
        {"mode": "diffusion", "steps": 2},
        {"mode": "diffusion", "steps": 3, "revision": "remdm"},
        {"mode": "diffusion", "revision": "ar_doubt", "doubt": 0.3},
        {"mode": "diffusion", "revision": "joint_threshold"},
        {"mode": "diffusion", "policy": "ar_weighted"},
    ]
    laws: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 20},
    ]
    chance, makers = random.Random(1), []
    for number, mode in enumerate(modes * 3):
        own = [chance.randrange(200) for _ in range(chance.randrange(1, 30))]
        prompt = (SYSTEM if number % 2 else []) + own
        options = {**mode, **laws[number % 3], "seed": number, "max_new_tokens": 4 + number % 17}
        makers.append(lambda prompt=prompt, options=options: make(lm, prompt, **options))
    for number in range(4):
        prompt = SYSTEM[: 5 * number + 1]
        makers.append(lambda prompt=prompt: gap(lm, prompt))
    return [(maker, alone(lm, maker())) for maker in makers]


@pytest.mark.parametrize("token_budget", [16, 40, None])
@pytest.mark.parametrize("time_slice", [1, 5, None])
def test_a_batch_never_changes_a_result(
    lm: TriModeLM,
    requests: list[tuple[Maker, Any]],
    token_budget: int | None,
    time_slice: int | None,
) -> None:
    """Prevents: a text that depends on chunks, on rows taken away and given back, on prefixes that
    others left, or on neighbours."""
    together = engine(lm, 4, token_budget=token_budget, time_slice=time_slice)
    sequences = [maker() for maker, _ in requests]
    for seq in sequences:
        together.submit(seq)
    together.run()
    for seq, (_, expected) in zip(sequences, requests, strict=True):
        assert outcome(seq) == expected, seq.params
    preempted = sum(seq.stats.num_preemptions for seq in sequences)
    assert preempted == together.counts.preemptions
    assert (preempted > 0) == (time_slice is not None)
    assert together.counts.reused_tokens > 0
    assert sum(seq.stats.reused_tokens for seq in sequences) == together.counts.reused_tokens


def test_thirty_two_of_mixed_modes(lm: TriModeLM, requests: list[tuple[Maker, Any]]) -> None:
    """Prevents: a text that is right among four and wrong among 31 others."""
    together = engine(lm, 32, token_budget=128)
    sequences = [maker() for maker, _ in requests[:32]]
    for seq in sequences:
        together.submit(seq)
    together.run()
    for seq, (_, expected) in zip(sequences, requests, strict=False):
        assert outcome(seq) == expected, seq.params


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_arrivals_aborts_and_deadlines(
    lm: TriModeLM, requests: list[tuple[Maker, Any]], seed: int
) -> None:
    """Prevents: over a thousand steps, a row or a request lost, a row of two owners, a request that
    waits for good, or a text that shows what happened beside it."""
    chance, now, num_rows = random.Random(seed), 0.0, 5
    some = engine(
        *(lm, num_rows),
        token_budget=24,
        max_waiting=12,
        time_slice=6,
        clock=lambda: now,
        planner=AnyPlanner(seed),
    )
    live: dict[Sequence, Any] = {}
    num_ended = num_refused = 0
    came: dict[Sequence, float] = {}
    while now < 1000 or live:
        now += 1
        if now < 1000 and chance.random() < 0.35:
            maker, expected = chance.choice(requests)
            seq = maker()
            timeout_s = chance.choice([None, None, None, float(chance.randrange(1, 60))])
            try:
                some.submit(seq, client=chance.choice("abc"), timeout_s=timeout_s)
                live[seq], came[seq] = expected, now
            except CapacityError as error:
                num_refused += (error.retry_after_s or 0) > 0
        if live and chance.random() < 0.05:
            victim = chance.choice(list(live))
            some.abort(victim)
            assert (victim.finish_reason, victim.abort_reason) == ("abort", "cancelled")
            assert victim.gap is not None or victim.new_ids == live[victim][: len(victim.new_ids)]
            del live[victim]
        for seq in some.step():
            expected = live.pop(seq)
            num_ended += 1
            if seq.finish_reason == "abort":
                assert seq.abort_reason == "deadline"
                assert seq.gap is not None or seq.new_ids == expected[: len(seq.new_ids)]
            else:
                assert outcome(seq) == expected
        check_rows(some, live)
        assert all(now - came[seq] < 500 for seq in live)
    assert some.is_idle
    assert num_ended > 100
    assert num_refused > 0
    assert some.counts.preemptions > 0
    assert some.counts.reused_tokens > 0
    assert some.num_waiting == some.num_running == 0


def check_rows(some: Engine, live: dict[Sequence, Any]) -> None:
    """Every live sequence waits or owns one row; no row has two owners; none is lost."""
    owners = [row.owner for row in some._rows._rows if row.owner is not None]
    running = [one.seq for one in some._running]
    assert len(owners) == len({id(owner) for owner in owners}) == len(running)
    assert {id(owner) for owner in owners} == {id(seq) for seq in running}
    assert all(some._rows._rows[one.row].owner is one.seq for one in some._running)
    assert some._rows.num_free == some.num_rows - len(running)
    waiting = [entry.seq for entry in some._waiting]
    assert {id(seq) for seq in waiting + running} == {id(seq) for seq in live}
    assert len(waiting + running) == len(live)


def test_a_long_prompt_holds_nobody_up(lm: TriModeLM) -> None:
    """Prevents: forwards beyond the budget; a text that stands still while a prompt is fed."""
    some = engine(lm, 2, token_budget=16)
    short, long = make(lm, [1, 2], mode="ar", max_new_tokens=20), make(lm, [3] * 90, mode="ar")
    some.submit(short)
    some.step()
    some.submit(long)
    while not long.new_ids:
        num_new, num_fed = len(short.new_ids), some.counts.tokens_fed
        some.step()
        assert len(short.new_ids) == num_new + 1
        assert some.counts.tokens_fed - num_fed <= 16
    assert long.stats.forwards["prefill"] == 6
    assert long.stats.tokens_fed["prefill"] == 90


def test_a_shared_prompt_is_fed_once(lm: TriModeLM) -> None:
    """Prevents: a prefix fed again that lies in a free row, or in one that is in use."""
    some = engine(lm, 3)
    first = make(lm, [*SYSTEM, 1, 2], mode="ar", max_new_tokens=20)
    expected = [alone(lm, make(lm, [*SYSTEM, n], mode="ar")) for n in (3, 4)]
    some.submit(first)
    some.step()
    beside = make(lm, [*SYSTEM, 3], mode="ar")
    some.submit(beside)
    some.run()
    after = make(lm, [*SYSTEM, 4], mode="ar")
    some.submit(after)
    some.run()
    assert [seq.stats.tokens_fed["prefill"] for seq in (first, beside, after)] == [22, 1, 1]
    assert [seq.stats.reused_tokens for seq in (first, beside, after)] == [0, 20, 20]
    assert [beside.new_ids, after.new_ids] == expected


def test_the_whole_conversation_is_reused(lm: TriModeLM) -> None:
    """Prevents: an answer's K/V thrown away before the next message of the same conversation."""
    some = engine(lm, 2)
    first = make(lm, [1, 2, 3], mode="linear", max_new_tokens=20)
    some.submit(first)
    some.run()
    following = make(lm, [1, 2, 3, *first.new_ids, 9, 9], mode="linear")
    expected = alone(lm, make(lm, following.prompt_ids, mode="linear"))
    some.submit(following)
    some.run()
    assert following.stats.reused_tokens >= 3 + 19
    assert following.new_ids == expected


def test_a_poisoned_row_is_no_prefix(lm: TriModeLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: K/V that were scrubbed after a NaN taken for the prefix of another."""
    some = engine(lm, 1)
    first = make(lm, [*SYSTEM, 1])
    some.submit(first)
    some.step()
    monkeypatch.setattr(some._runner, "run", lambda feeds: [None] * len(feeds))
    assert some.step() == [first]
    assert first.abort_reason == "non_finite"
    monkeypatch.undo()
    second = make(lm, [*SYSTEM, 1])
    some.submit(second)
    some.run()
    assert second.stats.reused_tokens == 0


def test_rows_that_are_empty_go_first(lm: TriModeLM) -> None:
    """Prevents: a prefix overwritten while rows without one are free."""
    copies: list[tuple[int, int, int]] = []
    rows = Rows(3, copy_prefix=lambda *copy: copies.append(copy))
    first = make(lm, list(range(30)))
    assert rows.take(first, first.prompt_ids) == 0
    first.length = 30
    rows.give_back(0)
    second = make(lm, list(range(100, 130)))
    assert rows.take(second, second.prompt_ids) == 1
    third = make(lm, [*range(10), 99, 99])
    assert rows.take(third, third.prompt_ids) == 2
    assert copies == [(0, 2, 10)]
    fourth = make(lm, [*range(30), 99])
    assert rows.take(fourth, fourth.prompt_ids) == 0
    assert (third.length, fourth.length) == (10, 30)
    assert copies == [(0, 2, 10)]
    assert rows.num_free == 0


def test_shared_len() -> None:
    """Prevents: a prefix one token too long or too short."""
    chance = random.Random(0)
    for _ in range(300):
        first = [chance.randrange(2) for _ in range(chance.randrange(12))]
        second = [chance.randrange(2) for _ in range(chance.randrange(12))]
        pairs = zip(first, second, strict=False)
        expected = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        expected = min(len(first), len(second)) if expected is None else expected
        assert shared_len(first, second) == expected


def test_deadlines_end_what_waits_and_what_runs(lm: TriModeLM) -> None:
    """Prevents: a request that holds its row, or its place, after its time."""
    now = 0.0
    some = engine(lm, 1, clock=lambda: now)
    runs, waits = make(lm, [1], max_new_tokens=50), make(lm, [2])
    some.submit(runs, timeout_s=5)
    some.submit(waits, timeout_s=2)
    some.step()
    now = 2.0
    assert some.step() == [waits]
    now = 5.0
    assert some.step() == [runs]
    assert [seq.abort_reason for seq in (runs, waits)] == ["deadline"] * 2
    assert some.is_idle
    assert runs.stats.seconds == 5.0


def test_too_many_waiting_are_refused_with_numbers(lm: TriModeLM) -> None:
    """Prevents: a queue without an end; a refusal that does not say when to come again."""
    some = engine(lm, 1, max_waiting=1)
    sequences = [make(lm, [n]) for n in (1, 2, 3)]
    some.submit(sequences[0])
    some.submit(sequences[1])
    with pytest.raises(
        CapacityError, match="1 requests may run and 1 wait, and there are 2"
    ) as info:
        some.submit(sequences[2])
    assert info.value.retry_after_s is not None
    some.run()
    some.submit(sequences[2])
    some.run()
    assert all(seq.finish_reason == "length" for seq in sequences)
    with pytest.raises(CapacityError) as info:
        some.submit(make(lm, [1] * 200))
    assert info.value.retry_after_s is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_budget": 7}, "token_budget is 7; allowed: at least 8, which is 4 for each of 2"),
        ({"max_waiting": -1}, "max_waiting is -1; allowed: at least 0"),
        ({"time_slice": 0}, "time_slice is 0; allowed: at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused(
    lm: TriModeLM, options: dict[str, Any], message: str
) -> None:
    """Prevents: an engine that can never feed a prompt."""
    with pytest.raises(ConfigError, match=message):
        engine(lm, 2, **options)


def test_auto_without_a_planner_is_refused(lm: TriModeLM) -> None:
    """Prevents: an assertion in the middle of a batch."""
    with pytest.raises(RequestError, match="mode is 'auto'"):
        engine(lm, 1, planner=None).submit(make(lm, [1], mode="auto"))


def test_a_slice_that_is_over_lets_others_in(lm: TriModeLM) -> None:
    """Prevents: a request that waits until a long one is done."""
    some = engine(lm, 1, time_slice=4)
    long, short = make(lm, [1], mode="ar", max_new_tokens=40), make(lm, [2], mode="ar")
    some.submit(long)
    some.submit(short)
    while not short.is_finished:
        some.step()
    assert len(long.new_ids) < 20
    some.run()
    assert long.new_ids == alone(lm, make(lm, [1], mode="ar", max_new_tokens=40))


@pytest.mark.parametrize(
    ("mode", "block_length", "widest"),
    [("ar", 99, 1), ("linear", 40, 40), ("branching", 8, 40), ("quadratic", 6, 42)],
)
def test_steps_too_wide_are_refused(
    lm: TriModeLM, mode: str, block_length: int, widest: int
) -> None:
    """Prevents: one request whose blocks hold up everybody's forwards."""
    seq = make(lm, [1], mode=mode, block_length=block_length)
    engine(lm, 1, max_step_tokens=widest, num_cells=400).submit(seq)
    seq = make(lm, [1], mode=mode, block_length=block_length)
    if widest > 1:
        message = f"block_length={block_length} in mode {mode!r} would feed {widest} tokens"
        with pytest.raises(CapacityError, match=message):
            engine(lm, 1, max_step_tokens=widest - 1, num_cells=400).submit(seq)


def test_a_gap_and_its_cells(lm: TriModeLM) -> None:
    """Prevents: a gap's canvases beyond the row."""
    seq = gap(lm, [1, 2, 3])
    some = engine(lm, 1, num_cells=cells_needed(seq))
    some.submit(seq)
    some.run()
    assert seq.finish_reason == "stop"


def test_no_row_is_given_away_to_be_taken_again(lm: TriModeLM) -> None:
    """Prevents: two of one client's rows making way for two that wait, where only one of those may
    have them, and the other comes straight back."""
    some = engine(lm, 2, time_slice=2)
    runs = [make(lm, [n], mode="ar", max_new_tokens=6) for n in (1, 2)]
    waits = [make(lm, [n], mode="ar", max_new_tokens=30) for n in (3, 4)]
    for seq, client in zip(runs, "ac", strict=True):
        some.submit(seq, client=client)
    some.step()
    for seq in waits:
        some.submit(seq, client="a")
    while not runs[1].is_finished:
        some.step()
    assert runs[1].stats.num_preemptions == 0
    assert runs[0].stats.num_preemptions == 1
    some.run()


def test_a_preempted_round_begins_once(lm: TriModeLM) -> None:
    """Prevents: a planner asked twice for one round; a draft thrown away that had been made."""
    asked: list[tuple[Sequence, int]] = []

    class Notes(AnyPlanner):
        def choose(self, seq: Sequence) -> Setting:
            asked.append((seq, len(seq.new_ids)))
            return Setting("branching", 4, 4)

    def texts(time_slice: int | None) -> list[Sequence]:
        some = engine(lm, 1, time_slice=time_slice, planner=Notes(0))
        found = [make(lm, [n], mode="auto", max_new_tokens=20) for n in (1, 2)]
        for seq in found:
            some.submit(seq)
        some.run()
        return found

    whole, sliced = texts(None), texts(1)
    assert sum(seq.stats.num_preemptions for seq in sliced) > 10
    assert len(asked) == len(set(asked))
    for one, other in zip(whole, sliced, strict=True):
        assert one.new_ids == other.new_ids
        assert one.num_rounds == other.num_rounds
        assert one.stats.acceptance_lengths == other.stats.acceptance_lengths
        kinds = ("draft", "verify")
        assert [one.stats.forwards[k] for k in kinds] == [other.stats.forwards[k] for k in kinds]


@pytest.mark.parametrize("new_mode", ["ar", "linear", "quadratic", "auto"])
def test_the_mode_may_change_while_it_waits(lm: TriModeLM, new_mode: str) -> None:
    """Prevents: another text, or the old mode, after a change without a row."""
    some = engine(lm, 1, time_slice=3)
    changed = make(lm, [1, 2], mode="branching", max_new_tokens=20)
    other = make(lm, [3], mode="ar", max_new_tokens=20)
    some.submit(changed)
    some.submit(other)
    while not changed.stats.num_preemptions:
        some.step()
    changed.mode = new_mode
    some.run()
    assert changed.new_ids == alone(lm, make(lm, [1, 2], mode="ar", max_new_tokens=20))


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "ar", "control": Control(repetition_penalty=1.5, logprobs=2)},
        {"mode": "linear", "control": Control(repetition_penalty=1.5, logprobs=2)},
        {"mode": "branching", "control": Control(logit_bias={7: 3.0}, logprobs=0)},
        {"mode": "ar", "control": Control(frequency_penalty=-0.9)},
        {"mode": "linear", "control": Control(frequency_penalty=-0.9, presence_penalty=2.0)},
        {"mode": "diffusion", "control": Control(frequency_penalty=1.9)},
        {"mode": "linear", "min_tokens": 9, "ignore_eos": False},
        {"mode": "auto", "control": Control(max_thinking_tokens=6, end_think_token_id=9)},
        {"mode": "linear", "control": Control(max_thinking_tokens=6, end_think_token_id=9)},
        {"mode": "diffusion", "control": Control(max_thinking_tokens=6, end_think_token_id=9)},
        {"mode": "diffusion", "control": Control(repetition_penalty=1.5)},
    ],
    ids=lambda options: f"{options['mode']}",
)
def test_rules_and_events_do_not_show_a_lost_row(lm: TriModeLM, options: dict[str, Any]) -> None:
    """Prevents: a penalty, a budget of thought or log-probabilities that forget or count twice what
    was written before a row was lost; an event told twice."""

    def run(time_slice: int | None, budget: int | None) -> list[tuple[Sequence, list[Event]]]:
        found = []
        some = engine(lm, 2, time_slice=time_slice, token_budget=budget, planner=_Plain())
        for n in range(4):
            events: list[Event] = []
            values = {"max_new_tokens": 16, "block_length": 4, "seed": n, "temperature": 1.0}
            params = GenerationParams(**(values | {"ignore_eos": True} | options))
            seq = lm.sequence([*SYSTEM, n] * (1 + n % 2), params, on_event=events.append)
            some.submit(seq)
            found.append((seq, events))
        some.run()
        return found

    whole, cut = run(None, None), run(1, 12)
    assert all(seq.stats.num_preemptions for seq, _ in cut)
    for (one, events), (other, others) in zip(whole, cut, strict=True):
        assert other.new_ids == one.new_ids
        assert others == events
        assert len(other.logprobs) == len(one.logprobs)
        for mine, its in zip(one.logprobs, other.logprobs, strict=True):
            assert mine.logprob == pytest.approx(its.logprob, abs=1e-9)
            assert [i for i, _ in mine.top] == [i for i, _ in its.top]


class _Plain(AnyPlanner):
    """Always the same, so that two runs can be compared."""

    def __init__(self) -> None:
        super().__init__(0)

    def choose(self, seq: Sequence) -> Setting:
        return Setting("branching", 4, 3, True)


def test_one_token_in_one_token_out(lm: TriModeLM) -> None:
    """Prevents: the smallest of all requests lost between prefill and end, sliced or not."""
    modes = ("ar", "linear", "branching", "quadratic", "auto", "diffusion")
    some = engine(lm, 2, time_slice=1, token_budget=8)
    sequences = [make(lm, [n], mode=mode, max_new_tokens=1) for n, mode in enumerate(modes)]
    for seq in sequences:
        some.submit(seq)
    some.run()
    for n, seq in enumerate(sequences):
        assert seq.new_ids == alone(lm, make(lm, [n], mode="ar", max_new_tokens=1))
        assert seq.finish_reason == "length"
