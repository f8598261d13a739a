"""Updates of jobs as OpenAI's bodies and chunks, and the chunks as server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from trimode.decoding import Stats
from trimode.serving.jobs import (
    Accepted,
    Backend,
    Done,
    Failed,
    Happening,
    Job,
    ModelCard,
    Output,
    Piece,
    TextLogprobs,
    Tokenized,
    TokenText,
    Update,
)
from trimode.serving.refusals import error_body

IMPOSSIBLE = -9999.0
"""OpenAI's log-probability of what cannot be; a prompt may have a token that is never chosen."""

QUEUE_LEN = 64
"""Updates of one request that wait for its reader; its jobs' further ones wait where they are."""


async def run_all(backend: Backend, jobs: list[Job]) -> AsyncGenerator[tuple[int, Output], None]:
    """Run jobs side by side; each update comes with its job's index. A failure ends them all, and
    none has sent anything before all are accepted. Closing it aborts them all."""
    if len(jobs) == 1:
        async with aclosing(_run(backend, jobs[0])) as updates:
            async for update in updates:
                if not isinstance(update, Accepted | Tokenized):
                    yield 0, update
        return
    waiting: asyncio.Queue[tuple[int, Update]] = asyncio.Queue(QUEUE_LEN)

    async def pump(index: int) -> None:
        async with aclosing(_run(backend, jobs[index])) as updates:
            async for update in updates:
                await waiting.put((index, update))

    tasks = [asyncio.create_task(pump(index)) for index in range(len(jobs))]
    try:
        num_open, unsure = len(jobs), set(range(len(jobs)))
        held: list[tuple[int, Output]] = []
        while num_open:
            index, update = await waiting.get()
            if isinstance(update, Failed):
                yield index, update
                return
            num_open -= isinstance(update, Done)
            unsure.discard(index)
            if not isinstance(update, Accepted | Tokenized):
                held.append((index, update))
            while held and not unsure:
                yield held.pop(0)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _run(backend: Backend, job: Job) -> AsyncGenerator[Update, None]:
    """A job's updates, the last of which ends it, whatever the backend does."""
    updates = backend.run(job)
    try:
        async for update in updates:
            yield update
            if isinstance(update, Done | Failed):
                return
        yield Failed(status=500, code="internal_error", message="the model gave no end of the text")
    finally:
        close = getattr(updates, "aclose", None)
        if close is not None:
            await close()


@dataclass(slots=True)
class Answer:
    """What a request asked for, as it fills.

    Attributes:
        kind: `text_completion` or `chat.completion`.
        id: Of the answer.
        jobs: Its choices.
        card: The model's.
        n: Choices of each prompt.
        has_usage: Whether a stream ends with the usage.
        created: Seconds since 1970.
        done: By choice, once it has ended.
        logprobs: By choice, as they came.
        failed: What ended its stream, if it came to no end of its own.
    """

    kind: str
    id: str
    jobs: list[Job]
    card: ModelCard
    n: int = 1
    has_usage: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    done: dict[int, Done] = field(default_factory=dict)
    logprobs: dict[int, list[TextLogprobs]] = field(default_factory=dict)
    failed: Failed | None = None

    @property
    def is_chat(self) -> bool:
        return self.kind == "chat.completion"

    def take(self, index: int, update: Piece | Done) -> None:
        """Note what is needed for the whole."""
        if isinstance(update, Done):
            self.done[index] = update
        else:
            self.logprobs.setdefault(index, []).extend(update.logprobs)

    def whole(self) -> dict[str, Any]:
        """The body without streaming."""
        choices = []
        for index in range(len(self.jobs)):
            done = self.done[index]
            choice: dict[str, Any] = {"index": index}
            if self.is_chat:
                choice["message"] = _message(done)
            else:
                choice["text"] = done.text
            choice["logprobs"] = self._logprobs(index, self.logprobs.get(index, []))
            choice["finish_reason"] = done.finish_reason
            choices.append(choice)
        return {**self._head(self.kind), "choices": choices, "usage": self.usage()}

    def chunk(self, index: int, update: Piece | Done | None) -> dict[str, Any]:
        """What a stream says of an update; None begins a chat's choice."""
        piece = update if isinstance(update, Piece) else Piece("", ())
        choice: dict[str, Any] = {"index": index}
        if self.is_chat:
            begun = {"role": "assistant", "content": ""}
            text = {"content": piece.text} if isinstance(update, Piece) else {}
            choice["delta"] = begun if update is None else text
        else:
            choice["text"] = piece.text
        choice["logprobs"] = self._logprobs(index, piece.logprobs) if piece.logprobs else None
        choice["finish_reason"] = update.finish_reason if isinstance(update, Done) else None
        return self._chunk([choice])

    def calls_chunk(self, index: int, done: Done) -> dict[str, Any]:
        """What a stream says of an answer's tool calls, each of them whole."""
        calls = [{"index": i, **call.as_message()} for i, call in enumerate(done.tool_calls)]
        choice = {"index": index, "delta": {"tool_calls": calls}}
        return self._chunk([{**choice, "logprobs": None, "finish_reason": None}])

    def event_chunk(self, index: int, happening: Happening) -> dict[str, Any]:
        """A happening, in a chunk that others' clients take for an empty one."""
        return {**self._chunk([]), "trimode_event": {"index": index, **asdict(happening)}}

    def usage_chunk(self) -> dict[str, Any]:
        """The last one."""
        return {**self._chunk([]), "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Tokens as OpenAI counts them, each prompt once; and what they cost."""
        firsts = [self.done[index] for index in range(0, len(self.jobs), self.n)]
        return usage(
            [self.done[index] for index in range(len(self.jobs))],
            self.jobs[0],
            self.card,
            prompt_tokens=sum(done.prompt_tokens for done in firsts),
            cached_tokens=sum(done.stats.cached_tokens for done in firsts),
        )

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.card.name}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.is_chat else self.kind
        chunk = {**self._head(kind), "choices": choices}
        return {**chunk, "usage": None} if self.has_usage else chunk

    def _logprobs(
        self, index: int, logprobs: list[TextLogprobs] | tuple[TextLogprobs, ...]
    ) -> dict[str, Any] | None:
        if not self.jobs[index].wants_logprobs:
            return None
        if self.is_chat:
            return {"content": [_chat_logprob(one) for one in logprobs], "refusal": None}
        return {
            "tokens": [_name(one.token) for one in logprobs],
            "token_logprobs": [_number(one.logprob) for one in logprobs],
            "top_logprobs": [_by_text(one) for one in logprobs],
            "text_offset": [one.start for one in logprobs],
        }


def usage(
    texts: list[Done], job: Job, card: ModelCard, *, prompt_tokens: int, cached_tokens: int
) -> dict[str, Any]:
    """OpenAI's usage, and `trimode`: forwards by kind, tokens per forward, seconds, seeds."""
    total = Stats()
    for done in texts:
        for kind, number in done.stats.forwards.items():
            total.forwards[kind] = total.forwards.get(kind, 0) + number
        total.new_tokens += done.stats.new_tokens
        total.acceptance_lengths += done.stats.acceptance_lengths
        total.seconds = max(total.seconds, done.stats.seconds)
    num_decode = total.num_forwards - total.forwards["prefill"]
    decode = (total.new_tokens - len(texts)) / num_decode if num_decode else None
    accepted = total.acceptance_lengths
    mode = texts[0].mode
    own: dict[str, Any] = {"mode": mode, "seed": texts[0].seed}
    if len(texts) > 1:
        own["seeds"] = [done.seed for done in texts]
    if mode not in ("ar", "infill"):
        own["block_length"] = job.options.get("block_length", card.block_length)
    own |= {
        "forwards": {**total.forwards, "total": total.num_forwards},
        "tokens_per_forward": {"decode": decode, "total": total.tpf_total},
        "acceptance_length": sum(accepted) / len(accepted) if accepted else None,
        "seconds": total.seconds,
        "tokens_per_second": total.tokens_per_second,
    }
    if remarks := [*dict.fromkeys(remark for done in texts for remark in done.remarks)]:
        own["warnings"] = remarks
    completion_tokens = sum(len(done.token_ids) for done in texts)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
        "trimode": own,
    }


def _message(done: Done) -> dict[str, Any]:
    """An answer as a message; an empty text before tool calls is null."""
    message = {"role": "assistant", "content": done.text, "refusal": None}
    if not done.tool_calls:
        return message
    calls = [call.as_message() for call in done.tool_calls]
    return {**message, "content": done.text or None, "tool_calls": calls}


def _chat_logprob(one: TextLogprobs) -> dict[str, Any]:
    top = [{**_chat_token(token), "logprob": _number(x)} for token, x in one.top]
    return {**_chat_token(one.token), "logprob": _number(one.logprob), "top_logprobs": top}


def _chat_token(token: TokenText) -> dict[str, Any]:
    return {"token": token.text, "bytes": list(token.octets)}


def _by_text(one: TextLogprobs) -> dict[str, float] | None:
    """The likeliest by what each says; of tokens that say the same, the likeliest. None for the
    first token of a prompt."""
    if one.logprob is None:
        return None
    found: dict[str, float] = {}
    for token, logprob in one.top:
        found.setdefault(_name(token), max(logprob, IMPOSSIBLE))
    return found


def _number(logprob: float | None) -> float | None:
    """JSON has no infinity."""
    return None if logprob is None else max(logprob, IMPOSSIBLE)


def _name(token: TokenText) -> str:
    """Its text; parts of characters are `bytes:` and `\\x..` for each, as OpenAI names them."""
    if "\ufffd" not in token.text:
        return token.text
    return "bytes:" + "".join(f"\\x{octet:02x}" for octet in token.octets)


async def chunks(
    updates: AsyncGenerator[tuple[int, Output], None], answer: Answer
) -> AsyncGenerator[bytes, None]:
    """A stream as server-sent events. An error is the last event, and then there is no `[DONE]`."""
    begun: set[int] = set()
    async with aclosing(updates):
        async for index, update in updates:
            if isinstance(update, Failed):
                answer.failed = update
                yield _event(error_body(update))
                return
            if answer.is_chat and index not in begun:
                begun.add(index)
                yield _event(answer.chunk(index, None))
            if isinstance(update, Happening):
                yield _event(answer.event_chunk(index, update))
                continue
            answer.take(index, update)
            if isinstance(update, Done) and update.tool_calls:
                yield _event(answer.calls_chunk(index, update))
            if isinstance(update, Done) or update.text or update.logprobs:
                yield _event(answer.chunk(index, update))
    if answer.has_usage:
        yield _event(answer.usage_chunk())
    yield b"data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """Sends events as they come; stops at once when the client leaves.

    Args:
        events: What is sent.
        on_end: Awaited when all is over, whatever happened.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        on_end: Callable[[], Awaitable[None]],
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, as ASGI has it."""
        try:
            await until_gone(receive, self._send_all(send))
        finally:
            try:
                await self._events.aclose()
            finally:
                await self._on_end()

    async def _send_all(self, send: Send) -> None:
        head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(head)
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def until_gone(receive: Receive, work: Any) -> Any:
    """The result of `work`, which is cancelled when the client leaves (then None)."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
