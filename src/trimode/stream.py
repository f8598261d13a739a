"""Text of one continuation as it is made."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Items
from typing import Protocol

from trimode.decoding import Sequence, Stats
from trimode.detokenize import GrowingText, StandingText
from trimode.engine import Engine
from trimode.generation import Generation


class Writer(Protocol):
    """What a stream needs of a `TriModeLM`."""

    def engine(self, sequences: Items[Sequence]) -> Engine:
        """One just large enough for these, with them submitted."""
        ...

    def growing_text(self, seq: Sequence) -> GrowingText:
        """Of a sequence with a tokenizer."""
        ...

    def generation(self, seq: Sequence) -> Generation:
        """The result of one that has ended."""
        ...


class Stream(Iterator[str]):
    """Text of one continuation as it is made: iterate over it, and close it to stop early.

    Nothing runs between two pieces. Letting go of it frees what it holds, as `close` does.

    Args:
        lm: What writes.
        seq: New, made by `lm.prepare`.
        engine: Idle, to write with; None for one of its own.
    """

    def __init__(self, lm: Writer, seq: Sequence, *, engine: Engine | None = None) -> None:
        self._lm = lm
        self._seq = seq
        self._engine: Engine | None = engine or lm.engine([seq])
        if engine is not None:
            engine.submit(seq)
        self._text = StandingText(lm.growing_text(seq), stop=seq.params.stop)
        self._num_taken = 0

    @property
    def stats(self) -> Stats:
        """Counts so far."""
        return self._seq.stats

    def growing_text(self) -> GrowingText:
        """The text for one who pushes its tokens, as events bring them."""
        return self._lm.growing_text(self._seq)

    @property
    def generation(self) -> Generation | None:
        """The result, once it has ended; `finish_reason` is `abort` after an early `close`."""
        return self._lm.generation(self._seq) if self._seq.is_finished else None

    def close(self) -> None:
        """Stop, and free the K/V rows; what was not yielded yet is in `generation.text`."""
        if self._engine is not None:
            self._engine.abort(self._seq)
            self._engine = None

    def __next__(self) -> str:
        while self._engine is not None:
            try:
                self._engine.step()
                if self._seq.error is not None:
                    raise self._seq.error
            except BaseException:
                self.close()
                raise
            piece = self._next_piece()
            if piece:
                return piece
        raise StopIteration

    def _next_piece(self) -> str:
        if self._seq.is_finished:
            self._engine = None
            return self._text.finish(self._lm.generation(self._seq).text)
        new_ids = self._seq.new_ids[self._num_taken :]
        self._num_taken += len(new_ids)
        return self._text.push(new_ids, num_deaf=self._seq.num_deaf)
