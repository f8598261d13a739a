"""What a request may ask for, checked once. One frozen dataclass, no behaviour beyond its
checks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trimode.decoding.control import Control, is_unicode
from trimode.decoding.setting import Setting
from trimode.errors import RequestError
from trimode.model.adapter import DRAFT_FORMS, PUBLISHED_FORM, AdapterForm

MODE_NAMES = ("ar", "diffusion", "linear", "branching", "quadratic", "auto")
SPECULATIVE = ("linear", "branching", "quadratic", "auto")
"""Modes that write what `ar` writes, in rounds of drafting and verifying; `auto` picks among them
and `ar`, anew for every round."""

DEFAULT_MODE = "auto"
"""What is best differs by model, machine, text and load, so it is measured."""

DEFAULT_BRANCHES = 4
DEFAULT_MIN_GAIN = 0.08
MAX_AUTO_BRANCHES = 8

DEFAULT_THRESHOLDS = {"diffusion": 0.9, "linear": 0.0}
"""Where neither `threshold` nor `steps` is given; 0 reveals all in one pass."""

_ONE_PASS = "drafts behind a verify forward are made in one pass"
_TAKES_NO_PASSES = {
    "ar": "mode 'ar' has no {}",
    "branching": _ONE_PASS,
    "quadratic": _ONE_PASS,
    "auto": "mode 'auto' picks for itself; modes 'diffusion' and 'linear' take them",
}
"""Mode -> why it takes neither `threshold` nor `steps`, which stands for {}."""

POLICIES = (
    "confidence_threshold",
    "steps",
    "entropy_bound",
    "leftmost",
    "random",
    "ar_weighted",
)
"""How a pass of block diffusion picks the positions it reveals (`trimode.decoding.reveal`)."""

POLICY_ALIASES = {
    "threshold": "confidence_threshold",
    "low_confidence_dynamic": "confidence_threshold",
    "low_confidence": "steps",
    "low_confidence_static": "steps",
    "eb_sampler": "entropy_bound",
    "sequential": "leftmost",
}
"""Other engines' name for a policy -> ours. Only names that mean the same there: `entropy`, which
elsewhere is a schedule in order of entropy without a bound, is none of ours."""

DEFAULT_ENTROPY_BOUND = 0.1

REVISIONS = ("joint_threshold", "ar_doubt", "remdm")
"""How tokens that a block already shows may change (`trimode.decoding.revising`)."""

REMASK_SCHEDULES = ("cap", "rescale", "conf", "loop")
"""How likely `remdm` is to mask a token anew."""

MAX_SEED = 2**64 - 1

LEAST_TEMPERATURE = 1e-5
"""Less is greedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationParams:
    """How one prompt is to be continued.

    Attributes:
        mode: `ar`, `diffusion`, `linear`, `branching`, `quadratic`, which is branching over every
            length, without guesses, or `auto`, which needs an engine with a planner.
        max_new_tokens: At most so many tokens are emitted, at least 1; 0 only with
            `prompt_logprobs`.
        block_length: Diffusion block length K; in speculation, the tokens of one draft including
            the last emitted one, so K - 1 are proposed. At least 1 in `diffusion`, else 2. `auto`
            takes no longer ones.
        threshold: Reveal every masked position whose confidence reaches this, and always the best.
            `diffusion`: None and no `steps` means 0.9. `linear`: None means one pass per draft.
        steps: Passes per block, 1 to `block_length`, spread evenly. Alone it turns the threshold
            off; with a threshold or an entropy bound it is the floor of what every pass reveals.
        policy: `diffusion`: one of `POLICIES` or of their aliases; None means
            `confidence_threshold`, which with `steps` alone is `steps`. Without `steps`, `leftmost`
            and `random` reveal one token a pass.
        entropy_bound: `policy="entropy_bound"`: what the entropies of the positions revealed in a
            pass, less the largest, may sum to, in nats; None means 0.1.
        revision: `diffusion`: one of `REVISIONS`; None: what is revealed stays.
        edit_threshold: `revision="joint_threshold"`: a token is replaced by one more probable than
            this, 0 to 1; None means 0.5.
        edit_budget: `joint_threshold` replaces and `ar_doubt` reopens at most so many tokens of a
            block; None means half a block.
        doubt: `revision="ar_doubt"`: tokens less probable than this in the AR view are reopened,
            0 to 1; None means 0.1.
        remask_schedule: `revision="remdm"`: one of `REMASK_SCHEDULES`; None means `conf`.
        remask_rate: `revision="remdm"`: eta of that schedule, 0 to 1; None means 0.5.
        branches: `branching`: groups that a verify forward carries for the next round, 0 to
            2 K - 1, or 2 m + 1 where m masks skip and m is larger; None means 4.
        guesses: `branching`: whether groups may begin with a guess of the bonus token; None means
            they may.
        draft_form: Speculation: `block` drafts K - 1 masks behind the last token, or behind a mask
            or a guess in the bonus token's place; `skip` drafts masks behind a bonus token that is
            not known yet, so that the forward which drafts gives that token as well. None means
            what the adapter was trained for, `block` without one or where `linear` is given a
            threshold or steps, which are passes over a block.
        skip_masks: Speculation in the form `skip`: masks of a group, at least 1. None means what
            the adapter was trained with, but at most K - 2, and at least 1.
        lookup: Speculation: whether the text's own repetitions may be drafts too; None: in `auto`.
        draft_cutoff: Speculation: a draft ends before its first token less probable than this;
            None verifies whole drafts.
        min_gain: Speculation: what is not expected to bring at least so many tokens for each one
            that is fed is left out of a forward: the end of a draft, the end of a group of masks
            that skip the bonus, a group. None: 0.08 where the drafter says how well it drafts, else
            0, which leaves nothing out; in `auto`, what a fed token costs.
        temperature: 0 to 1e5; less than 1e-5, by which float32 cannot divide, is 0, which is
            greedy.
        min_p: Keep the tokens that are at least so many times as probable as the likeliest, 0 to 1,
            at that temperature; None and 0 keep all.
        top_k: Of these keep the k likeliest; None, 0 and -1 keep all.
        top_p: Of these keep the smallest likeliest set of at least this share of their probability,
            in (0, 1]; None keeps all.
        seed: Fixes the text, the same in `ar` and all speculation, and in any batch.
        stop: Strings that end the text; they are cut off.
        stop_token_ids: Tokens that end the text, beside the model's EOS; they are kept in
            `token_ids`.
        ignore_eos: Go on past EOS.
        min_tokens: The text does not end before it has so many new tokens, 0 to `max_new_tokens`:
            until then the tokens that would end it are banned, and stop strings count only where a
            later token completes them. Where a grammar or a thinking budget leaves nothing else
            than such a token, the token stands and the text ends early, as in vLLM.
        prompt_logprobs: For every token of the prompt but the first, its log-probability and those
            of so many of the likeliest tokens in its place, as `Control.logprobs` has them for new
            tokens; None for none. All modes. The whole prompt is fed for it.
        control: What single tokens are subject to.

    Raises:
        RequestError: naming the argument, its value and what is allowed.
    """

    mode: str
    max_new_tokens: int
    block_length: int
    seed: int
    threshold: float | None = None
    steps: int | None = None
    policy: str | None = None
    entropy_bound: float | None = None
    revision: str | None = None
    edit_threshold: float | None = None
    edit_budget: int | None = None
    doubt: float | None = None
    remask_schedule: str | None = None
    remask_rate: float | None = None
    branches: int | None = None
    guesses: bool | None = None
    draft_form: str | None = None
    skip_masks: int | None = None
    lookup: bool | None = None
    draft_cutoff: float | None = None
    min_gain: float | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    prompt_logprobs: int | None = None
    control: Control = Control()

    def __post_init__(self) -> None:
        def check(name: str, is_valid: Callable[[Any], bool], allowed: str) -> None:
            value = getattr(self, name)
            if not is_valid(value):
                raise RequestError(f"{name} is {value!r}; allowed: {allowed}")

        check("mode", lambda v: v in MODE_NAMES, ", ".join(MODE_NAMES))
        least = 2 if self.mode in SPECULATIVE else 1
        check(
            "prompt_logprobs",
            lambda v: v is None or (_is_int(v) and v >= 0),
            "None, or an integer of at least 0",
        )
        fewest = 1 if self.prompt_logprobs is None else 0
        check(
            "max_new_tokens",
            lambda v: _is_int(v) and v >= fewest,
            f"an integer of at least {fewest}" + ", or 0 with prompt_logprobs" * fewest,
        )
        check(
            "block_length", lambda v: _is_int(v) and v >= least, f"an integer of at least {least}"
        )
        check(
            "seed", lambda v: _is_int(v) and 0 <= v <= MAX_SEED, f"an integer from 0 to {MAX_SEED}"
        )
        check(
            "temperature",
            lambda v: _is_number(v) and 0 <= v <= 1e5,
            f"0 to 1e5; less than {LEAST_TEMPERATURE} is greedy",
        )
        check("ignore_eos", lambda v: isinstance(v, bool), "True or False")
        check("top_k", lambda v: v is None or (_is_int(v) and v >= -1), "None or an integer >= -1")
        check("min_p", lambda v: v is None or (_is_number(v) and 0 <= v <= 1), "None, or 0 to 1")
        most = self.max_new_tokens
        check(
            "min_tokens",
            lambda v: _is_int(v) and 0 <= v <= most,
            f"an integer of 0 to max_new_tokens={most}",
        )
        check("top_p", lambda v: v is None or (_is_number(v) and 0 < v <= 1), "None, or in (0, 1]")
        check(
            "stop",
            lambda v: isinstance(v, tuple) and all(isinstance(s, str) and s for s in v),
            "non-empty strings",
        )
        check("stop", lambda v: all(map(is_unicode, v)), "valid Unicode, without half characters")
        check(
            "stop_token_ids",
            lambda v: isinstance(v, tuple) and all(_is_int(i) and i >= 0 for i in v),
            "token ids",
        )
        if self.mode in _TAKES_NO_PASSES:
            for name in ("threshold", "steps"):
                reason = _TAKES_NO_PASSES[self.mode].format(name)
                check(name, lambda v: v is None, f"None, since {reason}")
        check(
            "threshold", lambda v: v is None or (_is_number(v) and 0 <= v <= 1), "None, or 0 to 1"
        )
        check(
            "steps",
            lambda v: v is None or (_is_int(v) and 1 <= v <= self.block_length),
            f"None, or 1 to block_length={self.block_length}",
        )
        self._check_policy(check)
        self._check_revision(check)
        self._check_speculation(check)
        self.control.check_mode(self.mode, ignore_eos=self.ignore_eos)
        self._write_off_in_one_way()

    def _write_off_in_one_way(self) -> None:
        """What asks for nothing, in the one way that the law knows."""
        if self.temperature < LEAST_TEMPERATURE:
            object.__setattr__(self, "temperature", 0.0)
        if self.top_k in (0, -1):
            object.__setattr__(self, "top_k", None)
        if self.min_p == 0:
            object.__setattr__(self, "min_p", None)

    def _check_policy(self, check: Callable[[str, Callable[[Any], bool], str], None]) -> None:
        if self.mode != "diffusion":
            check("policy", lambda v: v is None, f"None, since mode {self.mode!r} has no policies")
        names = (*POLICIES, *POLICY_ALIASES)
        check("policy", lambda v: v is None or v in names, f"None, {', '.join(names)}")
        policy = self.reveal_policy
        if policy != "entropy_bound":
            check("entropy_bound", lambda v: v is None, "None but with policy 'entropy_bound'")
        check(
            "entropy_bound",
            lambda v: v is None or (_is_number(v) and 0 <= v < math.inf),
            "None, or a finite number of at least 0",
        )
        if policy not in ("confidence_threshold", "ar_weighted"):
            none = f"None, since policy {policy!r} has no threshold"
            check("threshold", lambda v: v is None, none)
        if policy == "steps":
            check("steps", lambda v: v is not None, f"1 to block_length={self.block_length}")

    def _check_revision(self, check: Callable[[str, Callable[[Any], bool], str], None]) -> None:
        if self.mode != "diffusion":
            none = f"None, since mode {self.mode!r} revises nothing"
            check("revision", lambda v: v is None, none)
        check("revision", lambda v: v is None or v in REVISIONS, f"None, {', '.join(REVISIONS)}")
        owners = {
            "edit_threshold": ("joint_threshold",),
            "edit_budget": ("joint_threshold", "ar_doubt"),
            "doubt": ("ar_doubt",),
            "remask_schedule": ("remdm",),
            "remask_rate": ("remdm",),
        }
        for name, owning in owners.items():
            if self.revision not in owning:
                only = f"None but with revision {' or '.join(map(repr, owning))}"
                check(name, lambda v: v is None, only)
        for name in ("edit_threshold", "doubt", "remask_rate"):
            check(name, lambda v: v is None or (_is_number(v) and 0 <= v <= 1), "None, or 0 to 1")
        most = max(self.block_length - 1, 1)
        check(
            "edit_budget",
            lambda v: v is None or (_is_int(v) and 1 <= v <= most),
            f"None, or 1 to block_length - 1 = {most}",
        )
        schedules = f"None, {', '.join(REMASK_SCHEDULES)}"
        check("remask_schedule", lambda v: v is None or v in REMASK_SCHEDULES, schedules)
        if self.revision == "joint_threshold" and self.reveal_policy == "ar_weighted":
            check("policy", lambda v: False, "with revision 'joint_threshold' all but ar_weighted")
        if self.revision == "remdm":
            check("steps", lambda v: v is not None, "an integer, which revision 'remdm' needs")
            scheduled = ("steps", "leftmost", "random")
            if self.reveal_policy not in scheduled:
                names = f"with revision 'remdm' {', '.join(scheduled)}, and no threshold"
                check("policy", lambda v: False, names)

    def _check_speculation(self, check: Callable[[str, Callable[[Any], bool], str], None]) -> None:
        if self.mode != "branching":
            what = "picks for itself" if self.mode == "auto" else "has no such choice"
            only = f"None, since mode {self.mode!r} {what}"
            check("branches", lambda v: v is None, only)
            check("guesses", lambda v: v is None, only)
        else:
            most, of = 2 * self.block_length - 1, "2 * block_length - 1"
            num_masks = self.skip_masks if _is_int(self.skip_masks) else None
            if num_masks is not None and num_masks >= self.block_length:
                most, of = 2 * num_masks + 1, "2 * skip_masks + 1"
            check(
                "branches",
                lambda v: v is None or (_is_int(v) and 0 <= v <= most),
                f"None, or 0 to {of} = {most}",
            )
            check("guesses", lambda v: v is None or isinstance(v, bool), "None, True or False")
        is_speculative = self.mode in SPECULATIVE
        where = f"None but in {', '.join(SPECULATIVE)}"
        if not is_speculative:
            for name in ("draft_form", "skip_masks", "lookup"):
                check(name, lambda v: v is None, where)
        forms = f"None, {', '.join(DRAFT_FORMS)}"
        check("draft_form", lambda v: v is None or v in DRAFT_FORMS, forms)
        check("lookup", lambda v: v is None or isinstance(v, bool), "None, True or False")
        check(
            "skip_masks", lambda v: v is None or (_is_int(v) and v >= 1), "None, or an integer >= 1"
        )
        if self.draft_form == "block":
            check("skip_masks", lambda v: v is None, "None with draft_form 'block'")
        elif self.draft_form == "skip" or self.skip_masks is not None:
            none = "None with draft_form 'skip', whose drafts are made in one pass"
            for name in ("threshold", "steps"):
                check(name, lambda v: v is None, none)
        for name in ("draft_cutoff", "min_gain"):
            check(
                name,
                lambda v: v is None or (is_speculative and _is_number(v) and 0 <= v <= 1),
                f"None, or 0 to 1 in {', '.join(SPECULATIVE)}",
            )

    def setting(self, mode: str, form: AdapterForm = PUBLISHED_FORM) -> Setting:
        """How a round of `mode` is decoded; of `auto`, the widest that it may pick.

        Args:
            mode: One of `MODE_NAMES`.
            form: What the drafter was trained for.
        """
        length, most = self.block_length, 2 * self.block_length - 1
        num_masks, gain = self._num_masks(form), self._gain(mode, form)
        if mode == "diffusion" and self.revision == "joint_threshold":
            return Setting(mode, length, self.most_edits)
        if mode == "diffusion" and self.reveal_policy == "ar_weighted":
            return Setting(mode, length, 1)
        if mode == "quadratic":
            num_lengths = length if num_masks is None else 1 + num_masks
            return Setting(mode, length, num_lengths, num_masks=num_masks, min_gain=gain)
        if mode == "branching":
            most = max(most, 1 + 2 * (num_masks or 0))
            branches = min(DEFAULT_BRANCHES, most) if self.branches is None else self.branches
            return Setting(mode, length, branches, self.guesses is not False, num_masks, gain)
        if mode == "auto":
            num_drafted = length - 1 if num_masks is None else num_masks
            num_groups = min(MAX_AUTO_BRANCHES, 2 * num_drafted + 1)
            return Setting("branching", length, num_groups, True, num_masks, gain)
        if mode == "linear":
            return Setting(mode, length, num_masks=num_masks, min_gain=gain)
        return Setting(mode, length)

    def _gain(self, mode: str, form: AdapterForm) -> float:
        if self.min_gain is None:
            return DEFAULT_MIN_GAIN if form.acceptance and mode != "auto" else 0.0
        return self.min_gain

    @property
    def has_lookup(self) -> bool:
        """Whether the text's own repetitions may be drafts."""
        return self.mode == "auto" if self.lookup is None else self.lookup

    def _num_masks(self, form: AdapterForm) -> int | None:
        """Masks of a group that skips the bonus; None where drafts are blocks."""
        draft_form = self.draft_form
        if draft_form is None and self.skip_masks is not None:
            draft_form = "skip"
        if draft_form is None:
            has_passes = self.threshold is not None or self.steps is not None
            draft_form = "block" if has_passes else form.draft_forms[0]
        if draft_form == "block" or self.skip_masks is not None:
            return self.skip_masks
        most = max(self.block_length - 2, 1)
        return most if form.num_masks is None else min(form.num_masks, most)

    @property
    def reveal_policy(self) -> str:
        """The policy in force in `diffusion`, by our name."""
        name = self.policy or "confidence_threshold"
        name = POLICY_ALIASES.get(name, name)
        if name == "confidence_threshold" and self.threshold is None and self.steps is not None:
            return "steps"
        return name

    @property
    def most_edits(self) -> int:
        """The edit budget of a block in force."""
        return max(self.block_length // 2, 1) if self.edit_budget is None else self.edit_budget

    @property
    def reveal_entropy_bound(self) -> float | None:
        """The entropy bound in force in `diffusion`; None where the policy has none."""
        if self.reveal_policy != "entropy_bound":
            return None
        return DEFAULT_ENTROPY_BOUND if self.entropy_bound is None else self.entropy_bound

    def reveal_threshold(self, mode: str) -> float | None:
        """The threshold in force in `mode`, which may change mid-text; None where only `steps` or
        another policy decides."""
        thresholded = ("confidence_threshold", "ar_weighted")
        if mode == "diffusion" and self.reveal_policy not in thresholded:
            return None
        if self.threshold is not None or self.steps is not None:
            return self.threshold
        return DEFAULT_THRESHOLDS[mode]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
