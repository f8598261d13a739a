"""One request's state. Between rounds: L committed cells, `last` emitted but not yet fed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Ids
from dataclasses import dataclass

from trimode.decoding.gap import Gap
from trimode.decoding.grammar import Matcher
from trimode.decoding.healing import Healing
from trimode.decoding.law import Rules
from trimode.decoding.lookup import Lookup
from trimode.decoding.params import MODE_NAMES, GenerationParams
from trimode.decoding.scoring import PromptScores
from trimode.decoding.setting import Round, Setting
from trimode.decoding.stats import Stats
from trimode.decoding.step import TokenLogprobs
from trimode.decoding.stop_strings import Growing, StopStrings
from trimode.errors import RequestError
from trimode.model.adapter import PUBLISHED_FORM, AdapterForm

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Event:
    """Something a watcher may want to see; it changes nothing.

    Attributes:
        kind: `draft` and `denoise` (a pass over a block), `verify` (a draft was checked),
            `revise` (a token of a block that stood there became another), `emit`. What was emitted
            is never revised.
        position: Absolute position of the first of `token_ids`.
        token_ids: The block, the draft, the emitted tokens, or the one that came by a revision.
        is_masked: `draft`, `denoise`: which of them are still masked.
        num_accepted: `verify`: how many of the draft's tokens were accepted.
        old_ids: `revise`: the token that stood there before.
        reason: `revise`: by which method (`trimode.decoding.params.REVISIONS`).
    """

    kind: str
    position: int
    token_ids: tuple[int, ...]
    is_masked: tuple[bool, ...] = ()
    num_accepted: int = 0
    old_ids: tuple[int, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Draft:
    """Proposals for the tokens after `last`, made before the round that verifies them.

    Attributes:
        start: Position of `last`, which they follow.
        token_ids: At most so many as a draft of the setting has.
        confidences: Probability of each when it was chosen.
        runner_ups: The drafter's second choices; empty if they were not wanted.
        runner_up_confidences: As `confidences`.
        is_looked_up: Whether they are the text's own.
    """

    start: int
    token_ids: list[int]
    confidences: list[float]
    runner_ups: list[int]
    runner_up_confidences: list[float]
    is_looked_up: bool = False

    @classmethod
    def nothing(cls, start: int) -> Draft:
        """No proposals."""
        return cls(start, [], [], [], [])

    def num_worth(self, *, cutoff: float | None, min_gain: float) -> int:
        """How many of the first tokens are all at least as confident as `cutoff`, and are right
        together with a chance of at least `min_gain`, as the confidences have it."""
        reached = 1.0
        for number, confidence in enumerate(self.confidences):
            reached *= confidence
            if confidence < (cutoff or 0.0) or reached < min_gain:
                return number
        return len(self.token_ids)


class Sequence:
    """A prompt being continued. Modes act on it through `commit`, `emit` and `event` only.

    Args:
        prompt_ids: Tokens of the prompt, at least one.
        params: What was asked for.
        eos_token_ids: The model's own stop tokens.
        mask_token_id: The model's mask token.
        text: The new text as it grows; needed only where `params.stop` has strings.
        form: How the drafter adapter of its engine is to be used.
        gap: What to fill behind the prompt, which then is not continued.
        healing: What the first tokens must say, since it was taken back of the prompt.
        matcher: Of the grammar that `params` asks for; None without one.
        on_event: Called with every `Event`, from within a step.

    Attributes:
        length: Committed length L. Position of `last`.
        new_ids: Tokens emitted so far.
        num_inside: How many of them say only what the prompt said; limits count from there.
        logprobs: Of each of them, if they were asked for.
        scores: Of the prompt's tokens; None if they were not asked for.
        rules: What its answers are subject to beyond temperature and filters; None if nothing.
        lookup: Where its own repetitions are drafts; None if they are not.
        finish_reason: None while running, then `stop`, `length` or `abort`.
        abort_reason: Of an `abort`: `cancelled`, `deadline`, `non_finite` (the network broke down),
            `no_token` (nothing is left to choose) or `error` (see there).
        error: What its own `on_event` raised.
        setting: How the present round is decoded.
        latest_round: Of speculation; None before the first.
        num_rounds: Begun so far.
        choose_setting: Of mode `auto`, asked before each round; set by the engine.
        stop_text_len: Characters of text before the stop string that ended it; None if none did.
        num_committable: How many fed tokens of the latest step may be committed; set by the engine.
        num_cells: Cells of the row it owns; set by the engine.
    """

    def __init__(
        self,
        prompt_ids: Ids[int],
        params: GenerationParams,
        *,
        eos_token_ids: Iterable[int] = (),
        mask_token_id: int,
        text: Growing | None = None,
        form: AdapterForm = PUBLISHED_FORM,
        gap: Gap | None = None,
        healing: Healing | None = None,
        matcher: Matcher | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        self.prompt_ids = list(prompt_ids)
        self.params = params
        self.form = form
        self.mode = params.mode
        self.mask_token_id = mask_token_id
        self.gap = gap
        self.healing = healing
        self.stop_token_ids = frozenset(params.stop_token_ids) | (
            frozenset() if params.ignore_eos else frozenset(eos_token_ids)
        )
        self.rules: Rules | None = None
        if params.control.changes_laws or params.min_tokens or healing is not None:
            self.rules = Rules(
                params.control,
                matcher=matcher,
                min_tokens=params.min_tokens,
                stop_token_ids=self.stop_token_ids,
            )
        self.stats = Stats()
        self.length = 0
        self.new_ids: list[int] = []
        self.num_inside = 0
        self.logprobs: list[TokenLogprobs] = []
        is_scored = params.prompt_logprobs is not None
        self.scores = PromptScores(self.prompt_ids) if is_scored else None
        self.finish_reason: str | None = None
        self.abort_reason: str | None = None
        self.error: Exception | None = None
        self.setting = params.setting(params.mode, form)
        self.lookup = Lookup() if params.has_lookup else None
        self.latest_round: Round | None = None
        self.num_rounds = 0
        self.choose_setting: Callable[[Sequence], Setting] | None = None
        self.stop_text_len: int | None = None
        self.num_committable = 0
        self.num_cells = 0
        self._draft: Draft | None = None
        self._begun = ("", -1)  # mode and length of the latest round
        self._stops = StopStrings(params.stop, text) if params.stop else None
        self._on_event = on_event

    @property
    def mode(self) -> str:
        """May change between rounds."""
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        if mode not in MODE_NAMES:
            raise RequestError(f"mode is {mode!r}; allowed: {', '.join(MODE_NAMES)}")
        self.params.control.check_mode(mode, ignore_eos=self.params.ignore_eos)
        self._mode = mode

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def last(self) -> int:
        """The token emitted but not yet fed; its position is `length`."""
        return self.new_ids[-1]

    @property
    def num_new(self) -> int:
        """How many tokens go beyond the prompt's end."""
        return len(self.new_ids) - self.num_inside

    @property
    def num_remaining(self) -> int:
        """How many of them may still be emitted."""
        return self.params.max_new_tokens - self.num_new

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt as it was given, those that were taken back included."""
        return len(self.prompt_ids) + (0 if self.healing is None else len(self.healing.taken_ids))

    @property
    def new_start(self) -> int:
        """Position of the first token that goes beyond the prompt's end."""
        return len(self.prompt_ids) + self.num_inside

    @property
    def num_deaf(self) -> int:
        """Characters of the text in which no stop string counts, since they came too early."""
        return 0 if self._stops is None else self._stops.num_deaf

    @property
    def is_healing(self) -> bool:
        """Whether what was taken back of the prompt is still owed."""
        return self.healing is not None and not self.healing.is_over(self.new_ids)

    @property
    def committed_ids(self) -> list[int]:
        """Tokens whose K/V are kept."""
        num_prompt = len(self.prompt_ids)
        if self.length <= num_prompt:
            return self.prompt_ids[: self.length]
        return self.prompt_ids + self.new_ids[: self.length - num_prompt]

    def begin_round(self) -> Setting:
        """How the round that begins now is decoded. One that lost its row before its first
        forward goes on as it was meant to, unless the mode has changed since."""
        begun = (self.mode, self.length)
        if begun == self._begun:
            return self.setting
        self.num_rounds += begun[1] != self._begun[1]
        self._begun = begun
        self.setting = self.params.setting(self.mode, self.form)
        if self.mode == "auto":
            if self.choose_setting is None:
                raise RequestError(
                    "mode is 'auto'; allowed: another, since this engine has no planner"
                )
            self.setting = self.choose_setting(self)
        return self.setting

    def keep_draft(self, draft: Draft) -> None:
        """Have a draft for the next round, whatever its mode does with it."""
        self._draft = draft

    @property
    def pending_draft(self) -> Draft | None:
        """The draft that was kept, if nothing has been committed since."""
        draft = self._draft
        return draft if draft is not None and draft.start == self.length else None

    def num_spare_groups(self, num_tokens: int) -> int:
        """Groups that a step has cells for, behind `num_tokens` others."""
        free = self.num_cells - self.length - num_tokens
        return max(free // self.setting.group_len, 0)

    def commit(self, num_tokens: int) -> None:
        """Keep the K/V of the first `num_tokens` fed in the latest step."""
        if not 0 <= num_tokens <= self.num_committable:
            raise AssertionError(
                f"commit({num_tokens}): only {self.num_committable} tokens of the latest step were"
                " written causally with the adapter off"
            )
        self.length += num_tokens
        self.num_committable = 0

    def emit(self, token_ids: Ids[int], logprobs: Ids[TokenLogprobs] = ()) -> int:
        """Show tokens to the user, up to the first that ends the text; the mask token, which stands
        for none, aborts it.

        Args:
            token_ids: What to show.
            logprobs: Of each, if they were asked for.

        Returns:
            How many were emitted; fewer than given only if the sequence is now finished.
        """
        position, num_emitted = len(self.prompt_ids) + len(self.new_ids), 0
        for token_id in token_ids:
            if self.is_finished:
                break
            if token_id == self.mask_token_id:
                logger.error("sequence aborted: what was asked for leaves no token to go on with")
                self.abort("no_token")
                break
            self.new_ids.append(token_id)
            num_emitted += 1
            self.finish_reason = self._reason_to_stop(token_id)
        self.stats.new_tokens = self.num_new
        self.logprobs += logprobs[:num_emitted]
        if num_emitted:
            self.event("emit", position=position, token_ids=token_ids[:num_emitted])
        return num_emitted

    def finish(self, reason: str) -> None:
        """Nothing more is to come, for a reason other than the newest token."""
        self.finish_reason = self.finish_reason or reason

    def abort(self, reason: str, error: Exception | None = None) -> None:
        """It ends without having come to its end, unless it has."""
        if not self.is_finished:
            self.finish_reason, self.abort_reason, self.error = "abort", reason, error

    def event(
        self,
        kind: str,
        *,
        position: int,
        token_ids: Ids[int],
        is_masked: Ids[bool] = (),
        num_accepted: int = 0,
        old_ids: Ids[int] = (),
        reason: str = "",
    ) -> None:
        """Tell the watcher, if there is one."""
        if self._on_event is not None:
            event = Event(
                *(kind, position, tuple(token_ids), tuple(is_masked), num_accepted),
                *(tuple(old_ids), reason),
            )
            self._on_event(event)

    def _reason_to_stop(self, token_id: int) -> str | None:
        if self.healing is not None:
            self.num_inside = self.healing.num_inside(self.new_ids)
        stop_string_at = None
        if self._stops is not None:
            is_deaf = self.num_new <= self.params.min_tokens > 0
            stop_string_at = self._stops.push(token_id, is_deaf=is_deaf)
        if not self.num_new:
            return None
        if token_id in self.stop_token_ids:
            return "stop"
        if stop_string_at is not None:
            self.stop_text_len = stop_string_at
            return "stop"
        return None if self.num_remaining else "length"
