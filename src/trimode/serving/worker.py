"""The backend of one process: jobs become sequences of one engine, in a thread of its own.

Encoding, checking and decoding text is done on asyncio's side; the engine's thread runs the model.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from trimode.checkpoint.generation_defaults import GenerationDefaults, read_generation_defaults
from trimode.conversation import answering
from trimode.decoding import Sequence
from trimode.decoding.control import GRAMMAR_KINDS
from trimode.decoding.params import DEFAULT_BRANCHES, MODE_NAMES
from trimode.detokenize import StandingText
from trimode.engine import Engine
from trimode.errors import CapacityError, ConfigError, RequestError, UnsupportedError
from trimode.infill import DEFAULT_CONTEXT, DEFAULT_LENGTHS, FilledGap, Infilling, infill_steps
from trimode.messages import ToolCall
from trimode.rendering import Renderer
from trimode.runtime import MAX_BATCH, TriModeLM
from trimode.serving.draining import SHUTTING_DOWN, RunningJobs
from trimode.serving.engine_thread import EngineThread, Ticket
from trimode.serving.failures import ABORTS, BROKEN, GIVEN_UP, TOO_SLOW, no_room, refused
from trimode.serving.held_calls import CallAlone, CallsHeldBack
from trimode.serving.jobs import (
    Accepted,
    Done,
    Failed,
    Happening,
    Job,
    ModelCard,
    Piece,
    Update,
)
from trimode.serving.model_metrics import ModelMetrics
from trimode.serving.room import check_room
from trimode.serving.token_texts import NewLogprobs, TokenTexts
from trimode.serving.tokenizing import TASKS, check_chat, tokenized
from trimode.tool_calls import (
    ToolForm,
    find_form,
    forced_call,
    names_of,
    read_calls,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

INFILL_CELLS = DEFAULT_CONTEXT + 64 * len(DEFAULT_LENGTHS)
"""Cells of a row in which a gap is filled with the default arguments."""


class LocalBackend:
    """A loaded model behind `trimode.serving.jobs.Backend`.

    Args:
        lm: With a tokenizer.
        name: Under which requests ask for it.
        num_rows: Texts that are made together; more wait.
        context_len: Prompt and new tokens at most; None means the model's own.
        token_budget, max_waiting, time_slice: See `trimode.engine.Engine`.
        max_step_tokens: The same, but what the model's own block length may ask for is allowed.
        max_new_tokens: Where a job gives none, at most so many, as far as they fit.
        max_prompt_tokens: Longer prompts are refused; None for no limit but the context.
        generation_config: `auto` takes the defaults of the model's own generation_config.json,
            `none` takes none; else the file, or a folder with it.
        has_auto: Whether mode `auto` is there, for which forwards are measured at first, once for
            each machine.

    Raises:
        CheckpointError: the file of defaults is damaged or missing.
        ConfigError: the model has no tokenizer, or a number is out of its range.
        CapacityError: the K/V rows do not fit into memory.
    """

    def __init__(
        self,
        lm: TriModeLM,
        *,
        name: str,
        num_rows: int = MAX_BATCH,
        context_len: int | None = None,
        token_budget: int | None = None,
        max_step_tokens: int | None = None,
        max_waiting: int | None = None,
        time_slice: int | None = None,
        max_new_tokens: int = 1024,
        max_prompt_tokens: int | None = None,
        generation_config: str = "auto",
        has_auto: bool = True,
    ) -> None:
        if lm.tokenizer is None:
            raise ConfigError("serving needs a tokenizer, and this checkpoint has none")
        own = lm.model.config.max_position_embeddings
        if context_len is not None and not 2 <= context_len <= own:
            raise ConfigError(f"context_len is {context_len}; allowed: 2 to the model's own, {own}")
        block_length = lm.model.config.block_size
        context_len = context_len or own
        self.card = ModelCard(
            name=name,
            modes=tuple(mode for mode in MODE_NAMES if mode != "auto" or has_auto),
            block_length=block_length,
            context_len=context_len,
            has_chat=bool(lm.tokenizer.chat_template),
            has_drafter=lm.adapter is not None,
            num_parameters=lm.model.num_parameters(),
            generation_defaults=_defaults(lm, generation_config),
        )
        room = block_length * (1 + DEFAULT_BRANCHES)
        engine = Engine(
            lm.model,
            num_rows=num_rows,
            num_cells=max(context_len + room, INFILL_CELLS),
            adapter=lm.adapter,
            token_budget=token_budget,
            max_step_tokens=None
            if max_step_tokens is None
            else max(max_step_tokens, block_length * (1 + block_length)),
            max_waiting=max_waiting,
            time_slice=time_slice,
            planner=lm.planner if has_auto else None,
        )
        self._lm = lm
        assert lm.vocabulary is not None
        self._vocabulary = lm.vocabulary
        _ = lm.vocabulary.token_bytes  # made now, and not while a request waits
        self._max_new_tokens = max_new_tokens
        self._max_prompt_tokens = max_prompt_tokens
        self._metrics = ModelMetrics(engine)
        self._thread = EngineThread(engine, on_step=self._metrics.note_step)
        # Two: a long prompt does not hold up the next one.
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="trimode-text")
        self._pool_is_shut = False
        self._tickets: set[Ticket] = set()
        self._jobs = RunningJobs()
        self._texts = TokenTexts(lm)

    @property
    def is_ready(self) -> bool:
        """Whether jobs are taken now."""
        return self.refusal is None

    @property
    def refusal(self) -> Failed | None:
        """Why none are; None if they are."""
        if self._jobs.is_closing:
            return SHUTTING_DOWN
        return None if self._thread.is_alive else GIVEN_UP

    def metrics(self) -> str:
        """What is measured on the model's side, in Prometheus' text format."""
        return self._metrics.as_text()

    async def run(self, job: Job) -> AsyncGenerator[Update, None]:
        """Updates of one job; see `trimode.serving.jobs.Backend`."""
        if self._jobs.is_closing:
            yield SHUTTING_DOWN
            return
        with self._jobs.one_more():
            try:
                make = self._infill if job.task == "infill" else self._generate
                updates = (self._tokenize if job.task in TASKS else make)(job)
                async with aclosing(updates):
                    async for update in updates:
                        yield update
            except (RequestError, UnsupportedError) as error:
                yield refused(job, error)
            except CapacityError as error:
                yield no_room(job, error)
            except Exception:
                if self._pool_is_shut:
                    yield SHUTTING_DOWN
                    return
                logger.exception("job failed", extra={"request_id": job.request_id})
                yield BROKEN

    async def close(self, *, timeout_s: float) -> None:
        """Take no more jobs, finish those that run until the time is up, abort the rest."""
        if not await self._jobs.drain(timeout_s):
            for ticket in self._tickets:
                self._thread.abort(ticket)
        await asyncio.get_running_loop().run_in_executor(None, self._thread.stop)
        self._pool_is_shut = True
        self._pool.shutdown(wait=False)  # what is in it still gets its answer

    async def _generate(self, job: Job) -> AsyncGenerator[Update, None]:
        ticket = Ticket(client=job.client, timeout_s=job.timeout_s)
        seq, remarks = await self._in_pool(lambda: self._sequence(job, ticket))
        ticket.seq = seq
        standing = StandingText(self._lm.growing_text(seq), stop=seq.params.stop)
        form = await self._in_pool(lambda: self._tool_form(job))
        forced = job.options.get("forced_call")
        held = CallAlone() if forced else standing
        vocabulary = self._vocabulary
        is_thinking = form is not None and form.is_thinking(vocabulary, seq.prompt_ids)
        text = (
            CallsHeldBack(vocabulary.tokenizer, form, standing, is_thinking=is_thinking)
            if form is not None
            else held
        )
        prompt = self._texts.prompt_text(seq, job.inputs) if job.wants_prompt else ""
        growing = self._lm.growing_text(seq)
        shown = NewLogprobs(self._texts, growing, num_chars=len(prompt))
        num_taken = 0
        is_owed_word, is_owed_prompt = job.wants_word, job.wants_prompt
        async with self._running(ticket):
            while True:
                await self._change(ticket)
                is_over, num_ready = ticket.is_over, ticket.num_ready
                if is_owed_word and ticket.is_taken:
                    is_owed_word = False
                    yield Accepted()
                while ticket.events:
                    if (happening := self._happening(ticket)) is not None:
                        yield happening
                if is_over:
                    break
                if num_ready > num_taken:
                    if is_owed_prompt:
                        is_owed_prompt = False
                        yield await self._prompt_piece(job, seq)
                    new_ids = seq.new_ids[num_taken:num_ready]
                    piece = text.push(new_ids, num_deaf=seq.num_deaf)
                    yield Piece(
                        piece,
                        tuple(seq.new_ids[max(num_taken, seq.num_inside) : num_ready]),
                        shown.push(seq, num_taken, num_ready),
                    )
                    num_taken = num_ready
        failed = self._failure(ticket)
        if failed is not None:
            yield failed
            return
        if is_owed_prompt:
            yield await self._prompt_piece(job, seq)
        generation = self._lm.generation(seq)
        content, calls = generation.text, list[ToolCall]()
        if form is not None:
            content, calls = read_calls(
                *(self._vocabulary, form, names_of(job.options["tools"])),
                text=content,
                token_ids=seq.new_ids,
                before=self._lm.growing_text(seq),
                is_thinking=is_thinking,
            )
        elif forced:
            content, calls = forced_call(forced, content)
        rest = text.finish(content)
        if rest or num_taken < len(seq.new_ids):
            token_ids = tuple(seq.new_ids[max(num_taken, seq.num_inside) :])
            yield Piece(rest, token_ids, shown.push(seq, num_taken, len(seq.new_ids)))
        mode = seq.params.mode
        self._metrics.note_done(mode, seq.stats, prompt_tokens=seq.num_prompt)
        if job.options.get("parallel_tool_calls") is False:
            calls = calls[:1]
        is_call = bool(calls) and generation.finish_reason == "stop"
        yield Done(
            text=prompt + content,
            token_ids=tuple(seq.new_ids[seq.num_inside :]),
            prompt_tokens=seq.num_prompt,
            finish_reason="tool_calls" if is_call else generation.finish_reason,
            tool_calls=tuple(calls),
            seed=seq.params.seed,
            mode=mode,
            stats=seq.stats,
            remarks=remarks,
        )

    async def _tokenize(self, job: Job) -> AsyncGenerator[Update, None]:
        yield await self._in_pool(lambda: tokenized(self._lm, self.card, job))

    async def _prompt_piece(self, job: Job, seq: Sequence) -> Piece:
        """The prompt of a sequence that has a first token, or has ended."""
        has_logprobs = job.wants_logprobs and seq.scores is not None
        return await self._in_pool(
            lambda: self._texts.prompt_piece(seq, job.inputs, has_logprobs=has_logprobs)
        )

    async def _infill(self, job: Job) -> AsyncGenerator[Update, None]:
        steps = infill_steps(self._lm, job.inputs, **job.options)
        prompt_tokens, spent_s = 0, 0.0
        while True:
            step = await self._in_pool(lambda: _advance(steps))
            if isinstance(step, Infilling):
                break
            left_s = None if job.timeout_s is None else max(job.timeout_s - spent_s, 0.0)
            ticket = Ticket(client=job.client, timeout_s=left_s)
            ticket.seq = step
            prompt_tokens += len(step.prompt_ids)
            async with self._running(ticket):
                while not ticket.is_over:
                    await self._change(ticket)
            spent_s += step.stats.seconds
            failed = self._failure(ticket)
            if failed is not None:
                yield failed
                return
        self._metrics.note_done("infill", step.stats, prompt_tokens=prompt_tokens)
        yield Done(
            text=step.text,
            token_ids=tuple(i for gap in step.gaps for i in gap.candidates[0].token_ids),
            prompt_tokens=prompt_tokens,
            finish_reason="stop",
            seed=step.seed,
            mode="infill",
            stats=step.stats,
            gaps=tuple(map(_gap_as_object, step.gaps)),
        )

    def _sequence(self, job: Job, ticket: Ticket) -> tuple[Sequence, tuple[str, ...]]:
        """The sequence of a job, and what its client should know of the prompt."""
        options: dict[str, Any] = {"mode": self.card.default_mode, **job.options}
        if options["mode"] == "auto" and "auto" not in self.card.modes:
            modes = ", ".join(self.card.modes)
            raise RequestError(f"mode is 'auto'; allowed: {modes}; auto is off here (--no-auto)")
        if job.task == "chat":
            check_chat(self.card)
            for name in ("parallel_tool_calls", "forced_call"):
                options.pop(name, None)
            options = answering(self._lm.vocabulary, job.inputs, options)
            prompt = options.pop("prompt")
        else:
            prompt = job.inputs
        encoded = self._lm.encode_prompt(
            prompt,
            heal=options.get("heal", "prompt_logprobs" not in options),
            at_character=any(name in options for name in GRAMMAR_KINDS),
            parse_special=options.get("parse_special", False),
        )
        num_prompt, context = encoded.num_tokens, self.card.context_len
        most = self._max_prompt_tokens
        if most is not None and num_prompt > most:
            raise RequestError(f"the prompt has {num_prompt} tokens; allowed here: {most}")
        check_room(context, num_prompt, 0 if options.get("max_new_tokens") == 0 else None)
        usual = job.usual_new_tokens or self._max_new_tokens
        usual = min(usual, max(context - encoded.most_tokens, 1))
        num_new = options.setdefault("max_new_tokens", usual)
        check_room(context, num_prompt, num_new)
        if job.wants_events:
            options["on_event"] = lambda _, event: ticket.note(event)
        options.setdefault("seed", secrets.randbits(32))
        sequence = self._lm.prepare(encoded.fitting(context - num_new), **options)
        return sequence, tuple(encoded.remarks)

    def _tool_form(self, job: Job) -> ToolForm | None:
        """How the template writes calls of the tools that a job offers; None without any."""
        is_free = "forced_call" not in job.options and job.options.get("tool_choice") != "none"
        has_tools = is_free and job.options.get("tools")
        return find_form(Renderer(self._vocabulary)) if has_tools else None

    @asynccontextmanager
    async def _running(self, ticket: Ticket) -> AsyncIterator[None]:
        """A ticket in the engine's hands; whoever leaves early has it aborted."""
        self._tickets.add(ticket)
        self._thread.submit(ticket)
        try:
            yield
        finally:
            self._tickets.discard(ticket)
            if not ticket.is_over:
                self._thread.abort(ticket)
                self._metrics.note_abort("cancelled")

    async def _change(self, ticket: Ticket) -> None:
        await ticket.changed.wait()
        ticket.changed.clear()

    async def _in_pool(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, _settled(call))

    def _failure(self, ticket: Ticket) -> Failed | None:
        """Why a ticket that is over gave no text, if so."""
        if ticket.error is not None:
            if isinstance(ticket.error, (RequestError, CapacityError, UnsupportedError)):
                raise ticket.error
            return SHUTTING_DOWN if self._jobs.is_closing else BROKEN
        seq = ticket.seq
        if seq.finish_reason != "abort":
            return None
        self._metrics.note_abort(seq.abort_reason or "error")
        if isinstance(seq.error, BufferError):
            return TOO_SLOW
        if seq.error is not None:
            logger.error("a watcher of a sequence raised", exc_info=seq.error)
        return ABORTS.get(seq.abort_reason or "", BROKEN)

    def _happening(self, ticket: Ticket) -> Happening | None:
        """The next event; None where it is about the prompt's end only."""
        event, num_forwards, new_tokens, elapsed_s = ticket.events.popleft()
        seq = ticket.seq
        start = event.position - seq.new_start
        if event.kind == "emit" and start < 0:
            return None
        masked = event.is_masked or (False,) * len(event.token_ids)
        return Happening(
            kind=event.kind,
            position=start,
            token_ids=event.token_ids,
            texts=tuple(
                "" if is_masked else self._texts.new(seq, start + i, token_id).text
                for i, (token_id, is_masked) in enumerate(zip(event.token_ids, masked, strict=True))
            ),
            is_masked=event.is_masked,
            num_accepted=event.num_accepted,
            old_texts=tuple(
                self._texts.new(seq, start + i, old_id).text
                for i, old_id in enumerate(event.old_ids)
            ),
            reason=event.reason,
            num_forwards=num_forwards,
            new_tokens=new_tokens,
            elapsed_s=elapsed_s,
        )


def _settled(call: Callable[[], T]) -> Callable[[], T]:
    """The call; a StopIteration of its is another error, for a future that gets one never ends."""

    def settled() -> T:
        try:
            return call()
        except StopIteration as error:
            raise RuntimeError("a call in the pool raised StopIteration") from error

    return settled


def _advance(steps: Generator[Sequence, None, Infilling]) -> Sequence | Infilling:
    """The next gap's sequence or, after the last, what came of all."""
    try:
        return next(steps)
    except StopIteration as end:
        found = end.value
        assert isinstance(found, Infilling)
        return found


def _gap_as_object(gap: FilledGap) -> dict[str, Any]:
    return {
        "start": gap.start,
        "text": gap.text,
        "candidates": [
            {
                "text": fill.text,
                "token_ids": list(fill.token_ids),
                "log_prob": fill.log_prob,
                "fill_log_prob": fill.fill_log_prob,
                "suffix_log_prob": fill.suffix_log_prob,
                "is_valid": fill.is_valid,
            }
            for fill in gap.candidates
        ],
    }


def _defaults(lm: TriModeLM, generation_config: str) -> GenerationDefaults:
    if generation_config == "auto":
        return lm.generation_defaults
    if generation_config == "none":
        return GenerationDefaults()
    return read_generation_defaults(Path(generation_config), lm.model.config, is_needed=True)
