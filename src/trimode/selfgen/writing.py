"""The run itself: prompts and answers share one engine, whose rows are kept busy.

Outcomes are handed out in the order of their index, so that which prompts are duplicates, and
which conversations are the first `num`, does not depend on what ran beside what.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from trimode.conversation import asking
from trimode.decoding import Sequence
from trimode.decoding.step import TokenLogprobs
from trimode.engine import Engine
from trimode.engine.engine import cells_needed
from trimode.errors import ConfigError, RequestError
from trimode.runtime import TriModeLM
from trimode.selfgen.options import SelfgenOptions
from trimode.selfgen.outcome import ABOUT_PROMPTS, Outcome, Record, Tally
from trimode.selfgen.prompt_file import Messages
from trimode.selfgen.repeats import PromptsSeen, is_loop

_LEAST_INDEXES, _LEAST_SHARE = 200, 0.02
"""A model is given up if fewer of its conversations are kept, once so many indexes are known."""

_LOOP_CHECK_EVERY = 8
_LOGPROB_DIGITS = 3


@dataclass(frozen=True, slots=True)
class _Written:
    """A sequence and what it is for.

    Attributes:
        seq: Of a prompt or of an answer.
        index: Whose.
        messages: What is answered; None for a prompt.
    """

    seq: Sequence
    index: int
    messages: Messages | None


class Writing:
    """A run of self-generation.

    Args:
        lm: The model, with a tokenizer that has a chat template.
        options: What to write.
        batch: Sequences that run together; it changes the speed, not the text.
        prompts: To be answered; None: the model writes them.
        before: Outcomes of an earlier run with the same options, index 0 first.
        early: Further ones, of any later index.

    Attributes:
        tally: Counts of all outcomes in order, earlier ones included.

    Raises:
        ConfigError: The options do not fit the model, or to each other.
        RequestError: There is no chat template, or it does not show the user's turn.
        CapacityError: The batch does not fit into memory.
    """

    def __init__(
        self,
        lm: TriModeLM,
        options: SelfgenOptions,
        *,
        batch: int,
        prompts: list[Messages] | None = None,
        before: Iterable[Outcome] = (),
        early: Iterable[Outcome] = (),
    ) -> None:
        if prompts is None and options.num is None:
            raise ConfigError("num is None; allowed: at least 1, since the model writes prompts")
        self.tally = Tally()
        self._lm, self._options, self._prompts, self._batch = lm, options, prompts, batch
        self._seen = PromptsSeen(threshold=options.near_duplicates)
        for outcome in before:
            self._remember(outcome)
            self.tally.add(outcome)
        if options.num is not None and self.tally.num_kept > options.num:
            raise ConfigError(
                f"num is {options.num}; allowed: at least {self.tally.num_kept}, the conversations"
                " that are there"
            )
        self._next_index = self._next_judged = self.tally.num_indexes
        self._candidates: dict[int, Messages | Outcome] = {}  # not compared with earlier ones yet
        self._ready: deque[_Written] = deque()  # answers that wait for a row
        self._running: dict[int, _Written] = {}  # by the id of the sequence
        self._outcomes: dict[int, Outcome] = {}  # behind an index that is still open
        self._early = {outcome.index: outcome for outcome in early}
        self._new: list[Outcome] = []
        self._num_tokens = {"prompt": 0, "answer": 0}  # of sequences that ended
        self._asking = None if prompts is not None else self._plan_of_prompts()
        example = self._answer(0, [*self._opening(), {"role": "user", "content": "x"}])
        self._most_prompt_ids = len(example.prompt_ids) + options.max_prompt_tokens
        widest = [cells_needed(example) + options.max_prompt_tokens]
        if self._asking is not None:
            widest.append(cells_needed(lm.prepare(**self._asking)))
        context = lm.model.config.max_position_embeddings
        if self._most_prompt_ids + options.max_answer_tokens > context:
            raise ConfigError(
                f"max_prompt_tokens={options.max_prompt_tokens}"
                f" + max_answer_tokens={options.max_answer_tokens} + the chat template are beyond"
                f" the context of {context}"
            )
        self._engine = Engine(lm.model, num_rows=batch, num_cells=max(widest), adapter=lm.adapter)
        assert lm.tokenizer is not None  # `_answer` refuses its absence
        added = lm.tokenizer.added_tokens_decoder.items()
        self._special = {token_id for token_id, token in added if token.special}

    @property
    def is_finished(self) -> bool:
        """Whether every conversation that was asked for is there."""
        is_full = self._options.num is not None and self.tally.num_kept >= self._options.num
        return is_full or self.tally.num_indexes == self._num_indexes

    def num_tokens(self, what: str) -> int:
        """Tokens of `prompt`s or `answer`s written in this run, unfinished and dropped ones too."""
        running = (one for one in self._running.values() if _kind(one) == what)
        return self._num_tokens[what] + sum(len(one.seq.new_ids) for one in running)

    def steps(self) -> Iterator[tuple[list[Outcome], list[Outcome]]]:
        """Write until all is there; yields after every forward.

        Yields:
            The outcomes whose turn it is, in the order of their index, often none; and new ones
            that wait for those before them.

        Raises:
            RequestError: Next to nothing of what the model writes can be kept.
        """
        while not self.is_finished:
            self._check_worth()
            self._fill()
            for seq in self._engine.step():
                self._end(self._running.pop(id(seq)))
            if not self._options.keeps_loops:
                self._abort_loops()
            self._judge()
            settled = self._settled()
            waiting = [one for one in self._new if one.index in self._outcomes]
            self._new = []
            yield settled, waiting

    @property
    def _num_indexes(self) -> int | None:
        return None if self._prompts is None else len(self._prompts)

    def _plan_of_prompts(self) -> dict[str, Any]:
        options = self._options
        settings = {
            "mode": "ar",
            "max_new_tokens": options.max_prompt_tokens,
            "temperature": options.prompt_temperature,
            "top_p": options.prompt_top_p,
        }
        return asking(self._lm.vocabulary, settings, system=options.system)

    def _answer(self, index: int, messages: Messages) -> Sequence:
        """The sequence that answers; RequestError if the template refuses the messages."""
        options = self._options
        settings = {
            "mode": "ar",
            "max_new_tokens": options.max_answer_tokens,
            "temperature": options.temperature(index),
            "seed": options.seed_of(index, "answer"),
            "logprobs": options.top_logprobs or None,
        }
        return self._lm.prepare(**self._lm.answering(messages, settings))

    def _opening(self) -> Messages:
        """What stands before the user's message."""
        system = self._options.system
        return [] if system is None else [{"role": "system", "content": system}]

    def _check_worth(self) -> None:
        num, num_kept = self.tally.num_indexes, self.tally.num_kept
        if self._prompts is None and num >= _LEAST_INDEXES and num_kept < _LEAST_SHARE * num:
            raise RequestError(
                f"this model does not write conversations worth keeping: {self.tally.line()}"
            )

    def _fill(self) -> None:
        """Give every free row something to do: answers first, then further prompts."""
        while len(self._running) < self._batch:
            if self._ready:
                self._submit(self._ready.popleft())
            elif self._wants_index():
                self._begin(self._next_index)
                self._next_index += 1
            else:
                break

    def _wants_index(self) -> bool:
        """Whether one more is likely to be needed; a wrong guess costs time alone."""
        if self._next_index == self._num_indexes:
            return False
        if self._options.num is None:
            return True
        share = (self.tally.num_kept + 1) / (self.tally.num_indexes + 1)
        num_open = self._next_index - self.tally.num_indexes
        return num_open * share < self._options.num - self.tally.num_kept

    def _begin(self, index: int) -> None:
        """Have the prompt of an index written, or take the given one, or an early outcome."""
        if index in self._early:
            self._candidates[index] = self._early.pop(index)
            self._judge()
            return
        if self._asking is not None:
            seed = self._options.seed_of(index, "prompt")
            self._submit(_Written(self._lm.prepare(**self._asking, seed=seed), index, None))
            return
        assert self._prompts is not None
        messages = self._prompts[index]
        opening = [] if messages[0]["role"] == "system" else self._opening()
        self._candidates[index] = [*opening, *messages]
        self._judge()

    def _submit(self, written: _Written) -> None:
        self._engine.submit(written.seq)
        self._running[id(written.seq)] = written

    def _end(self, written: _Written) -> None:
        self._num_tokens[_kind(written)] += len(written.seq.new_ids)
        if written.messages is None:
            self._candidates[written.index] = self._prompt_written(written)
        else:
            self._put(self._answer_written(written))

    def _abort_loops(self) -> None:
        for one in list(self._running.values()):
            new_ids = one.seq.new_ids
            is_due = one.messages is not None and len(new_ids) % _LOOP_CHECK_EVERY == 0
            if is_due and is_loop(new_ids):
                self._engine.abort(one.seq, "loop")
                self._end(self._running.pop(id(one.seq)))

    def _judge(self) -> None:
        """Compare prompts with earlier ones, in the order of their index."""
        while self._next_judged in self._candidates:
            index = self._next_judged
            found = self._candidates.pop(index)
            self._next_judged += 1
            judged = found if isinstance(found, Outcome) else self._candidate(index, found)
            if judged is found and isinstance(judged, Outcome):
                self._remember(judged)
            if isinstance(judged, Outcome):
                self._put(judged)
            else:
                self._ready.append(judged)

    def _put(self, outcome: Outcome) -> None:
        self._outcomes[outcome.index] = outcome
        self._new.append(outcome)

    def _remember(self, outcome: Outcome) -> None:
        """An outcome of an earlier run: later prompts are compared with its prompt."""
        if outcome.reason not in ABOUT_PROMPTS:
            self._seen.reason(_asked(outcome.record["messages"]))

    def _candidate(self, index: int, messages: Messages) -> _Written | Outcome:
        if not messages[-1]["content"].strip():
            return self._dropped(index, "prompt_empty", messages)
        try:
            seq = self._answer(index, messages)
        except RequestError as error:
            return self._dropped(index, "prompt_refused", messages, error=str(error))
        if len(seq.prompt_ids) > self._most_prompt_ids:
            return self._dropped(index, "prompt_too_long", messages)
        reason = self._seen.reason(_asked(messages))
        if reason is not None:
            return self._dropped(index, reason, messages)
        return _Written(seq, index, messages)

    def _prompt_written(self, written: _Written) -> Messages | Outcome:
        """The messages to answer, or why the prompt is none."""
        seq = written.seq
        text = self._lm.generation(seq).text.strip()
        messages = [*self._opening(), {"role": "user", "content": text}]
        reason = None
        if seq.finish_reason == "abort":
            reason = "prompt_failed"
        elif seq.finish_reason == "length":
            reason = "prompt_not_ended"
        elif self._special.intersection(_body(seq)):
            reason = "prompt_special_token"
        return messages if reason is None else self._dropped(written.index, reason, messages)

    def _answer_written(self, written: _Written) -> Outcome:
        seq, index, options = written.seq, written.index, self._options
        assert written.messages is not None
        generation = self._lm.generation(seq)
        record: Record = {
            "index": index,
            "messages": [*written.messages, {"role": "assistant", "content": generation.text}],
            "prompt_ids": seq.prompt_ids,
            "answer_ids": seq.new_ids,
            "temperature": options.temperature(index),
            "seed": seq.params.seed,
            "finish": generation.finish_reason,
            "split": options.split(index),
        }
        if options.top_logprobs:
            assert generation.logprobs is not None
            record |= _compact(generation.logprobs)
        reason = self._reason_to_drop(seq, generation.text)
        if reason is not None:
            kept = ("index", "messages", "answer_ids", "temperature", "seed", "finish")
            record = {"reason": reason} | {name: record[name] for name in kept}
        return Outcome(
            index=index, reason=reason, record=record, num_answer_tokens=len(seq.new_ids)
        )

    def _reason_to_drop(self, seq: Sequence, text: str) -> str | None:
        body = _body(seq)
        if seq.abort_reason == "loop" or (not self._options.keeps_loops and is_loop(body)):
            return "answer_loop"
        if seq.finish_reason == "abort":
            return "answer_failed"
        if self._special.intersection(body):
            return "answer_special_token"
        if not text.strip():
            return "answer_empty"
        if seq.finish_reason == "length" and not self._options.keeps_cut:
            return "answer_cut"
        return None

    def _dropped(self, index: int, reason: str, messages: Messages, **more: str) -> Outcome:
        record = {"index": index, "reason": reason, "messages": messages, **more}
        return Outcome(index=index, reason=reason, record=record)

    def _settled(self) -> list[Outcome]:
        """Take the outcomes whose turn it is."""
        found = []
        while not self.is_finished and self.tally.num_indexes in self._outcomes:
            outcome = self._outcomes.pop(self.tally.num_indexes)
            self.tally.add(outcome)
            found.append(outcome)
        return found


def _kind(written: _Written) -> str:
    return "prompt" if written.messages is None else "answer"


def _asked(messages: Messages) -> str:
    """What a conversation asks: all of it but system messages and the answer."""
    turns = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    return "\n".join(turn["content"] for turn in turns if turn["role"] != "system")


def _body(seq: Sequence) -> list[int]:
    """What was written, without the token that ended it."""
    is_ended = bool(seq.new_ids) and seq.new_ids[-1] in seq.stop_token_ids
    return seq.new_ids[:-1] if is_ended else seq.new_ids


def _compact(logprobs: list[TokenLogprobs]) -> Record:
    """Per answer token its log-probability, and ids and log-probabilities of the likeliest."""
    return {
        "logprobs": [round(one.logprob, _LOGPROB_DIGITS) for one in logprobs],
        "top_ids": [[token_id for token_id, _ in one.top] for one in logprobs],
        "top_logprobs": [[round(x, _LOGPROB_DIGITS) for _, x in one.top] for one in logprobs],
    }
