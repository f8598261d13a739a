"""The backend of one process, asked without HTTP: exact in any company, frees what it holds, and
tells everybody when it breaks."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import aclosing
from typing import Any

import pytest

from tests.serving.conftest import WAIT_S, Brake, wait_until
from trimode.engine.costs import TOKENS, Costs
from trimode.engine.planner import Planner
from trimode.errors import ConfigError
from trimode.runtime import TriModeLM
from trimode.serving import engine_thread
from trimode.serving.jobs import Done, Failed, Happening, Job, Piece, Update
from trimode.serving.streaming import EventStream, run_all
from trimode.serving.worker import LocalBackend

Make = Callable[..., LocalBackend]

GOES_ON = {"max_new_tokens": 300, "ignore_eos": True, "temperature": 0.0, "mode": "ar"}


@pytest.fixture
def make(tiny_lm: TriModeLM) -> Iterator[Make]:
    """`make(**options)`: a backend, closed at the end."""
    made: list[LocalBackend] = []

    def backend(**options: Any) -> LocalBackend:
        made.append(
            LocalBackend(tiny_lm, **{"name": "tiny", "num_rows": 4, "has_auto": False, **options})
        )
        return made[-1]

    yield backend
    for one in made:
        asyncio.run(one.close(timeout_s=0))


def _job(task: str = "generate", inputs: Any = "x", **options: Any) -> Job:
    return Job(request_id="r", task=task, inputs=inputs, options=options)


def _run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, WAIT_S))


async def _all(backend: LocalBackend, job: Job) -> list[Update]:
    async with aclosing(backend.run(job)) as updates:
        return [update async for update in updates]


def test_texts_do_not_depend_on_their_company(make: Make, tiny_lm: TriModeLM) -> None:
    """Prevents: a text changed by what else is in its batch, or by a queue, a budget or a slice."""
    draw = random.Random(0)
    jobs, wanted = [], []
    for number in range(14):
        mode = ("ar", "diffusion", "linear", "branching", "quadratic")[number % 5]
        options = {
            "mode": mode,
            "max_new_tokens": draw.randint(1, 30),
            "temperature": draw.choice([0.0, 0.7]),
            "seed": number,
            "ignore_eos": True,
        }
        prompt = "p" * draw.randint(1, 40)
        jobs.append(_job(inputs=prompt, **options))
        wanted.append(tiny_lm.generate(prompt, **options).token_ids)
    infill = "a = <FILL>\nb = <FILL>\n"
    jobs.append(_job("infill", infill, lengths=[1, 2], seed=1))
    backend = make(token_budget=24, time_slice=6)

    async def together() -> list[list[Update]]:
        return await asyncio.gather(*(_all(backend, job) for job in jobs))

    *texts, filled = _run(together())
    for updates, token_ids in zip(texts, wanted, strict=True):
        done = updates[-1]
        assert isinstance(done, Done)
        pieces = [update for update in updates if isinstance(update, Piece)]
        assert list(done.token_ids) == token_ids
        assert "".join(piece.text for piece in pieces) == done.text
        assert [i for piece in pieces for i in piece.token_ids] == token_ids
    assert filled[-1].text == tiny_lm.infill(infill, lengths=(1, 2), seed=1).text
    assert backend._thread.engine.is_idle


def test_auto_writes_what_ar_writes(make: Make, tiny_lm: TriModeLM) -> None:
    """Prevents: mode auto offered without a planner, or hidden where there is one."""
    # Costs that do not depend on this machine, so that nothing is measured here.
    costs = {tokens: 1.0 + tokens / 64 for tokens in TOKENS}
    tiny_lm.__dict__["planner"] = Planner(Costs(costs))
    backend = make(has_auto=True)
    assert "auto" in backend.card.modes
    assert "auto" not in make().card.modes
    options = {"max_new_tokens": 20, "ignore_eos": True, "temperature": 0.7, "seed": 3}
    done = _run(_all(backend, _job(mode="auto", **options)))[-1]
    assert list(done.token_ids) == tiny_lm.generate("x", mode="ar", **options).token_ids
    (refused,) = _run(_all(make(), _job(mode="auto", **options)))
    assert (refused.status, refused.param) == (400, "mode")


def test_leaving_frees_the_row_at_once(make: Make) -> None:
    """Prevents: a closed job going on to its end in its row."""
    backend = make()

    async def leave() -> None:
        updates = backend.run(_job(**GOES_ON))
        assert isinstance(await anext(updates), Piece)
        assert backend._thread.engine.num_running == 1
        await updates.aclose()

    _run(leave())
    engine = backend._thread.engine
    wait_until(lambda: engine.is_idle)
    assert engine.counts.tokens_fed < 300
    assert backend._jobs.num == 0


def test_one_who_does_not_read_holds_nobody_up(make: Make) -> None:
    """Prevents: the engine waiting for a reader, and text piling up in pieces."""
    backend = make()

    async def read_late() -> tuple[list[Update], list[Update]]:
        slow = backend.run(_job(**GOES_ON))
        first = [await anext(slow)]
        others = await _all(backend, _job("generate", "y", **GOES_ON))
        wait_until(lambda: backend._thread.engine.is_idle)
        return first + [update async for update in slow], others

    slow, others = _run(read_late())
    assert isinstance(others[-1], Done)
    assert isinstance(slow[-1], Done)
    assert len(slow) <= 4  # what came meanwhile is one piece
    assert len(slow[-1].token_ids) == 300


def test_too_many_events_that_nobody_reads(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: memory filled by events for a client that has stopped reading."""
    monkeypatch.setattr(engine_thread, "MAX_EVENTS", 10)
    backend = make()

    async def never_read() -> Update:
        job = Job(request_id="r", task="generate", inputs="x", options=GOES_ON, wants_events=True)
        updates = backend.run(job)
        await anext(updates)
        wait_until(lambda: backend._thread.engine.is_idle)
        return [update async for update in updates][-1]

    last = _run(never_read())
    assert isinstance(last, Failed)
    assert (last.status, last.code) == (408, "too_slow")


def test_a_failed_step_fails_what_ran_and_no_more(make: Make) -> None:
    """Prevents: a failure that kills the thread in silence, with jobs that wait for ever."""
    backend = make()
    brake = Brake(backend._thread)
    engine = backend._thread.engine
    admit = engine._admit

    async def fail() -> Update:
        updates = backend.run(_job(**GOES_ON))
        brake.let(1)
        await anext(updates)

        def broken() -> None:
            engine._admit = admit  # type: ignore[method-assign]
            raise RuntimeError("planted")

        engine._admit = broken  # type: ignore[method-assign]
        brake.off()
        return [update async for update in updates][-1]

    failed = _run(fail())
    assert isinstance(failed, Failed)
    assert (failed.status, failed.code) == (500, "internal_error")
    assert backend.is_ready
    assert isinstance(_run(_all(backend, _job(max_new_tokens=2)))[-1], Done)


def test_an_engine_that_keeps_failing_is_given_up(make: Make) -> None:
    """Prevents: a server that says it is ready and answers nothing."""
    backend = make()

    def broken() -> None:
        raise RuntimeError("planted")

    backend._thread.engine._admit = broken  # type: ignore[method-assign]
    for _ in range(engine_thread.MAX_FAILED_STEPS):
        assert backend.is_ready
        (failed,) = _run(_all(backend, _job(max_new_tokens=2)))
        assert failed.status == 500
    wait_until(lambda: not backend.is_ready)
    (failed,) = _run(_all(backend, _job(max_new_tokens=2)))
    assert failed.status == 500
    assert backend.refusal is not None
    assert "broke down" in backend.refusal.message


def test_closing_finishes_what_runs(make: Make) -> None:
    """Prevents: a shutdown that cuts texts off, or takes new ones."""
    backend = make()

    async def close() -> tuple[list[Update], list[Update]]:
        running = backend.run(_job(**GOES_ON))
        first = await anext(running)
        closing = asyncio.create_task(backend.close(timeout_s=WAIT_S))
        await asyncio.sleep(0)
        assert not backend.is_ready
        late = await _all(backend, _job())
        rest = [update async for update in running]
        await closing
        return [first, *rest], late

    finished, late = _run(close())
    assert isinstance(finished[-1], Done)
    assert len(finished[-1].token_ids) == 300
    assert [update.status for update in late if isinstance(update, Failed)] == [503]


def test_closing_aborts_what_does_not_finish(make: Make) -> None:
    """Prevents: a shutdown that never ends, or ends texts without a word."""
    backend = make()
    brake = Brake(backend._thread)

    async def close() -> Update:
        running = backend.run(_job(**GOES_ON))
        brake.let(1)
        await anext(running)

        async def read() -> Update:
            return [update async for update in running][-1]

        while not brake.is_held:  # else its thread may take the command before anybody looks
            await asyncio.sleep(0.001)
        reading = asyncio.create_task(read())
        closing = asyncio.create_task(backend.close(timeout_s=0))
        while backend._thread._commands.empty():
            await asyncio.sleep(0)
        brake.off()
        await closing
        return await reading

    failed = _run(close())
    assert isinstance(failed, Failed)
    assert (failed.status, failed.message) == (503, "the server is shutting down")
    assert backend.refusal == failed


def test_many_jobs_of_one_request_end_together(make: Make) -> None:
    """Prevents: rows held by the other choices of a request whose client left."""
    backend = make()

    async def leave() -> None:
        updates = run_all(backend, [_job(**GOES_ON, seed=seed) for seed in range(4)])
        seen = set()
        async for index, _ in updates:
            seen.add(index)
            if len(seen) == 4:
                break
        await updates.aclose()

    _run(leave())
    wait_until(lambda: backend._thread.engine.is_idle)
    assert backend._jobs.num == 0
    assert backend._thread.engine.counts.tokens_fed < 4 * 300


def test_a_stream_that_breaks_is_counted_out() -> None:
    """Prevents: a place among the concurrent requests that is never given back."""
    ended = []

    async def events() -> Any:
        try:
            yield b"data: x\n\n"
            raise RuntimeError("planted")
        finally:
            ended.append("events")

    async def on_end() -> None:
        ended.append("request")

    async def send(_: Any) -> None:
        pass

    async def receive() -> Any:
        await asyncio.Event().wait()

    stream = EventStream(events(), on_end=on_end)
    with pytest.raises(RuntimeError, match="planted"):
        _run(stream({}, receive, send))
    assert ended == ["events", "request"]


def test_a_closing_server_answers_those_who_are_not_in_the_engine_yet(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents: a request torn off without an answer, for its prompt was still being encoded."""
    backend = make()
    is_in, may_go = threading.Event(), threading.Event()
    encode = backend._lm.encode_prompt

    def slow(prompt: Any, **options: bool) -> Any:
        is_in.set()
        assert may_go.wait(WAIT_S)
        return encode(prompt, **options)

    monkeypatch.setattr(backend._lm, "encode_prompt", slow)

    async def close() -> list[Update]:
        jobs = [asyncio.create_task(_all(backend, _job(max_new_tokens=2))) for _ in range(4)]
        await asyncio.to_thread(is_in.wait, WAIT_S)
        await backend.close(timeout_s=0)
        may_go.set()
        return [update for updates in await asyncio.gather(*jobs) for update in updates]

    found = _run(close())
    assert [getattr(update, "status", None) for update in found] == [503] * 4


def test_of_many_jobs_none_begins_before_all_are_accepted(make: Make) -> None:
    """Prevents: a stream that begins and breaks off, for a later choice was never possible."""
    backend = make()

    async def ask(bad: Job) -> list[Update]:
        jobs = [_job(**GOES_ON), bad]
        jobs = [dataclasses.replace(job, wants_word=True) for job in jobs]
        async with aclosing(run_all(backend, jobs)) as updates:
            return [update async for _, update in updates]

    for bad, status in ((_job(inputs=[999]), 400), (_job(max_new_tokens=600), 400)):
        (failed,) = _run(ask(bad))
        assert isinstance(failed, Failed)
        assert failed.status == status
    *pieces, done = _run(ask(_job(max_new_tokens=2, ignore_eos=True)))
    assert isinstance(done, Done)
    assert all(isinstance(piece, Piece | Done) for piece in pieces)
    full = make(num_rows=1, max_waiting=0)
    brake = Brake(full._thread)
    brake.off()

    async def ask_for_two() -> list[Update]:
        jobs = [dataclasses.replace(_job(**GOES_ON), wants_word=True) for _ in range(2)]
        async with aclosing(run_all(full, jobs)) as updates:
            return [update async for _, update in updates]

    (failed,) = _run(ask_for_two())
    assert isinstance(failed, Failed)
    assert failed.status == 429


def test_happenings_are_counted_from_the_first_new_token(make: Make, tiny_lm: TriModeLM) -> None:
    """Prevents: positions of the prompt shown as the text's, and masks shown as tokens."""
    backend = make()
    options = {"mode": "diffusion", "max_new_tokens": 8, "seed": 1, "ignore_eos": True}
    job = Job(request_id="r", task="generate", inputs="abc", options=options, wants_events=True)
    updates = _run(_all(backend, job))
    happenings = [update for update in updates if isinstance(update, Happening)]
    first = next(one for one in happenings if one.kind == "denoise")
    assert first.position == 0
    assert all(
        (text == "")
        for text, is_masked in zip(first.texts, first.is_masked, strict=True)
        if is_masked
    )
    emitted = {
        one.position + i: token_id
        for one in happenings
        if one.kind == "emit"
        for i, token_id in enumerate(one.token_ids)
    }
    assert [emitted[i] for i in range(8)] == tiny_lm.generate("abc", **options).token_ids
    assert happenings[-1].num_forwards == updates[-1].stats.num_forwards


def test_a_deadline_covers_all_gaps_of_an_infill(make: Make) -> None:
    """Prevents: a request for many gaps that has its time anew for each."""
    backend = make()
    job = Job(request_id="r", task="infill", inputs="<FILL> x " * 30, options={}, timeout_s=0.005)
    (failed,) = _run(_all(backend, job))
    assert (failed.status, failed.code) == (504, "deadline")


def test_what_cannot_serve_is_refused(tiny_lm: TriModeLM) -> None:
    """Prevents: a server that starts and then fails every request."""
    with pytest.raises(ConfigError, match="serving needs a tokenizer"):
        LocalBackend(TriModeLM(tiny_lm.model, None), name="x")
    with pytest.raises(ConfigError, match="context_len is 513; allowed: 2 to the model's own, 512"):
        LocalBackend(tiny_lm, name="x", context_len=513)


def test_a_call_that_raises_stop_iteration_ends(make: Make) -> None:
    """Prevents: a request that waits for ever for a future that cannot carry this error."""
    backend = make()
    with pytest.raises(RuntimeError, match="StopIteration"):
        _run(backend._in_pool(lambda: next(iter(()))))
