"""What a mode asks of the network (`Step`) and what it gets back (`Readout`). Data only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from trimode.decoding.bits import Bits
from trimode.model.adapter import AdapterForm
from trimode.model.masks import TRUNK

FORWARD_KINDS = ("prefill", "decode", "draft", "verify", "denoise", "commit")

BLOCK = 1
"""Number of the first group of a step; further groups count on from it."""


@dataclass(frozen=True, slots=True)
class Group:
    """Fed tokens at neighbouring positions that see each other, and the trunk up to their anchor.

    Attributes:
        token_ids: Ids fed.
        is_masked: Which of them stand for a token not known yet; ids alone do not say so, since a
            text may contain the mask token's id.
        start: Absolute position of the first.
        anchor: Position of the last trunk token that they see; `start - 1` but for masks that skip
            the bonus.
        wanted: Indexes into them whose answer is wanted.
    """

    token_ids: Sequence[int]
    is_masked: Sequence[bool]
    start: int
    anchor: int
    wanted: Sequence[int]


@dataclass(frozen=True, slots=True)
class Step:
    """What one sequence feeds in one forward, T tokens.

    Attributes:
        kind: One of `FORWARD_KINDS`, for the counts.
        token_ids: [T] ids fed.
        positions: [T] absolute positions.
        groups: [T] group of each (`trimode.model.masks.fed_mask`); 0 is the causal trunk.
        anchors: [T] position of the anchor of each; a trunk token's own.
        mask_places: [T] place of each masked token, its position less its anchor's; 0 for the
            others.
        is_drafter_on: [T] whether the drafter adapter is on for each.
        wanted: Indexes into the fed tokens whose answer is wanted. A trunk token answers for the
            position after its own (the AR law), any other token for its own (the diffusion law).
        wants_confidence: Whether how sure each answer is, is wanted too.
        wants_runner_up: Whether the second choice for each, and its probability, is wanted too.
        wants_entropy: Whether the entropy of each law is wanted too.
        targets: One token for each of `wanted`, whose log-probability is asked for; or none.
        allowed: For each of `wanted` the tokens it may be, None for all; or none.
        scored: Indexes into trunk tokens, each with the token behind it whose log-probability is
            asked for; nothing is chosen there.
    """

    kind: str
    token_ids: Sequence[int]
    positions: Sequence[int]
    groups: Sequence[int]
    anchors: Sequence[int]
    mask_places: Sequence[int]
    is_drafter_on: Sequence[bool]
    wanted: Sequence[int]
    wants_confidence: bool = False
    wants_runner_up: bool = False
    wants_entropy: bool = False
    targets: Sequence[int] = ()
    allowed: Sequence[Bits | None] = ()
    scored: Sequence[tuple[int, int]] = ()

    @property
    def answer_positions(self) -> list[int]:
        """Absolute position that each wanted answer is for."""
        return [self.positions[i] + (self.groups[i] == TRUNK) for i in self.wanted]

    def head(self, num_tokens: int) -> Step:
        """A prefill cut short: its first tokens, and the answer behind the last of them, which
        shows whether all went well."""
        if self.kind != "prefill" or not 1 <= num_tokens <= len(self.token_ids):
            raise AssertionError(f"{num_tokens} tokens of a {self.kind} of {len(self.token_ids)}")
        return causal_step(
            "prefill",
            self.token_ids[:num_tokens],
            start=self.positions[0],
            wanted=[num_tokens - 1],
            scored=[one for one in self.scored if one[0] < num_tokens],
        )

    @property
    def num_committable(self) -> int:
        """Leading fed tokens written causally with the adapter off: all that may be committed."""
        for t, (group, is_on) in enumerate(zip(self.groups, self.is_drafter_on, strict=True)):
            if group != TRUNK or is_on:
                return t
        return len(self.groups)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How likely a token of a text was, under the AR view at temperature 1 after the ban, before
    grammar, bias, penalty and filters.

    Attributes:
        logprob: Its log-probability, in nats.
        top: Ids and log-probabilities of the likeliest tokens, the best first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Readout:
    """The answers to one `Step`, in the order of `wanted`.

    Attributes:
        token_ids: Chosen token for each.
        confidences: Probability of it at temperature 1 after the ban, unfiltered.
        runner_ups: What would have been chosen without it, under the same noise.
        runner_up_confidences: As `confidences`.
        entropies: Of that law, in nats.
        log_probs: Of the step's `targets` under it, in nats.
        logprobs: Of what the trunk chose, where the request asks for them.
        scores: Of the step's `scored`.

    What was not wanted may be empty.
    """

    token_ids: list[int]
    confidences: list[float] = field(default_factory=list)
    runner_ups: list[int] = field(default_factory=list)
    runner_up_confidences: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    scores: list[TokenLogprobs] = field(default_factory=list)


def causal_step(
    kind: str,
    token_ids: Sequence[int],
    *,
    start: int,
    wanted: Sequence[int],
    targets: Sequence[int] = (),
    scored: Sequence[tuple[int, int]] = (),
) -> Step:
    """Tokens from position `start` in the AR view: causal, adapter off."""
    num_tokens = len(token_ids)
    positions = range(start, start + num_tokens)
    return Step(
        kind=kind,
        token_ids=token_ids,
        positions=positions,
        groups=[TRUNK] * num_tokens,
        anchors=positions,
        mask_places=[0] * num_tokens,
        is_drafter_on=[False] * num_tokens,
        wanted=wanted,
        targets=targets,
        scored=scored,
    )


def group_step(
    kind: str,
    groups: Iterable[Group],
    *,
    form: AdapterForm,
    trunk: Step | None = None,
    wants_runner_up: bool = False,
    wants_entropy: bool = False,
    targets: Sequence[int] = (),
) -> Step:
    """A few trunk tokens, then groups in the diffusion view; confidences are always wanted.

    Args:
        kind: `denoise` is the view of that name; any other is drafting.
        groups: In feed order; the answers come in this order too.
        form: Of the adapter: whether it serves the view, and clean tokens.
        trunk: A causal step, fed and answered first; None for none.
        wants_runner_up: See `Step`.
        wants_entropy: See `Step`.
        targets: See `Step`, for all wanted answers.
    """
    trunk = trunk or causal_step(kind, (), start=0, wanted=())
    token_ids, positions = list(trunk.token_ids), list(trunk.positions)
    numbers, anchors = list(trunk.groups), list(trunk.anchors)
    places, is_on = list(trunk.mask_places), list(trunk.is_drafter_on)
    wanted = list(trunk.wanted)
    is_served = ("denoise" if kind == "denoise" else "draft") in form.views
    for number, group in enumerate(groups, start=BLOCK):
        num_tokens, first = len(group.token_ids), len(token_ids)
        own = range(group.start, group.start + num_tokens)
        token_ids += group.token_ids
        positions += own
        numbers += [number] * num_tokens
        anchors += [group.anchor] * num_tokens
        places += [
            position - group.anchor if is_masked else 0
            for position, is_masked in zip(own, group.is_masked, strict=True)
        ]
        is_on += [is_served and (masked or form.adapts_clean) for masked in group.is_masked]
        wanted += [first + i for i in group.wanted]
    return Step(
        kind=kind,
        token_ids=token_ids,
        positions=positions,
        groups=numbers,
        anchors=anchors,
        mask_places=places,
        is_drafter_on=is_on,
        wanted=wanted,
        wants_confidence=True,
        wants_runner_up=wants_runner_up,
        wants_entropy=wants_entropy,
        targets=targets,
    )


def block(
    token_ids: Sequence[int], *, start: int, mask_token_id: int, wanted: Sequence[int]
) -> Group:
    """The group of a diffusion block: its first token is clean whatever its id, every other is
    masked that has the mask token's id."""
    is_masked = [i > 0 and token_id == mask_token_id for i, token_id in enumerate(token_ids)]
    return Group(token_ids, is_masked, start, start - 1, wanted)
