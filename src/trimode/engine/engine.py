"""The loop, written once: admit, gather what every sequence yields, one forward, resume each."""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass

from trimode.decoding import Readout, Sequence, Step, life
from trimode.decoding.modes import Steps
from trimode.engine.runner import Feed, Runner
from trimode.errors import CapacityError
from trimode.model import DrafterAdapter, KVCache, TriModeModel

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Running:
    """A sequence that owns a row: its suspended generator and the step it waits on."""

    seq: Sequence
    row: int
    steps: Steps
    step: Step
    started_s: float


class Engine:
    """Decodes many sequences together, each in its own mode, at its own length.

    Args:
        model: The network, in evaluation mode, on the device and in the dtype to run in.
        num_rows: Sequences that run together; more wait in the order submitted.
        num_cells: Cells per row: prompt, new tokens and one block must fit.
        adapter: The drafter adapter, on for draft tokens only.

    Raises:
        CapacityError: the K/V rows do not fit into memory, or a sequence into a row.
    """

    def __init__(
        self,
        model: TriModeModel,
        *,
        num_rows: int,
        num_cells: int,
        adapter: DrafterAdapter | None = None,
    ) -> None:
        if num_rows < 1 or num_cells < 1:
            raise CapacityError(
                f"num_rows is {num_rows} and num_cells {num_cells}; allowed: at least 1"
            )
        weight = model.encoder.embed_tokens.weight
        cache = KVCache(
            model.config,
            num_rows=num_rows,
            num_cells=num_cells,
            device=weight.device,
            dtype=weight.dtype,
        )
        self._num_cells = num_cells
        self._runner = Runner(model, cache, adapter=adapter)
        self._free_rows = list(range(num_rows))
        self._waiting: deque[tuple[Sequence, float]] = deque()
        self._running: list[_Running] = []

    @property
    def is_idle(self) -> bool:
        return not (self._waiting or self._running)

    def submit(self, seq: Sequence) -> None:
        """Queue a sequence; it starts in the first step that has a row for it."""
        if seq.length or seq.is_finished or seq in self._sequences():
            raise AssertionError("a sequence is submitted once")
        needed = cells_needed(seq)
        if needed > self._num_cells:
            raise CapacityError(
                f"prompt of {len(seq.prompt_ids)} + max_new_tokens={seq.params.max_new_tokens} + "
                f"blocks of {seq.params.block_length} need {needed} cells in mode {seq.mode!r}; a "
                f"row has {self._num_cells}"
            )
        self._waiting.append((seq, time.perf_counter()))

    def step(self) -> list[Sequence]:
        """Advance every running sequence by one forward.

        Returns:
            The sequences that finished in it.

        Raises:
            Exception: What a sequence's own `on_event` raised. That sequence is aborted, all others
                have advanced.
        """
        self._admit()
        if not self._running:
            return []
        before = list(self._running)
        feeds = [Feed(running.seq, running.row, running.step) for running in before]
        readouts = self._runner.run(feeds)
        failures = []
        for running, readout in zip(before, readouts, strict=True):
            try:
                _resume(running, readout)
            except Exception as error:
                running.seq.finish_reason = "abort"
                failures.append(error)
            if running.seq.is_finished:
                self._release(running)
        if failures:
            raise failures[0]
        return [running.seq for running in before if running.seq.is_finished]

    def abort(self, seq: Sequence) -> None:
        """Stop a sequence between steps, waiting or running; its row is free at once."""
        seq.finish_reason = seq.finish_reason or "abort"
        self._waiting = deque(entry for entry in self._waiting if entry[0] is not seq)
        for running in [running for running in self._running if running.seq is seq]:
            self._release(running)

    def _sequences(self) -> list[Sequence]:
        return [seq for seq, _ in self._waiting] + [running.seq for running in self._running]

    def _admit(self) -> None:
        while self._waiting and self._free_rows:
            seq, started_s = self._waiting.popleft()
            steps = life(seq)
            row = self._free_rows.pop(0)
            seq.num_cells = self._num_cells
            self._running.append(_Running(seq, row, steps, next(steps), started_s))

    def _release(self, running: _Running) -> None:
        running.steps.close()
        running.seq.stats.seconds = time.perf_counter() - running.started_s
        self._running.remove(running)
        self._free_rows.append(running.row)
        self._free_rows.sort()


def _resume(running: _Running, readout: Readout | None) -> None:
    """Hand a sequence its answers; it acts on them and says what it needs next."""
    seq, step = running.seq, running.step
    seq.stats.count(step.kind, len(step.token_ids))
    if readout is None:
        logger.error(
            "sequence aborted: the network gave non-finite logits in a %s forward", step.kind
        )
        seq.finish_reason = "abort"
        return
    seq.num_committable = step.num_committable
    try:
        running.step = running.steps.send(readout)
    except StopIteration:
        assert seq.is_finished


def cells_needed(seq: Sequence) -> int:
    """Cells a sequence may touch: a last block starts at most at the last token, groups lie behind
    it: those of its mode and of the one it was made for, which it may go back to. A gap's canvases
    lie side by side behind the prompt."""
    params = seq.params
    if seq.gap is not None:
        return len(seq.prompt_ids) + seq.gap.num_fed
    num_groups = max(params.branching(mode)[0] for mode in (seq.mode, params.mode))
    return len(seq.prompt_ids) + params.max_new_tokens + params.block_length * (1 + num_groups)
