"""The one thread that owns an engine, and what it shares with asyncio: a `Ticket` per sequence."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial

from trimode.decoding import Event, Sequence
from trimode.engine import Engine

logger = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3
"""Steps in a row that may fail as a whole before the thread gives up."""

MAX_EVENTS = 20_000
"""Events that wait for a reader who does not take them; then the sequence is aborted."""


class Ticket:
    """A sequence on its way through the engine, as asyncio sees it.

    The engine's thread writes, asyncio reads: `num_ready` tokens of `seq.new_ids` may be read, and
    after `is_over` all of `seq`.

    Attributes:
        seq: What is decoded.
        num_ready: Tokens that may be read.
        events: Each with the forwards, new tokens and seconds until then; the reader takes them
            from the left.
        is_taken: The engine has it, or had it.
        is_over: Nothing more will come.
        error: Why the sequence was not taken, or that the thread broke down; None if it ended in
            its own way (`seq.finish_reason`).
    """

    def __init__(self, *, client: str, timeout_s: float | None) -> None:
        self.client = client
        self.timeout_s = timeout_s
        self.num_ready = 0
        self.events: deque[tuple[Event, int, int, float]] = deque()
        self.is_taken = False
        self.is_over = False
        self.error: Exception | None = None
        self.submitted_s = time.perf_counter()
        self.loop = asyncio.get_running_loop()
        self.changed = asyncio.Event()
        self._seq: Sequence | None = None

    @property
    def seq(self) -> Sequence:
        assert self._seq is not None
        return self._seq

    @seq.setter
    def seq(self, seq: Sequence) -> None:
        self._seq = seq

    def note(self, event: Event) -> None:
        """A sequence's `on_event`."""
        if len(self.events) >= MAX_EVENTS:
            raise BufferError(f"{MAX_EVENTS} events wait and nobody reads them")
        counts = self.seq.stats.num_forwards, len(self.seq.new_ids)
        self.events.append((event, *counts, time.perf_counter() - self.submitted_s))


class EngineThread:
    """Runs an engine: sleeps while there is nothing to do, wakes at once when there is.

    Args:
        engine: From now on this thread's alone.
        on_step: Called in the thread after every step, with how many sequences ended in it.
    """

    def __init__(self, engine: Engine, *, on_step: Callable[[int], None] | None = None) -> None:
        self.engine = engine
        self._on_step = on_step
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._tickets: dict[int, Ticket] = {}  # by the id of their sequence
        self._changed: list[Ticket] = []
        self._failure: Exception | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._main, name="trimode-engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether sequences are taken."""
        return self._failure is None and self._thread.is_alive()

    def submit(self, ticket: Ticket) -> None:
        """Hand over a sequence; what becomes of it is written to its ticket."""
        self._ask(partial(self._take, ticket), ticket)

    def abort(self, ticket: Ticket) -> None:
        """Have a sequence stopped before the next step, if it runs."""
        self._ask(partial(self._drop, ticket), ticket)

    def stop(self) -> None:
        """End the thread; waits for the step it is in."""
        self._commands.put(None)
        self._thread.join()

    def _ask(self, command: Callable[[], None], ticket: Ticket) -> None:
        with self._lock:
            if self._failure is None:
                self._commands.put(command)
                return
        ticket.error, ticket.is_over = self._failure, True
        ticket.changed.set()

    def _main(self) -> None:
        num_failed = 0
        try:
            while self._obey():
                try:
                    ended = self.engine.step()
                    num_failed = 0
                except Exception as error:
                    logger.exception("a step of the engine failed; all that ran are aborted")
                    num_failed += 1
                    self._fail_all(error)
                    if num_failed == MAX_FAILED_STEPS:
                        raise
                    continue
                self._note(ended)
                if self._on_step is not None:
                    self._on_step(len(ended))
            self._give_up(RuntimeError("the engine was stopped"))
        except Exception as error:
            logger.critical("the engine's thread ends: %s", error)
            self._give_up(error)

    def _obey(self) -> bool:
        """Do what was asked for; waits while there is nothing else to do. False: to stop."""
        while True:
            self._publish()
            try:
                command = self._commands.get(block=self.engine.is_idle)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()

    def _take(self, ticket: Ticket) -> None:
        try:
            self.engine.submit(ticket.seq, client=ticket.client, timeout_s=ticket.timeout_s)
            self._tickets[id(ticket.seq)] = ticket
            ticket.is_taken = True
            self._changed.append(ticket)
        except Exception as error:
            self._end(ticket, error)

    def _drop(self, ticket: Ticket) -> None:
        if self._tickets.pop(id(ticket.seq), None) is not None:
            self.engine.abort(ticket.seq)
            self._end(ticket, None)

    def _note(self, ended: list[Sequence]) -> None:
        """Write down what a step did."""
        for seq in ended:
            self._end(self._tickets.pop(id(seq)), None)
        for ticket in self._tickets.values():
            if ticket.events or len(ticket.seq.new_ids) > ticket.num_ready:
                ticket.num_ready = len(ticket.seq.new_ids)
                self._changed.append(ticket)

    def _end(self, ticket: Ticket, error: Exception | None) -> None:
        ticket.num_ready = len(ticket.seq.new_ids)
        ticket.error = error
        ticket.is_over = True
        self._changed.append(ticket)

    def _publish(self) -> None:
        """Wake the readers of what changed."""
        changed, self._changed = self._changed, []
        for loop in {ticket.loop for ticket in changed}:
            events = [ticket.changed for ticket in changed if ticket.loop is loop]
            try:
                loop.call_soon_threadsafe(_set_all, events)
            except RuntimeError:  # the loop is closed, so nobody reads
                for ticket in changed:
                    if ticket.loop is loop:
                        self._drop(ticket)

    def _fail_all(self, error: Exception) -> None:
        for ticket in list(self._tickets.values()):
            self.engine.abort(ticket.seq, "error")
            self._end(ticket, error)
        self._tickets.clear()

    def _give_up(self, error: Exception) -> None:
        """Take no more; whoever waits is told."""
        with self._lock:
            self._failure = error
        self._fail_all(error)
        while True:
            try:
                command = self._commands.get(block=False)
            except queue.Empty:
                break
            if isinstance(command, partial):
                self._end(command.args[0], error)
        self._publish()


def _set_all(events: list[asyncio.Event]) -> None:
    for event in events:
        event.set()
