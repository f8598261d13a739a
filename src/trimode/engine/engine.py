"""The loop, written once: admit, take what every sequence yields, one forward, resume each."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from trimode.decoding import Readout, Sequence, Step, life
from trimode.decoding.modes import Steps
from trimode.engine.planner import Planner
from trimode.engine.rows import Rows
from trimode.engine.runner import Feed, Runner
from trimode.engine.scheduler import PREFILL_SHARE, Demand, Waiting, WaitingList, share
from trimode.errors import CapacityError, ConfigError, RequestError
from trimode.model import DrafterAdapter, TriModeModel
from trimode.model.adapter import PUBLISHED_FORM

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Running:
    """A sequence that owns a row: its suspended generator and the step it waits on.

    Attributes:
        fed_at: The forward in which it was fed last.
        since_s: When it got the row.
        num_before: Tokens it had emitted then.
        is_between_rounds: Whether its step is the first of a round, so that nothing is lost if it
            never runs.
    """

    seq: Sequence
    row: int
    steps: Steps
    step: Step
    entry: Waiting
    fed_at: int
    since_s: float
    num_before: int
    is_between_rounds: bool = False


@dataclass(slots=True)
class Counts:
    """What an engine has done so far.

    Attributes:
        forwards: Model calls.
        tokens_fed: Tokens in them.
        reused_tokens: Tokens that needed not be fed, since their K/V lay in a row already.
        preemptions: Times a sequence had to give its row to another.
        finished: Sequences that ended, aborted ones included.
    """

    forwards: int = 0
    tokens_fed: int = 0
    reused_tokens: int = 0
    preemptions: int = 0
    finished: int = 0


class Engine:
    """Decodes many sequences together, each in its own mode, at its own length.

    Not thread-safe: one thread owns it.

    Args:
        model: The network, in evaluation mode, on the device and in the dtype to run in.
        num_rows: Sequences that run together; more wait.
        num_cells: Cells per row: prompt, new tokens and one block must fit.
        adapter: The drafter adapter, on for draft tokens only.
        token_budget: Tokens of one forward, so that a long prompt is fed in several and holds
            nobody up; None for no limit.
        max_step_tokens: Tokens that one sequence may feed in a forward, prompts aside, which are
            cut; None for no limit.
        max_waiting: Sequences that may wait for a row; None for no limit.
        time_slice: Tokens after which a sequence gives its row to one that waits, to go on later;
            None for never.
        planner: Of the rounds of sequences in mode `auto`.
        clock: Seconds, for deadlines.

    Raises:
        CapacityError: the K/V rows do not fit into memory.
        ConfigError: a number is out of its range.
    """

    def __init__(
        self,
        model: TriModeModel,
        *,
        num_rows: int,
        num_cells: int,
        adapter: DrafterAdapter | None = None,
        token_budget: int | None = None,
        max_step_tokens: int | None = None,
        max_waiting: int | None = None,
        time_slice: int | None = None,
        planner: Planner | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if num_rows < 1 or num_cells < 1:
            raise CapacityError(
                f"num_rows is {num_rows} and num_cells {num_cells}; allowed: at least 1"
            )
        least = PREFILL_SHARE * num_rows
        if token_budget is not None and token_budget < least:
            raise ConfigError(
                f"token_budget is {token_budget}; allowed: at least {least}, which is"
                f" {PREFILL_SHARE} for each of {num_rows} rows"
            )
        if max_waiting is not None and max_waiting < 0:
            raise ConfigError(f"max_waiting is {max_waiting}; allowed: at least 0")
        if time_slice is not None and time_slice < 1:
            raise ConfigError(f"time_slice is {time_slice}; allowed: at least 1")
        self._form = PUBLISHED_FORM if adapter is None else adapter.form
        cache = model.new_cache(num_rows=num_rows, num_cells=num_cells)
        self.num_rows = num_rows
        self.num_cells = num_cells
        self.counts = Counts()
        self._runner = Runner(model, cache, adapter=adapter)
        self._rows = Rows(num_rows, copy_prefix=self._runner.copy_prefix)
        self._token_budget = token_budget
        self._max_step_tokens = max_step_tokens
        self._max_waiting = max_waiting
        self._time_slice = time_slice
        self._planner = planner
        self._clock = clock
        self._waiting = WaitingList()
        self._running: list[_Running] = []
        self._ended: list[Sequence] = []  # not returned by `step` yet
        self._held_s = 0.0  # by sequences that had a row, all together

    @property
    def has_planner(self) -> bool:
        """Whether there is mode `auto`."""
        return self._planner is not None

    @property
    def is_idle(self) -> bool:
        """Whether a step has nothing to do and nothing to return."""
        return not (self._waiting or self._running or self._ended)

    @property
    def num_waiting(self) -> int:
        """Sequences without a row."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences with a row."""
        return len(self._running)

    def submit(self, seq: Sequence, *, client: str = "", timeout_s: float | None = None) -> None:
        """Queue a sequence; it starts in the first step that has a row for it.

        Args:
            seq: New.
            client: Whose it is; clients share the rows evenly.
            timeout_s: Seconds from now after which it is aborted.

        Raises:
            CapacityError: it never fits into a row or a forward, or too many wait
                (`retry_after_s`).
            RequestError: it is in mode `auto`, and there is no planner; `timeout_s` is no time.
        """
        if seq.length or seq.is_finished or seq in self._sequences():
            raise AssertionError("a sequence is submitted once")
        if seq.form != self._form:
            raise AssertionError(f"made for an adapter that is {seq.form}, not {self._form}")
        if self._planner is None and "auto" in (seq.mode, seq.params.mode):
            raise RequestError("mode is 'auto'; allowed: another, since this engine has no planner")
        if timeout_s is not None and not timeout_s >= 0:
            raise RequestError(f"timeout_s is {timeout_s}; allowed: None, or seconds, at least 0")
        widest, params = widest_step(seq), seq.params
        masks = "" if params.skip_masks is None else f", skip_masks={params.skip_masks}"
        if self._max_step_tokens is not None and widest > self._max_step_tokens:
            what = f"block_length={params.block_length}{masks} in mode {seq.mode!r}"
            what = what if seq.gap is None else f"lengths of up to {max(seq.gap.lengths)}"
            raise CapacityError(
                f"{what} would feed {widest} tokens in a forward; allowed: at most"
                f" {self._max_step_tokens}"
            )
        needed = cells_needed(seq)
        if needed > self.num_cells:
            raise CapacityError(
                f"prompt of {len(seq.prompt_ids)} + max_new_tokens={params.max_new_tokens} + "
                f"blocks of {params.block_length}{masks} need {needed} cells in mode {seq.mode!r};"
                f" a row has {self.num_cells}"
            )
        if self._max_waiting is not None and len(self._waiting) >= self._max_waiting + (
            self._rows.num_free
        ):
            raise CapacityError(
                f"{self.num_rows} requests may run and {self._max_waiting} wait, and there are"
                f" {len(self._running) + len(self._waiting)}",
                retry_after_s=self._seconds_each() * (1 + len(self._waiting)),
            )
        now = self._clock()
        self._waiting.add(Waiting(seq, client, now, None if timeout_s is None else now + timeout_s))

    def step(self) -> list[Sequence]:
        """Advance the running sequences by one forward, all that fit its budget.

        Where the forward itself fails (memory, say), every sequence is left as it was, and the next
        step tries again.

        Returns:
            The sequences that ended in it, for whatever reason. One whose own `on_event` raised has
            that as its `error`; nothing of it is raised here.
        """
        self._abort_late()
        self._admit()
        self._preempt()
        served = self._served()
        started_s = time.perf_counter()
        readouts = self._run(served) if served else []
        for (running, step), readout in zip(served, readouts, strict=True):
            self._resume(running, step, readout)
            if running.seq.is_finished:
                self._release(running, is_clean=readout is not None)
                self._ended.append(running.seq)
        if served and self._planner is not None:
            self._planner.note_seconds(time.perf_counter() - started_s)
        ended, self._ended = self._ended, []
        return ended

    def run(self) -> None:
        """Step until nothing is left.

        Raises:
            Exception: What a sequence's own `on_event` raised; the others can go on.
        """
        while not self.is_idle:
            for seq in self.step():
                if seq.error is not None:
                    raise seq.error

    def abort(self, seq: Sequence, reason: str = "cancelled") -> None:
        """Stop a sequence between steps, waiting or running; its row is free at once. No step
        returns it."""
        seq.abort(reason)
        self._ended = [one for one in self._ended if one is not seq]
        waited = self._waiting.remove(seq)
        if waited is not None:
            self._end(waited)
        for running in [running for running in self._running if running.seq is seq]:
            self._release(running)

    def _sequences(self) -> list[Sequence]:
        return [entry.seq for entry in self._waiting] + [one.seq for one in self._running]

    def _seconds_each(self) -> float:
        """Between one sequence that ends and the next while all rows are taken, going by those that
        ended so far; 1 before any has had a row."""
        num_finished = self.counts.finished
        each_s = self._held_s / num_finished / self.num_rows if num_finished else 0.0
        return each_s or 1.0

    def _abort_late(self) -> None:
        now = self._clock()
        entries = [*self._waiting, *(running.entry for running in self._running)]
        for entry in entries:
            if entry.deadline_s is not None and entry.deadline_s <= now:
                self.abort(entry.seq, "deadline")
                self._ended.append(entry.seq)

    def _admit(self) -> None:
        """Give what rows are free to those that wait."""
        while self._waiting and self._rows.num_free:
            entry = self._waiting.next(running.entry.client for running in self._running)
            seq = entry.seq
            row = self._rows.take(seq, [*seq.prompt_ids, *seq.new_ids[:-1]])
            self._waiting.remove(seq)
            self.counts.reused_tokens += seq.length
            seq.num_cells = self.num_cells
            seq.choose_setting = None if self._planner is None else self._planner.choose
            steps = life(seq)
            running = _Running(
                *(seq, row, steps, next(steps), entry),
                fed_at=self.counts.forwards,
                since_s=self._clock(),
                num_before=len(seq.new_ids),
            )
            self._running.append(running)

    def _preempt(self) -> None:
        """Those whose time slice is over give their rows to others that wait, one after another,
        so that each sees whom the rows went to before."""
        if self._time_slice is None or not self._waiting:
            return
        preempted = []
        try:
            for running in list(self._running):
                seq, client = running.seq, running.entry.client
                num_new = len(seq.new_ids) - running.num_before
                if num_new < self._time_slice or not running.is_between_rounds:
                    continue
                clients = [one.entry.client for one in self._running if one is not running]
                if self._waiting.has_one_for(client, clients):
                    self._take_row(running)
                    seq.length = 0
                    seq.stats.num_preemptions += 1
                    self.counts.preemptions += 1
                    preempted.append(running.entry)
                    self._admit()
        finally:
            for entry in preempted:
                self._waiting.add(entry)

    def _served(self) -> list[tuple[_Running, Step]]:
        """Who is fed in the next forward, and what."""
        demands = [
            Demand(len(one.step.token_ids), one.step.kind == "prefill", one.fed_at)
            for one in self._running
        ]
        served = []
        for one, num_tokens in zip(self._running, share(demands, self._token_budget), strict=True):
            if num_tokens:
                is_whole = num_tokens == len(one.step.token_ids)
                served.append((one, one.step if is_whole else one.step.head(num_tokens)))
        return served

    def _run(self, served: list[tuple[_Running, Step]]) -> list[Readout | None]:
        readouts = self._runner.run([Feed(one.seq, one.row, step) for one, step in served])
        num_tokens = sum(len(step.token_ids) for _, step in served)
        self.counts.forwards += 1
        self.counts.tokens_fed += num_tokens
        for one, _ in served:
            one.fed_at = self.counts.forwards
        if self._planner is not None:
            drafts = any(any(step.mask_places) for _, step in served)
            self._planner.note_forward([one.seq for one, _ in served], num_tokens, drafts=drafts)
        return readouts

    def _resume(self, running: _Running, step: Step, readout: Readout | None) -> None:
        """Hand a sequence its answers; it acts on them and says what it needs next."""
        seq = running.seq
        seq.stats.count(step.kind, len(step.token_ids))
        if readout is None:
            logger.error(
                "sequence aborted: the network gave non-finite logits in a %s forward", step.kind
            )
            seq.abort("non_finite")
            return
        seq.num_committable = step.num_committable
        num_rounds = seq.num_rounds
        try:
            running.step = running.steps.send(readout)
            running.is_between_rounds = seq.num_rounds > num_rounds
        except StopIteration:
            assert seq.is_finished
        except Exception as error:
            seq.abort("error", error)

    def _release(self, running: _Running, *, is_clean: bool = True) -> None:
        self._take_row(running, is_clean=is_clean)
        self._end(running.entry)

    def _take_row(self, running: _Running, *, is_clean: bool = True) -> None:
        running.steps.close()
        self._running.remove(running)
        self._rows.give_back(running.row, is_clean=is_clean)
        self._held_s += self._clock() - running.since_s

    def _end(self, entry: Waiting) -> None:
        entry.seq.stats.seconds = self._clock() - entry.submitted_s
        self.counts.finished += 1


def widest_step(seq: Sequence) -> int:
    """Tokens of the largest forward that a sequence may ask for, its prompt aside."""
    if seq.gap is not None:
        return seq.gap.num_fed
    modes = (seq.mode, seq.params.mode)
    return max(seq.params.setting(mode, seq.form).num_fed for mode in modes)


def cells_needed(seq: Sequence) -> int:
    """Cells a sequence may touch: its largest forward starts at most at the last token, in its mode
    or in the one it was made for, which it may go back to. A gap's canvases lie side by side behind
    the prompt."""
    params = seq.params
    if seq.gap is not None:
        return len(seq.prompt_ids) + seq.gap.num_fed
    most = max(widest_step(seq), params.block_length)
    num_owed = 0 if seq.healing is None else len(seq.healing.owed)  # a token for each byte
    return len(seq.prompt_ids) + num_owed + params.max_new_tokens + most
