"""One forward for many sequences: pack their steps, run the network, choose, hand back readouts."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from trimode.decoding.choice import Choice
from trimode.decoding.choose import choose, widened
from trimode.decoding.law import RowLaw
from trimode.decoding.native_choice import is_native
from trimode.decoding.scoring import score
from trimode.decoding.sequence import Sequence
from trimode.decoding.step import Readout, Step, TokenLogprobs
from trimode.engine.correction import (
    Before,
    choose_in_waves,
    native_correction,
    native_corrector,
    tokens_before,
)
from trimode.errors import ConfigError
from trimode.model import (
    AdapterSwitch,
    DrafterAdapter,
    KVCache,
    RowAttention,
    TriModeModel,
)
from trimode.model.attention import RowFeed
from trimode.model.masks import TRUNK
from trimode.model.native.choice import Correction, NativeCorrector

SCORED_ROWS = 128
"""Tokens of prompts that the head scores at a time, so that a long prompt's logits never lie in
memory together."""


@dataclass(frozen=True, slots=True)
class Feed:
    """A sequence, the K/V row it owns, and the step it asks for."""

    seq: Sequence
    row: int
    step: Step


class Runner:
    """Holds the network and its K/V; one call is one forward.

    Args:
        model: The network, in evaluation mode.
        cache: Rows for as many sequences as ever run together.
        adapter: The drafter adapter; None drafts with the network itself.

    Raises:
        ConfigError: the network is a part of one that another rank leads.
    """

    def __init__(
        self, model: TriModeModel, cache: KVCache, *, adapter: DrafterAdapter | None = None
    ) -> None:
        if model.num_ranks > 1 and model.leader is None:
            raise ConfigError(
                "this rank has a part of the model only and decides nothing; call `.ranks.follow()`"
                " here, and `generate` on rank 0"
            )
        self._model = model
        self._cache = cache
        self._adapter = adapter
        self._device = cache.keys.device
        self._banned = torch.tensor(model.config.banned_token_ids, device=self._device)

    def copy_prefix(self, source: int, target: int, num_cells: int) -> None:
        """See `KVCache.copy_prefix`."""
        self._cache.copy_prefix(source, target, num_cells)

    @torch.inference_mode()
    def run(self, feeds: Items[Feed]) -> list[Readout | None]:
        """Run one forward.

        Args:
            feeds: What to feed, one per sequence.

        Returns:
            For each feed its answers, or None where they were not finite; that row has been
            scrubbed.
        """
        order = sorted(
            range(len(feeds)), key=lambda i: (len(feeds[i].step.token_ids), feeds[i].row)
        )
        packed = [feeds[i] for i in order]
        states, logits, scored_states = self._answer(packed)
        choice = self._choose(packed, states, logits)
        scores = self._scores(packed, scored_states)
        readouts: list[Readout | None] = [None] * len(feeds)
        start = 0
        for i, feed, own_scores in zip(order, packed, scores, strict=True):
            stop = start + len(feed.step.wanted)
            if all(choice.is_finite[start:stop]) and own_scores is not None:
                answers = slice(start, stop)
                readouts[i] = Readout(
                    choice.token_ids[answers],
                    choice.confidences[answers],
                    choice.runner_ups[answers],
                    choice.runner_up_confidences[answers],
                    choice.entropies[answers],
                    choice.log_probs[answers],
                    [found for found in choice.logprobs[answers] if found is not None],
                    own_scores,
                )
            else:
                self._cache.scrub(feed.row)
            start = stop
        return readouts

    @cached_property
    def _native_corrector(self) -> NativeCorrector | None:
        """For the compiled library; None where it cannot be used. Neither adapter nor model change
        while they run."""
        assert self._adapter is not None
        assert self._adapter.corrector is not None
        return native_corrector(self._adapter.corrector, self._model.embedding_rows)

    def _choose(self, packed: list[Feed], states: Tensor, logits: Tensor) -> Choice:
        """A choice for each of the wanted answers, [W, H] and [W, V], in packed order."""
        logits = widened(logits)
        params = [feed.seq.params for feed in packed for _ in feed.step.wanted]
        positions = [p for feed in packed for p in feed.step.answer_positions]
        targets = [target for feed in packed for target in _targets(feed.step)]
        laws = _laws(packed, num_tokens=self._model.config.vocab_size)
        num_logprobs = _num_logprobs(packed)

        def choose_rows(
            logits: Tensor, rows: Items[int], correction: Correction | None = None
        ) -> Choice:
            return choose(
                logits,
                params=[params[row] for row in rows],
                positions=[positions[row] for row in rows],
                banned=self._banned,
                wants_confidence=any(feed.step.wants_confidence for feed in packed),
                wants_runner_up=any(feed.step.wants_runner_up for feed in packed),
                wants_entropy=any(feed.step.wants_entropy for feed in packed),
                targets=[targets[row] for row in rows],
                laws=[laws[row] for row in rows] if laws else [],
                num_logprobs=[num_logprobs[row] for row in rows] if num_logprobs else [],
                none_id=self._model.config.mask_token_id,
                correction=correction,
            )

        corrector = None if self._adapter is None else self._adapter.corrector
        before: list[Before | None] = []
        if corrector is not None:
            for feed in packed:
                before += tokens_before(feed.seq, feed.step, first_row=len(before))
        if corrector is None or not any(before):
            return choose_rows(logits, range(len(logits)))
        if is_native(logits) and self._native_corrector is not None:
            correction = native_correction(self._native_corrector, states, before)
            return choose_rows(logits, range(len(logits)), correction)
        embeddings = self._model.embedding_rows
        assert isinstance(embeddings, Tensor), "packed weights have a library that corrects"
        return choose_in_waves(
            logits,
            states,
            before=before,
            corrector=corrector,
            embeddings=embeddings,
            banned=self._banned,
            choose_rows=choose_rows,
        )

    def _scores(self, packed: list[Feed], states: Tensor) -> list[list[TokenLogprobs] | None]:
        """Of each feed's scored tokens, whose states are [S, H] in packed order; None where the
        logits were not finite."""
        scores: list[list[TokenLogprobs] | None] = []
        start = 0
        for feed in packed:
            targets = [target for _, target in feed.step.scored]
            found: list[TokenLogprobs] = []
            for first in range(0, len(targets), SCORED_ROWS):
                some = targets[first : first + SCORED_ROWS]
                rows = states[start + first : start + first + len(some)]
                found += score(
                    self._model.diffusion_head(rows),
                    some,
                    banned=self._banned,
                    num_top=feed.seq.params.prompt_logprobs or 0,
                )
            is_finite = len(found) == len(targets)
            scores.append(found if is_finite else None)
            start += len(targets)
        return scores

    def _answer(self, packed: list[Feed]) -> tuple[Tensor, Tensor, Tensor]:
        """States [W, H] and logits [W, V] of the wanted tokens, and states [S, H] of the scored
        ones, in packed order; K/V of all fed ones go to the cells after each length."""
        wanted, scored, start = list[int](), list[int](), 0
        for feed in packed:
            wanted += [start + i for i in feed.step.wanted]
            scored += [start + i for i, _ in feed.step.scored]
            start += len(feed.step.token_ids)
        ids = [i for feed in packed for i in feed.step.token_ids]
        positions = [p for feed in packed for p in feed.step.positions]
        input_ids, position_ids = torch.tensor([ids, positions], device=self._device)
        feeds = [
            RowFeed(
                *(feed.row, feed.seq.length),
                groups=feed.step.groups,
                positions=feed.step.positions,
                anchors=feed.step.anchors,
            )
            for feed in packed
        ]
        attend = RowAttention(self._cache, feeds)
        adapter = AdapterSwitch.of(
            self._adapter,
            [is_on for feed in packed for is_on in feed.step.is_drafter_on],
            [place for feed in packed for place in feed.step.mask_places],
            device=self._device,
        )
        model = self._model
        if not scored:
            states, logits = model.answer(
                input_ids, position_ids, attend=attend, adapter=adapter, wanted=wanted
            )
            return states, logits, states[:0]
        hidden = model.encode(input_ids, position_ids, attend=attend, adapter=adapter)
        states = hidden[torch.tensor(wanted, device=hidden.device)]
        return (
            states,
            model.diffusion_head(states),
            hidden[torch.tensor(scored, device=hidden.device)],
        )


def _targets(step: Step) -> Items[int | None]:
    return step.targets or [None] * len(step.wanted)


def _laws(packed: list[Feed], *, num_tokens: int) -> list[RowLaw | None]:
    """For each wanted answer; empty if there are none."""
    if all(feed.seq.rules is None and not feed.step.allowed for feed in packed):
        return []
    laws: list[RowLaw | None] = []
    for feed in packed:
        rules, step = feed.seq.rules, feed.step
        if rules is not None:
            laws += rules.rows(feed.seq, step, num_tokens=num_tokens)
        else:
            own = step.allowed or [None] * len(step.wanted)
            laws += [None if allowed is None else RowLaw(allowed) for allowed in own]
    return laws


def _num_logprobs(packed: list[Feed]) -> list[int | None]:
    """For each wanted answer, which only those of the AR view have; empty if nobody asks."""
    if all(feed.seq.params.control.logprobs is None for feed in packed):
        return []
    return [
        feed.seq.params.control.logprobs if feed.step.groups[i] == TRUNK else None
        for feed in packed
        for i in feed.step.wanted
    ]
