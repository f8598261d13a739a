"""The loop: rows, capacity, aborts, and what a mode may commit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from trimode.decoding import Event, GenerationParams, Sequence, Step
from trimode.decoding.modes import MODES
from trimode.decoding.step import block, causal_step, group_step
from trimode.engine import Engine
from trimode.errors import CapacityError
from trimode.model.adapter import PUBLISHED_FORM
from trimode.runtime import TriModeLM


@pytest.fixture(scope="module")
def lm(tiny_model: Callable[..., Any], random_adapter: Callable[..., Any]) -> TriModeLM:
    model = tiny_model(torch.float64)
    return TriModeLM(model, None, adapter=random_adapter(model))


def make(lm: TriModeLM, prompt: list[int], **options: Any) -> Sequence:
    values: dict[str, Any] = {"mode": "linear", "max_new_tokens": 10, "block_length": 4, "seed": 0}
    return lm.sequence(prompt, GenerationParams(**(values | {"ignore_eos": True} | options)))


def run(engine: Engine) -> list[Sequence]:
    finished = []
    while not engine.is_idle:
        for seq in engine.step():
            if seq.error is not None:
                raise seq.error
            finished.append(seq)
    return finished


def commits_block(seq: Sequence, *, is_drafter_on: bool) -> Iterator[Any]:
    """A wrong mode: keeps the K/V of a block that saw itself in both directions."""
    ids = [seq.last, seq.mask_token_id]
    whole = block(ids, start=seq.length, mask_token_id=seq.mask_token_id, wanted=[1])
    step = group_step("draft" if is_drafter_on else "denoise", [whole], form=seq.form)
    assert any(step.is_drafter_on) == is_drafter_on
    yield step
    seq.commit(1)


def commits_adapted(seq: Sequence) -> Iterator[Any]:
    """A wrong mode: causal, but written with the drafter on from its second token."""
    positions = [seq.length, seq.length + 1]
    on = [False, True]
    yield Step("verify", [seq.last, 1], positions, [0, 0], positions, [0, 0], on, [0])
    seq.commit(2)


def commits_too_many(seq: Sequence) -> Iterator[Any]:
    """A wrong mode: commits more than it fed."""
    yield causal_step("decode", [seq.last], start=seq.length, wanted=[0])
    seq.commit(2)


def commits_twice(seq: Sequence) -> Iterator[Any]:
    """A wrong mode: commits the same step twice."""
    yield causal_step("decode", [seq.last], start=seq.length, wanted=[0])
    seq.commit(1)
    seq.commit(1)


@pytest.mark.parametrize(
    ("wrong", "num_allowed"),
    [
        (lambda seq: commits_block(seq, is_drafter_on=False), 0),
        (lambda seq: commits_block(seq, is_drafter_on=True), 0),
        (commits_adapted, 1),
        (commits_too_many, 1),
        (commits_twice, 0),
    ],
    ids=["bidirectional", "drafted", "adapted", "too many", "twice"],
)
def test_a_mode_cannot_commit_what_is_not_causal_and_plain(
    lm: TriModeLM, monkeypatch: pytest.MonkeyPatch, wrong: Any, num_allowed: int
) -> None:
    """Prevents: K/V of the diffusion view or of the drafter becoming the prefix of later text."""
    monkeypatch.setitem(MODES, "linear", wrong)
    engine = lm.engine([make(lm, [1, 2])])
    engine.step()
    with pytest.raises(AssertionError, match=rf"only {num_allowed} tokens of the latest step"):
        engine.run()


def test_commit_refuses_a_negative_number(lm: TriModeLM) -> None:
    """Prevents: a length that shrinks unseen."""
    with pytest.raises(AssertionError, match=r"commit\(-1\)"):
        make(lm, [1]).commit(-1)


def test_num_committable_is_the_plain_causal_head_of_a_step() -> None:
    """Prevents: committable tokens counted behind one that is not."""
    assert causal_step("verify", [1, 2, 3], start=0, wanted=[0]).num_committable == 3
    whole = block([1, 2], start=0, mask_token_id=2, wanted=[1])
    assert group_step("denoise", [whole], form=PUBLISHED_FORM).num_committable == 0
    mixed = Step("verify", [1, 2, 3], [0, 1, 2], [0, 1, 0], [0, 0, 2], [0, 0, 0], [False] * 3, [0])
    assert mixed.num_committable == 1
    assert mixed.answer_positions == [1]


@pytest.mark.parametrize("num_steps", [1, 2, 3])
@pytest.mark.parametrize("mode", ["ar", "linear", "diffusion", "branching", "quadratic"])
def test_abort_frees_the_row_for_the_next(lm: TriModeLM, mode: str, num_steps: int) -> None:
    """Prevents: a row lost, or left with cells that the next owner sees."""
    expected = make(lm, [5, 6], mode=mode)
    run(lm.engine([expected]))
    engine = Engine(lm.model, num_rows=1, num_cells=64, adapter=lm.adapter)
    first, second = make(lm, [1, 2, 3, 4], mode=mode), make(lm, [5, 6], mode=mode)
    engine.submit(first)
    engine.submit(second)
    for _ in range(num_steps):
        engine.step()
    assert second.new_ids == []
    num_emitted = len(first.new_ids)
    engine.abort(first)
    engine.abort(first)
    assert first.finish_reason == "abort"
    assert run(engine) == [second]
    assert second.new_ids == expected.new_ids
    assert len(first.new_ids) == num_emitted


def test_abort_of_a_waiting_sequence(lm: TriModeLM) -> None:
    """Prevents: an aborted request running all the same once a row is free."""
    engine = Engine(lm.model, num_rows=1, num_cells=32)
    first, second = make(lm, [1]), make(lm, [2])
    engine.submit(first)
    engine.submit(second)
    engine.step()
    engine.abort(second)
    assert run(engine) == [first]
    assert second.finish_reason == "abort"
    assert second.new_ids == []
    assert engine.step() == []


def test_abort_keeps_the_reason_of_a_finished_sequence(lm: TriModeLM) -> None:
    """Prevents: a completed request reported as aborted by a late disconnect."""
    seq = make(lm, [1], max_new_tokens=2)
    engine = lm.engine([seq])
    run(engine)
    engine.abort(seq)
    assert seq.finish_reason == "length"


def test_capacity_is_refused_with_numbers(lm: TriModeLM) -> None:
    """Prevents: writing beyond a row; a refusal that does not say what would fit."""
    engine = Engine(lm.model, num_rows=1, num_cells=16)
    with pytest.raises(CapacityError) as caught:
        engine.submit(make(lm, [1, 2, 3]))
    message = str(caught.value)
    for part in ("prompt of 3", "max_new_tokens=10", "blocks of 4", "need 17 cells", "has 16"):
        assert part in message
    assert engine.is_idle
    engine.submit(make(lm, [1, 2]))
    assert [seq.finish_reason for seq in run(engine)] == ["length"]


@pytest.mark.parametrize("mode", ["ar", "linear", "diffusion", "branching", "quadratic"])
@pytest.mark.parametrize("block_length", [2, 5, 16])
def test_the_cells_of_a_row_are_enough(lm: TriModeLM, mode: str, block_length: int) -> None:
    """Prevents: a last block that does not fit where capacity said it would."""
    for max_new_tokens in (1, 2, 7, 17):
        seq = make(lm, [1, 2], mode=mode, block_length=block_length, max_new_tokens=max_new_tokens)
        run(lm.engine([seq]))
        assert len(seq.new_ids) == max_new_tokens


@pytest.mark.parametrize(
    "more", [{"revision": "joint_threshold", "edit_budget": 7}, {"policy": "ar_weighted"}]
)
def test_the_cells_are_enough_for_the_mode_it_goes_back_to(
    lm: TriModeLM, more: dict[str, Any]
) -> None:
    """Prevents: a row measured by the mode that a sequence had while it was submitted."""
    options: dict[str, Any] = {"mode": "diffusion", "block_length": 8, "max_new_tokens": 4}
    expected = make(lm, [1, 2], **options, **more)
    run(lm.engine([expected]))
    seq = make(lm, [1, 2], **options, **more)
    seq.mode = "ar"
    engine = lm.engine([seq])
    seq.mode = "diffusion"
    run(engine)
    assert seq.new_ids == expected.new_ids


def test_an_adapter_that_is_not_finite_stays_in_its_row(
    lm: TriModeLM, random_adapter: Callable[..., Any]
) -> None:
    """0 * NaN: rows with the adapter off, in the batch of a draft, aborted by it."""
    broken = random_adapter(lm.model)
    for _, _, pair in broken.items():
        pair.up.data.fill_(float("nan"))
    modes = ["ar", "linear", "diffusion"]
    found = [make(lm, [1, 2, 3], mode=mode) for mode in modes]
    engine = Engine(lm.model, num_rows=3, num_cells=64, adapter=broken)
    for seq in found:
        engine.submit(seq)
    run(engine)
    assert [seq.finish_reason for seq in found] == ["length", "abort", "length"]
    for seq in (found[0], found[2]):
        alone = make(lm, [1, 2, 3], mode=seq.mode)
        run(lm.engine([alone]))
        assert seq.new_ids == alone.new_ids


def test_a_watcher_that_raises_ends_its_own_sequence_only(lm: TriModeLM) -> None:
    """An engine that no step can get out of any more, or rows that are never freed."""

    def raises(event: Event) -> None:
        if event.kind == "emit" and event.position > 5:
            raise ValueError("the watcher's own")

    params = GenerationParams(mode="linear", max_new_tokens=10, block_length=4, seed=0)
    sequences = [
        lm.sequence([1, 2, 3], params, on_event=raises if i == 1 else None) for i in range(3)
    ]
    engine = lm.engine(sequences)
    with pytest.raises(ValueError, match="the watcher's own"):
        run(engine)
    run(engine)
    assert [seq.finish_reason for seq in sequences] == ["length", "abort", "length"]
    assert sequences[0].new_ids == sequences[2].new_ids


def test_a_sequence_is_submitted_once(lm: TriModeLM) -> None:
    """One sequence in two rows, each writing to its tokens."""
    seq = make(lm, [1, 2])
    engine = lm.engine([seq])
    with pytest.raises(AssertionError, match="once"):
        engine.submit(seq)
    run(engine)
    with pytest.raises(AssertionError, match="once"):
        engine.submit(seq)


def test_the_last_verify_feeds_no_more_than_may_be_emitted(lm: TriModeLM) -> None:
    """Tokens verified that can never be shown."""
    seq = make(lm, [1, 2, 3], max_new_tokens=3, block_length=8)
    run(lm.engine([seq]))
    rounds = seq.stats.forwards["verify"]
    assert seq.stats.tokens_fed["verify"] == (2 if rounds == 1 else 2 + 1)


def test_no_state_between_calls(lm: TriModeLM) -> None:
    """Prevents: a call that depends on those before it, through a cache, a stat or a generator.
    (`auto` learns how to decode, on purpose; not what.)"""
    options: dict[str, Any] = {"seed": 3, "temperature": 1.0, "max_new_tokens": 12}
    options["mode"] = "linear"
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = lm.generate([1, 2, 3], **options)
    lm.generate([[4] * 20, [5]], mode="diffusion", seed=9, max_new_tokens=12)
    lm.generate([7], mode="ar", seed=1, temperature=2.0, max_new_tokens=3)
    again = lm.generate([1, 2, 3], **options)
    assert again.token_ids == first.token_ids
    assert again.stats.forwards == first.stats.forwards
    assert again.stats.acceptance_lengths == first.stats.acceptance_lengths
    assert torch.equal(torch.random.get_rng_state(), before)


def test_stats_add_up(lm: TriModeLM) -> None:
    """Prevents: forwards or tokens of one sequence counted for another, or not at all."""
    sequences = [make(lm, [1, 2, 3], mode="ar"), make(lm, [4], mode="linear")]
    run(lm.engine(sequences))
    ar, linear = (seq.stats for seq in sequences)
    assert {k: v for k, v in ar.forwards.items() if v} == {"prefill": 1, "decode": 9}
    assert {k: v for k, v in ar.tokens_fed.items() if v} == {"prefill": 3, "decode": 9}
    assert ar.tpf_decode == 1.0
    rounds = len(linear.acceptance_lengths)
    assert {k: v for k, v in linear.forwards.items() if v} == {
        "prefill": 1,
        "draft": linear.forwards["draft"],
        "verify": rounds,
    }
    assert rounds - 1 <= linear.forwards["draft"] <= rounds
    assert sum(linear.acceptance_lengths) + 1 == linear.new_tokens == 10


def test_a_readout_is_in_the_order_of_its_sequence(lm: TriModeLM) -> None:
    """Prevents: answers handed to the wrong sequence, as rows are packed by length."""
    engine = Engine(lm.model, num_rows=3, num_cells=64)
    prompts = [[3] * 9, [4], [5] * 4]
    sequences = [make(lm, prompt, mode="ar", max_new_tokens=1) for prompt in prompts]
    for seq in sequences:
        engine.submit(seq)
    assert engine.step() == sequences
    for prompt, seq in zip(prompts, sequences, strict=True):
        own = make(lm, prompt, mode="ar", max_new_tokens=1)
        run(lm.engine([own]))
        assert own.new_ids == seq.new_ids
