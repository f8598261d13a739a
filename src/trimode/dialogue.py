"""A conversation of several turns: what was read and written stays in the K/V rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from trimode.decoding import Sequence
from trimode.engine import Engine
from trimode.engine.engine import cells_needed
from trimode.engine.planner import Planner
from trimode.errors import RequestError
from trimode.generation import Generation
from trimode.messages import Messages
from trimode.model import DrafterAdapter, TriModeModel
from trimode.prompts import Prompt
from trimode.stream import Stream, Writer

Turns = list[dict[str, str]]

FIRST_CELLS = 2048

MOST_NEW_TOKENS = 512
"""Of an answer, where neither options nor the model say; fewer where the context has no room."""


class Talker(Writer, Protocol):
    """What a conversation needs of a `TriModeLM`."""

    model: TriModeModel
    adapter: DrafterAdapter | None

    @property
    def planner(self) -> Planner:
        """Of mode `auto`."""
        ...

    def answering(self, messages: Messages, options: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of `prepare` that answer a conversation."""
        ...

    def prepare(self, prompt: Prompt, **options: Any) -> Sequence:
        """A sequence for an engine."""
        ...


class Dialogue:
    """A conversation whose K/V stay from one answer to the next.

    Every answer is that of `TriModeLM.chat` to all messages so far; what of them was fed before is
    not fed again.

    Args:
        lm: What answers.
        system: What the conversation begins with.
        options: Of `TriModeLM.chat`, for every answer that does not say otherwise.

    Attributes:
        messages: `{"role": ..., "content": ...}` so far. May be changed between answers.
        options: As given. May be changed between answers.
        latest: The latest answer, whole or as far as it came; None before the first.
    """

    def __init__(self, lm: Talker, *, system: str | None = None, **options: Any) -> None:
        self._lm = lm
        self._engine: Engine | None = None
        self._is_answering = False
        self.messages: Turns = []
        self.options = options
        self.latest: Generation | None = None
        if system is not None:
            self.messages.append({"role": "system", "content": system})

    def say(self, content: str, **options: Any) -> Iterator[str]:
        """Say something, and read the answer as it is made.

        The message and the answer are part of the conversation when the iterator has ended, or was
        closed early; then the answer is as far as it came.

        Args:
            content: The user's message.
            options: Of `TriModeLM.chat`, for this answer.

        Raises:
            RequestError: As `TriModeLM.chat`, or another answer is under way. Nothing was said.
        """
        messages = [*self.messages, {"role": "user", "content": content}]
        return self._answer(messages, self._prepared(messages, options))

    def check(self, **options: Any) -> None:
        """Refuse options that no answer could be given with.

        Raises:
            RequestError: As `say`.
        """
        self._prepared([{"role": "user", "content": ""}], options)

    def _prepared(self, messages: Turns, options: dict[str, Any]) -> Sequence:
        arguments = self._lm.answering(messages, self.options | options)
        room = self._lm.model.config.max_position_embeddings - arguments["prompt"].most_tokens
        arguments.setdefault("max_new_tokens", max(1, min(MOST_NEW_TOKENS, room)))
        return self._lm.prepare(**arguments)

    def _answer(self, messages: Turns, seq: Sequence) -> Iterator[str]:
        if self._is_answering:
            raise RequestError("an answer is under way; read it to its end, or close it, first")
        self._is_answering = True
        stream = Stream(self._lm, seq, engine=self._engine_for(seq))
        try:
            yield from stream
        except (GeneratorExit, KeyboardInterrupt):
            stream.close()
            self._keep(messages, stream)
            raise
        finally:
            self._is_answering = False
        self._keep(messages, stream)

    def _keep(self, messages: Turns, stream: Stream) -> None:
        self.latest = stream.generation
        assert self.latest is not None
        self.messages = [*messages, {"role": "assistant", "content": self.latest.text}]

    def _engine_for(self, seq: Sequence) -> Engine:
        """The one there is, or a larger one, which feeds the conversation anew."""
        needed, is_auto = cells_needed(seq), seq.params.mode == "auto"
        engine = self._engine
        if engine is None or needed > engine.num_cells or (is_auto and not engine.has_planner):
            context = self._lm.model.config.max_position_embeddings
            self._engine = None  # not both at a time
            self._engine = engine = Engine(
                self._lm.model,
                num_rows=1,
                num_cells=max(needed, min(max(2 * needed, FIRST_CELLS), context)),
                adapter=self._lm.adapter,
                planner=self._lm.planner if is_auto else None,
            )
        return engine
