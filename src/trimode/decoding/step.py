"""What a mode asks of the network (`Step`) and what it gets back (`Readout`). Data only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from trimode.model.masks import TRUNK

FORWARD_KINDS = ("prefill", "decode", "draft", "verify", "denoise", "commit")

BLOCK = 1
"""Group of the tokens of a block that see each other bidirectionally (any group but the trunk)."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one sequence feeds in one forward, T tokens.

    Attributes:
        kind: One of `FORWARD_KINDS`, for the counts.
        token_ids: [T] ids fed.
        positions: [T] absolute positions.
        groups: [T] group of each (`trimode.model.masks.fed_mask`); 0 is the causal trunk.
        is_drafter_on: [T] whether the drafter adapter is on for each.
        wanted: Indexes into the fed tokens whose answer is wanted. A trunk token answers for the
            position after its own (the AR law), any other token for its own (the diffusion law).
        wants_confidence: Whether how sure each answer is, is wanted too.
        wants_runner_up: Whether the second choice for each, and its probability, is wanted too.
        wants_entropy: Whether the entropy of each law is wanted too.
        targets: One token for each of `wanted`, whose log-probability is asked for; or none.
    """

    kind: str
    token_ids: Sequence[int]
    positions: Sequence[int]
    groups: Sequence[int]
    is_drafter_on: Sequence[bool]
    wanted: Sequence[int]
    wants_confidence: bool = False
    wants_runner_up: bool = False
    wants_entropy: bool = False
    targets: Sequence[int] = ()

    @property
    def answer_positions(self) -> list[int]:
        """Absolute position that each wanted answer is for."""
        return [self.positions[i] + (self.groups[i] == TRUNK) for i in self.wanted]

    def head(self, num_tokens: int) -> Step:
        """A prefill cut short: its first tokens, and the answer behind the last of them, which
        shows whether all went well."""
        if self.kind != "prefill" or not 1 <= num_tokens <= len(self.token_ids):
            raise AssertionError(f"{num_tokens} tokens of a {self.kind} of {len(self.token_ids)}")
        start = self.positions[0]
        return causal_step(
            "prefill", self.token_ids[:num_tokens], start=start, wanted=[num_tokens - 1]
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
    """How likely an emitted token was, under the AR view at temperature 1 after the ban, before
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

    What was not wanted may be empty.
    """

    token_ids: list[int]
    confidences: list[float] = field(default_factory=list)
    runner_ups: list[int] = field(default_factory=list)
    runner_up_confidences: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)


def causal_step(
    kind: str,
    token_ids: Sequence[int],
    *,
    start: int,
    wanted: Sequence[int],
    targets: Sequence[int] = (),
) -> Step:
    """Tokens from position `start` in the AR view: causal, adapter off."""
    num_tokens = len(token_ids)
    return Step(
        kind=kind,
        token_ids=token_ids,
        positions=range(start, start + num_tokens),
        groups=[TRUNK] * num_tokens,
        is_drafter_on=[False] * num_tokens,
        wanted=wanted,
        targets=targets,
    )


def block_step(
    kind: str,
    token_ids: Sequence[int],
    *,
    start: int,
    wanted: Sequence[int],
    is_drafter_on: bool,
    wants_confidence: bool = True,
    wants_runner_up: bool = False,
    wants_entropy: bool = False,
) -> Step:
    """A block from position `start` in the diffusion view: bidirectional within itself."""
    num_tokens = len(token_ids)
    return Step(
        kind=kind,
        token_ids=token_ids,
        positions=range(start, start + num_tokens),
        groups=[BLOCK] * num_tokens,
        is_drafter_on=[is_drafter_on] * num_tokens,
        wanted=wanted,
        wants_confidence=wants_confidence,
        wants_runner_up=wants_runner_up,
        wants_entropy=wants_entropy,
    )
