"""Held-out acceptance of drafts from anchors: every place of every answer, then whole rounds.

Each place of a greedy answer is an anchor once. The runs of right drafts then say which anchors
decoding would stand at, so that tokens a round are those of decoding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimode.model import DrafterAdapter, TriModeModel
from trimode.training.anchor_config import AnchorPart
from trimode.training.anchor_groups import Groups, all_anchors, lay_out
from trimode.training.anchor_loss import Heads, group_chunks
from trimode.training.anchor_pass import ReadText, encode_groups, read_text
from trimode.training.anchor_walk import answers, walk
from trimode.training.config import TrainConfig
from trimode.training.evaluate import heldout_rows
from trimode.training.packing import PackedRows, TokenStream
from trimode.training.parallel import Parallel
from trimode.training.precision import Precision

NUM_CANDIDATES = 8
_GREEDY_SHARE = 0.95
"""Share of an answer's tokens that must be the AR view's likeliest for it to count as greedy; what
is missing is rounding."""


@dataclass(frozen=True, slots=True)
class FormQuality:
    """Drafts of one form, chosen greedily.

    Args:
        round_acceptance_length: Tokens a round: walked as `linear` decodes greedy answers.
        rounds: Rounds of that walk.
        fused_tokens: Tokens a forward if each forward verifies and every outcome has its group.
        leading_run: Right masks in a row, mean over all anchors.
        agreement_by_offset: Share of the masks at places 2 .. m + 1 that equal the text.
        conditional_by_offset: The same, of groups that are right before the place.
        recall_by_offset: Share of the places whose token is among the 8 likeliest of the mask.
    """

    round_acceptance_length: float
    rounds: int
    fused_tokens: float
    leading_run: float
    agreement_by_offset: list[float]
    conditional_by_offset: list[float]
    recall_by_offset: list[float]


@dataclass(frozen=True, slots=True)
class AnchorQuality:
    """The drafts on the held-out split.

    Args:
        tokens: Tokens of text read.
        answers: Answers drafted.
        greedy_share: Share of them that are the AR view's own greedy ones. The walk is over these;
            where there are none, over all.
        skip, block: What was measured of each form; None for one that is not trained.
    """

    tokens: int
    answers: int
    greedy_share: float
    skip: FormQuality | None
    block: FormQuality | None

    def of(self, form: str) -> FormQuality:
        """What was measured of a form."""
        found: FormQuality = getattr(self, form)
        return found


@dataclass(frozen=True, slots=True)
class AnchorReport:
    """An adapter on the held-out split, beside the base alone and the adapter before its first
    step, whose masks have their own embedding already."""

    num_masks: int
    form: str
    without_adapter: AnchorQuality
    untrained: AnchorQuality
    with_adapter: AnchorQuality

    def line(self) -> str:
        """One line for a log."""
        parts = []
        for form in ("skip", "block"):
            after = getattr(self.with_adapter, form)
            if after is None:
                continue
            untrained = self.untrained.of(form).round_acceptance_length
            before = self.without_adapter.of(form).round_acceptance_length
            offsets = " ".join(f"{value:.2f}" for value in after.conditional_by_offset)
            parts.append(
                f"{form} {after.round_acceptance_length:.3f} tokens a round ({untrained:.3f} "
                f"untrained, {before:.3f} without the adapter), fused {after.fused_tokens:.3f} a "
                f"forward, right by place if all before are {offsets}"
            )
        return "; ".join(parts)


@torch.no_grad()
def measure_anchors(
    model: TriModeModel,
    data: TokenStream,
    *,
    config: TrainConfig,
    parallel: Parallel,
    precision: Precision,
    heads: Heads,
    adapter: DrafterAdapter | None,
) -> AnchorQuality:
    """Draft from every place of the held-out answers.

    Args:
        model: The base.
        data: The split.
        config: Shape and number of rows.
        parallel: The ranks, which share the rows.
        precision: Of the forwards.
        heads: Of the base.
        adapter: What drafts; None is the base alone, its masks those of the vocabulary.
    """
    assert config.drafter is not None
    assert config.drafter.anchors is not None
    part, eos_token_id = config.drafter.anchors, data.eos_token_id
    tallies = {form: _Tally.new(part.num_masks) for form in part.forms}
    tokens = 0
    block_length = model.config.block_size
    for _, _, rows, is_counted in heldout_rows(
        data, config=config, block_length=block_length, parallel=parallel
    ):
        tokens += rows.clean_ids.numel() * is_counted
        on_device = rows.to(parallel.device)
        with precision.autocast():
            text = read_text(model, on_device)
            likeliest = _likeliest(text, heads, rows)
            for form, tally in tallies.items():
                drawn = all_anchors(rows, part=part, form=form).to(parallel.device)
                groups = lay_out(
                    on_device,
                    drawn,
                    mask_token_id=model.config.mask_token_id,
                    eos_token_id=eos_token_id,
                )
                drafted = _draft(model, text, groups, part=part, heads=heads, adapter=adapter)
                if is_counted:
                    tally.add(rows, groups, likeliest, *drafted, form=form)
    sums = {form: tally.on_all_ranks(parallel) for form, tally in tallies.items()}
    _, num_answers, num_greedy = sums[part.forms[0]].numbers.tolist()
    return AnchorQuality(
        tokens=int(parallel.sum_numbers([tokens])[0]),
        answers=num_answers,
        greedy_share=round(num_greedy / max(num_answers, 1), 4),
        skip=sums["skip"].quality() if "skip" in sums else None,
        block=sums["block"].quality() if "block" in sums else None,
    )


def _likeliest(text: ReadText, heads: Heads, rows: PackedRows) -> Tensor:
    """[B, S] int64 on the CPU: the AR view's choice for each supervised place, -1 elsewhere."""
    found = torch.full_like(rows.clean_ids, -1)
    is_target = rows.is_supervised.clone()
    is_target[:, 0] = False
    places = is_target.flatten().nonzero()[:, 0]
    states = text.hidden.flatten(0, 1)
    for some in places.split(128):
        chosen = heads.exact(states[some.to(states.device) - 1]).argmax(1)
        found.view(-1)[some] = chosen.cpu()
    return found


def _draft(
    model: TriModeModel,
    text: ReadText,
    groups: Groups,
    *,
    part: AnchorPart,
    heads: Heads,
    adapter: DrafterAdapter | None,
) -> tuple[Tensor, Tensor]:
    """Whether each target is drafted right, and is among its mask's candidates: [M] bool each.

    The corrector sees the true token before each mask, which is what was drafted there as long as
    all masks before are right; so runs of right masks are those of decoding.
    """
    hidden = encode_groups(model, text, groups, adapter=adapter, adapts_clean=part.adapts_clean)
    states, clean_ids = hidden[groups.targets], text.rows.clean_ids.flatten()
    embeddings = model.encoder.embed_tokens.weight
    corrector = None if adapter is None else adapter.corrector
    width = max(NUM_CANDIDATES, 0 if corrector is None else corrector.num_candidates)
    is_right = torch.zeros_like(groups.targets, dtype=torch.bool)
    is_candidate = torch.zeros_like(is_right)
    for chunk in group_chunks(groups.target_groups, groups.drawn.num_groups):
        before = groups.text_places[chunk] - 1
        truth = clean_ids[before + 1]
        best = heads.exact(states[chunk]).topk(min(width, model.config.vocab_size), dim=1)
        ids, scores = best.indices, best.values
        is_candidate[chunk] = (ids[:, :NUM_CANDIDATES] == truth[:, None]).any(1)
        if corrector is not None:
            ids, scores = (x[:, : corrector.num_candidates] for x in (ids, scores))
            added = corrector(embeddings[clean_ids[before]], states[chunk], embeddings[ids])
            ids = ids.gather(1, (scores + added.to(scores.dtype)).argmax(1, keepdim=True))
        is_right[chunk] = ids[:, 0] == truth
    return is_right, is_candidate


@dataclass(frozen=True, slots=True)
class _Tally:
    """Counts over anchors and answers, which add up over rows and ranks. Added to in place.

    Args:
        by_place: [5, m] int64. Masks that are right; right with all before them; there behind right
            ones only; candidates; there.
        numbers: [3] int64. Anchors; answers; greedy answers.
        walked: [2, 3] int64. Tokens, rounds and fused forwards: of greedy answers, of all.
    """

    by_place: Tensor
    numbers: Tensor
    walked: Tensor

    @classmethod
    def new(cls, num_masks: int) -> _Tally:
        shapes = ((5, num_masks), (3,), (2, 3))
        by_place, numbers, walked = (torch.zeros(shape, dtype=torch.int64) for shape in shapes)
        return cls(by_place, numbers, walked)

    def add(
        self,
        rows: PackedRows,
        groups: Groups,
        likeliest: Tensor,
        is_right: Tensor,
        is_candidate: Tensor,
        *,
        form: str,
    ) -> None:
        """Count the groups of some rows.

        Args:
            rows: On the CPU.
            groups: One at every place that may be an anchor.
            likeliest: [B, S] The AR view's choices.
            is_right, is_candidate: [M] bool, of the targets.
            form: Of the groups.
        """
        drawn, width = groups.drawn, groups.drawn.is_hidden.shape[1]
        grids = []
        for flags in (is_right, is_candidate, torch.ones_like(is_right)):
            grid = torch.zeros(drawn.num_groups, width, dtype=torch.int64)
            grid[groups.target_groups.cpu(), groups.places.cpu() - 2] = flags.cpu().long()
            grids.append(grid)
        right, recalled, present = grids
        reached = right.cumprod(1)
        asked = present.clone()
        asked[:, 1:] *= reached[:, :-1]
        self.by_place.add_(torch.stack((right, reached, asked, recalled, present)).sum(1))
        self.numbers[0] += drawn.num_groups
        run_at = torch.zeros_like(rows.clean_ids)
        run_at[drawn.rows.cpu(), drawn.anchors.cpu()] = reached.sum(1)
        for row in range(len(rows.clean_ids)):
            found = answers(rows.is_supervised[row].tolist(), rows.document_ids[row].tolist())
            for start, end in found:
                is_greedy = _is_greedy(rows, likeliest, row, start, end)
                self._add_answer(run_at[row], start, end, is_greedy=is_greedy, form=form)

    def _add_answer(
        self, run_at: Tensor, start: int, end: int, *, is_greedy: bool, form: str
    ) -> None:
        """Walk one answer. The last token is place 1, so the anchor is before it. Where a `skip`
        round opens with a forward of its own, the last token is the anchor."""
        num_exact, num_tokens = int(form == "skip"), end - start
        behind = [0] * (start == 0) + run_at[max(start - 1, 0) : end].tolist()
        tokens, rounds = walk(behind[num_exact:], num_tokens=num_tokens, num_exact=num_exact)
        _, fused = walk(behind, num_tokens=num_tokens, num_exact=0)
        found = torch.tensor([tokens, rounds, fused])
        self.numbers[1:] += torch.tensor([1, int(is_greedy)])
        self.walked.add_(torch.stack((found * is_greedy, found)))

    def on_all_ranks(self, parallel: Parallel) -> _Tally:
        """The counts of all ranks together."""
        columns = (self.by_place, self.numbers, self.walked)
        by_place, numbers, walked = (parallel.sum_over_data(x).cpu() for x in columns)
        return _Tally(by_place, numbers, walked)

    def quality(self) -> FormQuality:
        """The shares."""
        right, reached, asked, recalled, present = self.by_place.tolist()
        num_anchors, _, num_greedy = self.numbers.tolist()
        tokens, rounds, fused = self.walked[0 if num_greedy else 1].tolist()
        return FormQuality(
            round_acceptance_length=tokens / max(rounds, 1),
            rounds=rounds,
            fused_tokens=tokens / max(fused, 1),
            leading_run=sum(reached) / max(num_anchors, 1),
            agreement_by_offset=_shares(right, present),
            conditional_by_offset=_shares(reached, asked),
            recall_by_offset=_shares(recalled, present),
        )


def _shares(parts: list[int], wholes: list[int]) -> list[float]:
    return [round(part / max(whole, 1), 4) for part, whole in zip(parts, wholes, strict=True)]


def _is_greedy(rows: PackedRows, likeliest: Tensor, row: int, start: int, end: int) -> bool:
    """Whether an answer is what the AR view would write greedily."""
    hits = likeliest[row, start:end] == rows.clean_ids[row, start:end]
    return float(hits.float().mean()) >= _GREEDY_SHARE
