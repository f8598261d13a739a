"""What mode `auto` does: how each round of a sequence is decoded, so that tokens come fast.

Forwards are shared, so what counts is the rate of the whole batch: the tokens that all who run emit
in a forward, over the seconds that a forward with all that they feed takes. A sequence picks what
makes this largest, the others taken as they are. Nothing here touches what is written.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from functools import lru_cache
from weakref import WeakKeyDictionary

from trimode.decoding import Sequence
from trimode.decoding.params import MAX_AUTO_BRANCHES
from trimode.decoding.setting import Round, Setting
from trimode.engine.acceptance import AR_PACE, Acceptance, Outlook, Pace, Shift
from trimode.engine.costs import Costs
from trimode.model.adapter import PUBLISHED_FORM, AdapterForm

REVIEW_ROUNDS = 8
AR_REVIEW_ROUNDS = 32
"""A sequence thinks its setting over once in so many rounds; in `ar`, whose rounds are short and
tell nothing new of drafts, less often, and whenever others have come or gone."""

AR_LOOK_ROUNDS = 8
"""In `ar` the planner looks at a sequence once in so many rounds: a look takes as long as a
hundredth of a small model's forward."""

FIRST_MARGIN = 0.1
"""A sequence begins with `ar`, or with what is better by so much."""

MARGIN = 0.04
NUM_REVIEWS = 2
"""It changes its setting for one that is better by `MARGIN` in so many reviews in a row ..."""

PLAIN_GAIN = 0.25
"""... or by so much in one."""

PROBE_SHARE = 0.01
"""Of all time, what probes that bring nothing may cost."""

PROBE_LENGTH = 8
PROBE_FORWARDS = 2
MORE_FED = 4.0
"""Tokens of a sequence over which the cost of one more is taken."""

LEAST_COST = 0.1
"""Of a forward, what another kind of step in it costs at least, whatever the curves say."""

PROBE_ROUNDS = 16
"""Rounds between two probes of a sequence."""

MOST_SAVED = 4
"""Probes that may follow each other."""


@dataclass(slots=True)
class _Request:
    """What the planner keeps of a sequence.

    Attributes:
        setting: In force; None before its first round.
        pace: Expected with it.
        shift: How easy its text is to draft.
        latest: The last round that was learned from.
        num_unseen: Rounds since the last look.
        num_rounds: Since the last review.
        num_others: Sequences beside it at the last review.
        num_better: Reviews in a row that found something better.
        since_probe: Rounds since the last probe.
        probe_cost: Of the probe under way, in forwards; None if there is none.
        counted_in: The latest forward whose totals it is part of.
    """

    setting: Setting | None = None
    pace: Pace = AR_PACE
    shift: Shift = field(default_factory=Shift)
    latest: Round | None = None
    num_unseen: int = 0
    num_rounds: int = 0
    num_others: int = 0
    num_better: int = 0
    since_probe: int = PROBE_ROUNDS
    probe_cost: float | None = None
    counted_in: int = -1


@dataclass(frozen=True, slots=True)
class _Totals:
    """Of the sequences in a forward: how many, tokens that they emit and feed in it on average, and
    how many of them draft in it."""

    num_rows: int
    tokens: float
    fed: float
    drafting: float

    def plus(self, pace: Pace) -> _Totals:
        return _Totals(
            *(self.num_rows + 1, self.tokens + pace.tokens, self.fed + pace.fed),
            self.drafting + pace.drafting,
        )

    def minus(self, pace: Pace) -> _Totals:
        return _Totals(
            *(self.num_rows - 1, self.tokens - pace.tokens, self.fed - pace.fed),
            self.drafting - pace.drafting,
        )


class Planner:
    """Picks a setting for each round of each sequence in mode `auto`.

    One may serve engine after engine of the same network, not two at the same time.

    Args:
        costs: What forwards cost.
        form: Of the adapter that drafts.

    Attributes:
        costs: As given, refined by every forward.
        num_switches: Times that a sequence changed its setting, probes apart.
        num_probes: Rounds spent on finding out.
    """

    def __init__(self, costs: Costs, form: AdapterForm = PUBLISHED_FORM) -> None:
        self.costs = costs
        self._known = Acceptance(form)
        self._requests: WeakKeyDictionary[Sequence, _Request] = WeakKeyDictionary()
        self._num_forwards = 0
        self._total = _Totals(0, 0.0, 0.0, 0.0)
        self._allowed = 0.0  # forwards, for probes
        # Of the latest forward: rows, tokens, whether it drafted.
        self._to_learn: tuple[int, int, bool] | None = None
        self.num_switches = 0
        self.num_probes = 0

    def choose(self, seq: Sequence) -> Setting:
        """How the round of `seq` that begins now is decoded."""
        one = self._request(seq)
        one.num_unseen += 1
        setting = one.setting
        if setting is not None and setting.mode == "ar" and one.probe_cost is None:
            if one.num_unseen < AR_LOOK_ROUNDS:
                return setting
        has_run = self._learn(seq, one)
        others = self._others(one)
        one.num_rounds += one.num_unseen
        one.since_probe += one.num_unseen
        one.num_unseen = 0
        if one.setting is None:  # the best of many estimates is too good to be true
            one.setting, one.pace = _plain(seq.params.setting("auto", seq.form)), AR_PACE
            best, pace, gain = self._best(seq, one, others)
            if gain > FIRST_MARGIN:
                one.setting, one.pace = best, pace
        elif one.probe_cost is not None or self._is_due(one, others):
            if one.probe_cost is not None:
                self._settle(one, others, has_run=has_run)
            self._review(seq, one, others)
        one.setting = self._worthwhile(seq, one, others)
        return self._probe(seq, one, others) or one.setting

    def note_forward(self, fed: Items[Sequence], num_tokens: int, *, drafts: bool) -> None:
        """Learn who runs: right after a forward, before its answers are acted on."""
        self._num_forwards += 1
        self._allowed += PROBE_SHARE
        has_probe, tokens, num_fed, drafting = False, 0.0, 0.0, 0.0
        for seq in fed:
            if seq.mode == "auto":
                one = self._request(seq)
                one.counted_in = self._num_forwards
                has_probe |= one.probe_cost is not None
                pace = one.pace
            else:
                pace = _seen_pace(seq)
            tokens += pace.tokens
            num_fed += pace.fed
            drafting += pace.drafting
        self._total = _Totals(len(fed), tokens, num_fed, drafting)
        is_usual = not has_probe and not any(map(_is_prefilled, fed))
        self._to_learn = (len(fed), num_tokens, drafts) if is_usual else None

    def note_seconds(self, seconds: float) -> None:
        """Learn what that forward cost, until all its answers were acted on."""
        if self._to_learn is not None:
            num_rows, num_tokens, drafts = self._to_learn
            self.costs.note(num_rows, num_tokens, seconds, drafting=drafts)

    def _is_due(self, one: _Request, others: _Totals) -> bool:
        """Whether it is time to review a setting."""
        assert one.setting is not None
        if one.setting.mode != "ar":
            return one.num_rounds >= REVIEW_ROUNDS
        return one.num_rounds >= AR_REVIEW_ROUNDS or one.num_others != others.num_rows

    def _learn(self, seq: Sequence, one: _Request) -> bool:
        """Whether there was a round of speculation to learn from."""
        one.shift.fade(one.num_unseen)
        happened = seq.latest_round
        if happened is None or happened is one.latest:
            return False
        one.latest = happened
        self._known.learn(one.shift, happened)
        return True

    def _request(self, seq: Sequence) -> _Request:
        one = self._requests.get(seq)
        if one is None:
            one = self._requests[seq] = _Request()
        return one

    def _others(self, one: _Request) -> _Totals:
        """Those of the latest forward without this one."""
        return self._total.minus(one.pace) if one.counted_in == self._num_forwards else self._total

    def _worthwhile(self, seq: Sequence, one: _Request, others: _Totals) -> Setting:
        """The setting in force, in which each fed token has to bring what it costs: seconds more of
        a forward, in which all emit so many tokens."""
        assert one.setting is not None
        total = others.plus(one.pace)
        more = MORE_FED * max(total.num_rows, 1)
        seconds = self._seconds(total)
        more_s = max(self._seconds(total, more) - seconds, 0.0)
        gain = min(total.tokens / seconds * more_s / more, 1.0)
        return replace(one.setting, min_gain=max(gain, seq.params.min_gain or 0.0))

    def _rate(self, others: _Totals, pace: Pace) -> float:
        """Tokens a second of the whole batch, one of it going at this pace."""
        total = others.plus(pace)
        return total.tokens / self._seconds(total)

    def _seconds(self, total: _Totals, more_fed: float = 0.0) -> float:
        drafting = min(max(total.drafting, 0.0), 1.0)
        return self.costs.seconds_of(total.num_rows, total.fed + more_fed, drafting=drafting)

    def _best(self, seq: Sequence, one: _Request, others: _Totals) -> tuple[Setting, Pace, float]:
        """The best setting, its pace, and by what part it is better for a sequence than its present
        one. One of B sequences moves the rate of all by a B-th of what it gains itself."""
        widest = seq.params.setting("auto", seq.form)
        outlook = Outlook(self._known, one.shift.value, widest)
        if one.setting is not None:
            one.pace = outlook.pace(one.setting)
        best, pace = _plain(widest), AR_PACE
        rate = self._rate(others, pace)
        if not self._known.is_known(widest):
            return best, pace, 0.0
        for setting, at_best in settings(widest.block_length, widest.num_masks).items():
            if self._rate(others, at_best) > rate:  # or it is not worth a closer look
                found = outlook.pace(setting)
                found_rate = self._rate(others, found)
                if found_rate > rate:
                    best, pace, rate = setting, found, found_rate
        gain = (others.num_rows + 1) * (rate / self._rate(others, one.pace) - 1)
        return best, pace, gain

    def _review(self, seq: Sequence, one: _Request, others: _Totals) -> None:
        """Change the setting if another is better, plainly or for long enough."""
        one.num_rounds, one.num_others = 0, others.num_rows
        best, pace, gain = self._best(seq, one, others)
        one.num_better = one.num_better + 1 if gain > MARGIN else 0
        if gain > PLAIN_GAIN or one.num_better >= NUM_REVIEWS:
            one.setting, one.pace, one.num_better = best, pace, 0
            self.num_switches += 1

    def _probe(self, seq: Sequence, one: _Request, others: _Totals) -> Setting | None:
        """A round of linear where the present setting would never tell how well longer drafts do:
        if they would pay were all of them right, and if there is time for it.

        What it is expected to cost more than a round as usual is paid in advance, what it brings is
        paid back.
        """
        assert one.setting is not None
        widest = seq.params.setting("auto", seq.form)  # with the least gain that was asked for
        probe = replace(_probe_setting(widest), min_gain=widest.min_gain, has_lookup=False)
        is_known = one.setting.mode != "ar" and one.setting.draft_len >= probe.draft_len
        if is_known or one.since_probe < PROBE_ROUNDS or self._allowed <= 0:
            return None
        at_best, rate = _pace_at_best(probe), self._rate(others, one.pace)
        if (others.num_rows + 1) * (self._rate(others, at_best) / rate - 1) <= MARGIN:
            one.since_probe = 0
            return None
        usual, probed = others.plus(one.pace), others.plus(at_best)
        share = self._seconds(probed) / self._seconds(usual)
        cost = PROBE_FORWARDS * max(share - 1, LEAST_COST)
        self._allowed = min(self._allowed, MOST_SAVED * cost)
        if cost > self._allowed:
            return None
        self._allowed -= cost
        one.probe_cost, one.since_probe = cost, 0
        self.num_probes += 1
        return probe

    def _settle(self, one: _Request, others: _Totals, *, has_run: bool) -> None:
        """A probe is over. One that paid is worth another at once; so is one that checked a draft
        left over from before instead of one of its own, or whose request changed its mode first.
        That of a request's last round is never settled, and so stays paid for."""
        cost, seen = one.probe_cost, one.latest
        assert cost is not None
        gained, is_fresh = cost, False
        if has_run and seen is not None:
            is_fresh = seen.is_fresh
            num_new = seen.num_opened + seen.num_accepted + 1
            num_more = num_new - (2 if is_fresh else 1) * one.pace.tokens
            gained = num_more / others.plus(one.pace).tokens
        self._allowed += gained
        if gained > cost or not is_fresh:
            one.since_probe = PROBE_ROUNDS
        one.probe_cost = None


@lru_cache
def settings(block_length: int, num_masks: int | None = None) -> dict[Setting, Pace]:
    """What a sequence may pick from beside `ar`, and its pace if all drafts were right.

    Args:
        block_length: The longest.
        num_masks: The most masks of a group that skips the bonus; None where groups are blocks.
    """
    if num_masks is None:
        drafts = [Setting("linear", length) for length in _lengths(2, block_length)]
    else:
        lengths = _lengths(1, num_masks)
        drafts = [Setting("linear", block_length, num_masks=length) for length in lengths]
    found = {}
    for draft in drafts:
        found[draft] = _pace_at_best(draft)
        for count in (1, 2, 4, 8):
            if count <= min(MAX_AUTO_BRANCHES, 2 * draft.draft_len + 1):
                setting = replace(draft, mode="branching", num_groups=count, has_guesses=True)
                found[setting] = _pace_at_best(setting)
    return found


def _lengths(least: int, most: int) -> list[int]:
    """From the shortest to the longest: small steps first, then doubling."""
    lengths = {least, 2, 3, *(2**i for i in range(2, 32) if 2**i < most), most}
    return sorted(length for length in lengths if least <= length <= most)


def _pace_at_best(setting: Setting) -> Pace:
    """What a setting does if all drafts are right, and every outcome has its group."""
    length = 1 + setting.draft_len
    if setting.num_groups:
        return Pace(length, setting.num_fed, 1.0)
    return Pace((length + (setting.num_masks is not None)) / 2, length, 0.5)


def _plain(widest: Setting) -> Setting:
    """AR, in which drafts from the text are no longer than others may be."""
    return Setting("ar", widest.block_length, num_masks=widest.num_masks)


def _probe_setting(widest: Setting) -> Setting:
    """Linear, of at most `PROBE_LENGTH` tokens a forward."""
    if widest.num_masks is None:
        return Setting("linear", min(widest.block_length, PROBE_LENGTH))
    num_masks = min(widest.num_masks, PROBE_LENGTH - 1)
    return Setting("linear", widest.block_length, num_masks=num_masks)


def _is_prefilled(seq: Sequence) -> bool:
    """Whether it feeds tokens that it did not make just now."""
    return seq.length + 1 < len(seq.prompt_ids) + len(seq.new_ids)


def _seen_pace(seq: Sequence) -> Pace:
    """Of a sequence in another mode, so far."""
    stats = seq.stats
    num_forwards = stats.num_forwards - stats.forwards["prefill"]
    if not num_forwards:
        return AR_PACE
    num_fed = sum(stats.tokens_fed.values()) - stats.tokens_fed["prefill"]
    tokens = max(stats.new_tokens - 1, 0) / num_forwards
    drafting = 1.0 if seq.setting.num_groups else float(seq.setting.mode == "linear") / 2
    return Pace(tokens, num_fed / num_forwards, drafting)
