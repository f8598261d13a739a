"""What goes wrong: no memory, a network that breaks down, time that is over, bad values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from trimode.decoding import GenerationParams, Sequence
from trimode.engine import Engine
from trimode.errors import CapacityError, RequestError
from trimode.runtime import TriModeLM

SYSTEM = list(range(40, 60))
"""What many prompts begin with."""


@pytest.fixture(scope="module")
def lm(tiny_model: Callable[..., Any]) -> TriModeLM:
    return TriModeLM(tiny_model(torch.float64), None)


def make(lm: TriModeLM, prompt: list[int], **options: Any) -> Sequence:
    values: dict[str, Any] = {"mode": "linear", "max_new_tokens": 10, "block_length": 4, "seed": 0}
    return lm.sequence(prompt, GenerationParams(**(values | {"ignore_eos": True} | options)))


def engine(lm: TriModeLM, num_rows: int, **options: Any) -> Engine:
    return Engine(lm.model, num_rows=num_rows, num_cells=128, **options)


def alone(lm: TriModeLM, seq: Sequence) -> list[int]:
    one = engine(lm, 1)
    one.submit(seq)
    one.run()
    return seq.new_ids


def test_a_forward_that_fails_loses_nobody(lm: TriModeLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: a request that nobody hears of again, or another text, once memory ran out."""
    now = 0.0
    some = engine(lm, 1, clock=lambda: now)
    first, late = make(lm, [1, 2, 3]), make(lm, [4])
    some.submit(first)
    some.submit(late, timeout_s=1)
    some.step()
    now = 2.0
    with monkeypatch.context() as patch:
        patch.setattr(some._runner._model, "encode", _no_memory)
        with pytest.raises(RuntimeError, match="out of memory"):
            some.step()
    assert late.abort_reason == "deadline"
    assert some.step() == [late]
    some.run()
    assert first.new_ids == alone(lm, make(lm, [1, 2, 3]))
    assert sum(first.stats.forwards.values()) == some.counts.forwards


def test_a_copy_that_fails_loses_nobody(lm: TriModeLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: a request that has neither a row nor a place in the queue."""
    some = engine(lm, 2, time_slice=1)
    sequences = [make(lm, [*SYSTEM, n], mode="ar") for n in range(4)]
    some.submit(sequences[0])
    some.step()
    with monkeypatch.context() as patch:
        patch.setattr(some._runner._cache, "copy_prefix", _no_memory)
        for seq in sequences[1:]:
            some.submit(seq)
        with pytest.raises(RuntimeError, match="out of memory"):
            some.step()
    assert some.num_running + some.num_waiting == 4
    some.run()
    assert [seq.finish_reason for seq in sequences] == ["length"] * 4


def _no_memory(*args: Any, **options: Any) -> Any:
    raise RuntimeError("out of memory")


def test_what_the_caller_aborts_is_not_returned(
    lm: TriModeLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents: a request that its owner gave up after a failed step ending a second time."""
    now = 0.0
    some = engine(lm, 1, clock=lambda: now)
    seq, other = make(lm, [1]), make(lm, [2])
    some.submit(other)
    some.submit(seq, timeout_s=0)
    with monkeypatch.context() as patch:
        patch.setattr(some._runner._model, "encode", _no_memory)
        with pytest.raises(RuntimeError, match="out of memory"):
            some.step()
    some.abort(other)
    assert not some.is_idle  # `seq` is still to be returned
    some.abort(seq)
    assert some.is_idle
    assert some.step() == []
    assert seq.abort_reason == "deadline"


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("fast", "mode is 'fast'; allowed: ar, diffusion"),
        ("auto", "mode is 'auto'; allowed: another, since this engine has no planner"),
    ],
)
def test_a_mode_that_there_is_not_is_refused(lm: TriModeLM, mode: str, message: str) -> None:
    """Prevents: a KeyError or an assertion in place of a line that says what is allowed."""
    some = engine(lm, 1, planner=None)
    seq = make(lm, [1, 2])
    some.submit(seq)
    some.step()

    def change() -> None:
        seq.mode = mode
        some.run()

    with pytest.raises(RequestError, match=message):
        change()


@pytest.mark.parametrize("timeout_s", [-1.0, float("nan")])
def test_a_timeout_that_is_no_time_is_refused(lm: TriModeLM, timeout_s: float) -> None:
    """Prevents: a deadline that never comes."""
    with pytest.raises(RequestError, match="timeout_s is .*; allowed: None, or seconds"):
        engine(lm, 1).submit(make(lm, [1]), timeout_s=timeout_s)


def test_when_to_come_again_does_not_grow_in_the_night(lm: TriModeLM) -> None:
    """Prevents: hours of idling told to the first who is refused."""
    now = 0.0
    some = engine(lm, 1, max_waiting=0, clock=lambda: now)
    seq = make(lm, [1], mode="ar", max_new_tokens=5)
    some.submit(seq)
    while not some.is_idle:
        some.step()
        now += 1
    assert some.counts.finished == 1
    now += 10_000
    some.submit(make(lm, [2]))
    some.step()
    with pytest.raises(CapacityError) as info:
        some.submit(make(lm, [3]))
    assert info.value.retry_after_s == 4.0


def test_one_that_never_had_a_row_ended_too(lm: TriModeLM) -> None:
    """Prevents: counts and seconds that leave out those whose time was over in the queue."""
    now = 0.0
    some = engine(lm, 1, clock=lambda: now)
    sequences = [make(lm, [1]), make(lm, [2]), make(lm, [3])]
    for seq in sequences:
        some.submit(seq, timeout_s=3)
    some.step()
    now = 1.0
    some.abort(sequences[1])
    now = 3.0
    assert {id(seq) for seq in some.step()} == {id(sequences[0]), id(sequences[2])}
    assert [seq.stats.seconds for seq in sequences] == [3.0, 1.0, 3.0]
    assert some.counts.finished == 3


def test_a_prompt_that_breaks_the_network_down_in_one_chunk(lm: TriModeLM) -> None:
    """Prevents: a NaN in the middle of a prompt overlooked since only its end is read, left behind
    in a row, or handed to the next as a prefix."""
    (table,) = [p for name, p in lm.model.named_parameters() if "embed" in name]
    expected = alone(lm, make(lm, [1, 2, 3, 4]))
    was = table.data[200].clone()
    table.data[200] = float("nan")
    try:
        some = engine(lm, 2, token_budget=8, time_slice=2)
        bad = [make(lm, [*SYSTEM, 200, *SYSTEM]) for _ in range(2)]
        good = make(lm, [1, 2, 3, 4])
        for seq in (bad[0], good, bad[1]):
            some.submit(seq)
        some.run()
    finally:
        table.data[200] = was
    assert [seq.abort_reason for seq in bad] == ["non_finite"] * 2
    assert bad[1].stats.reused_tokens <= len(SYSTEM)  # what comes before it may be
    assert good.new_ids == expected
    assert bool(torch.isfinite(some._runner._cache.keys).all())
    assert bool(torch.isfinite(some._runner._cache.values).all())
