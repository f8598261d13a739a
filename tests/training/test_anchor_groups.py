"""Which groups are drawn and what they feed, against rules written out token by token."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.training.fake_stream import EOS, MASK, FakeChats
from trimode.errors import ConfigError
from trimode.training.adapter_config import DrafterPart
from trimode.training.anchor_config import AnchorPart
from trimode.training.anchor_groups import (
    BLOCK,
    DENOISE,
    SKIP,
    Drawn,
    all_anchors,
    draw_groups,
    lay_out,
    moved,
)
from trimode.training.conversation_packing import ConversationSampler
from trimode.training.packing import PackedRows

CHATS = FakeChats([30, 12, 41, 25, 9, 50, 33, 18], [6, 5, 11, 4, 7, 10, 8, 16], seed=3)
PART = AnchorPart(per_row=8, num_masks=4)
BOTH = AnchorPart(
    per_row=20, num_masks=4, forms=("block", "skip"), views=("draft", "denoise"), keep=0.7
)
K = 6


def rows_of(samples: range = range(4)) -> PackedRows:
    return ConversationSampler(CHATS, 64, (2,), seed=0).rows(samples)


def draw(part: AnchorPart, samples: range = range(4), *, is_replaying: bool = False) -> Drawn:
    return draw_groups(
        rows_of(samples),
        samples,
        part=part,
        block_length=K,
        seed=5,
        is_replaying=is_replaying,
    )


def spans(drawn: Drawn) -> list[tuple[int, range]]:
    """Row and fed places of every group, place 1 included."""
    columns = torch.stack((drawn.rows, drawn.anchors, drawn.num_places), dim=1).tolist()
    return [(row, range(a + 1, a + n + 2)) for row, a, n in columns]


@pytest.mark.parametrize("part", [PART, BOTH])
def test_groups_do_not_overlap_and_stay_in_their_text(part: AnchorPart) -> None:
    """Prevents targets in prompts or in another document, and places that are fed twice."""
    rows, drawn = rows_of(), draw(part)
    assert drawn.num_groups > 8
    for row, anchor in zip(drawn.rows.tolist(), drawn.anchors.tolist(), strict=True):
        ids = rows.document_ids[row, anchor : anchor + 3]
        assert len(ids) == 3
        assert (ids == ids[0]).all()
        assert rows.is_supervised[row, anchor + 1 : anchor + 3].all()
    fed = [(row, place) for row, span in spans(drawn) for place in span]
    assert len(fed) == len(set(fed))
    assert max(np.bincount(drawn.rows.numpy())) <= part.per_row


def test_a_spacing_lets_groups_overlap() -> None:
    """Prevents `spacing` from being read as no more than a smaller gap."""
    drawn = draw(replace(PART, per_row=60, spacing=2))
    flat = drawn.rows * 1000 + drawn.anchors
    gaps = flat.diff()
    assert min(gaps) == 2
    assert drawn.num_groups > 1.5 * draw(replace(PART, per_row=60)).num_groups


def test_draws_are_functions_of_seed_and_sample() -> None:
    """Prevents batches that change with the split into micro-batches, or on resume."""
    whole, last = draw(BOTH), draw(BOTH, range(2, 4))
    is_last = whole.rows >= 2
    assert whole.anchors[is_last].equal(last.anchors)
    assert whole.is_hidden[is_last].equal(last.is_hidden)
    assert whole.kinds[is_last].equal(last.kinds)


def test_kinds_and_lengths_have_their_shares() -> None:
    """Prevents `first_share`, `denoise_share` or `keep` from being ignored or applied twice."""
    part = replace(BOTH, first_share=0.25, denoise_share=0.2, spacing=1, per_row=64)
    drawn = draw(part, range(40))
    kinds = torch.bincount(drawn.kinds, minlength=3) / drawn.num_groups
    assert kinds[DENOISE] == pytest.approx(0.2, abs=0.04)
    assert kinds[BLOCK] == pytest.approx(0.8 * 0.25, abs=0.04)
    lens = drawn.is_hidden[drawn.kinds != DENOISE].sum(1)
    for j in range(1, 5):
        assert float((lens >= j).float().mean()) == pytest.approx(0.7 ** (j - 1), abs=0.04)
    hidden = drawn.is_hidden[drawn.kinds == DENOISE][:, : K - 1].float()
    assert (hidden.sum(1) >= 1).all()
    assert float(hidden.mean()) == pytest.approx(0.52, abs=0.05)


@pytest.mark.parametrize("part", [PART, BOTH])
@pytest.mark.parametrize("has_turns", [False, True])
def test_what_is_fed(part: AnchorPart, has_turns: bool) -> None:
    """Prevents a position, target or end of the text that is off by one, a target in the turn after
    the next, and a length of a group that gives the end away."""
    rows = rows_of()
    if has_turns:
        is_prompt = torch.arange(64) % 9 == 0
        rows = replace(rows, is_supervised=rows.is_supervised & ~is_prompt)
    drawn = draw_groups(rows, range(4), part=part, block_length=K, seed=5)
    groups = lay_out(rows, drawn, mask_token_id=MASK, eos_token_id=EOS)
    fed, targets = [], []
    for g in range(drawn.num_groups):
        row, anchor = int(drawn.rows[g]), int(drawn.anchors[g])
        document, at = rows.document_ids[row], int(rows.position_ids[row, anchor])
        is_over = False
        first = 2 if drawn.kinds[g] == SKIP else 1
        for place in range(1, int(drawn.num_places[g]) + 2):
            i = anchor + place
            is_over = is_over or i >= 64 or bool(document[i] != document[anchor])
            is_over = is_over or not rows.is_supervised[row, i]
            if place < first:
                continue
            is_hidden = place > 1 and bool(drawn.is_hidden[g, place - 2])
            clean = EOS if is_over else int(rows.clean_ids[row, i])
            if is_hidden and not is_over:
                targets.append((len(fed), place, row * 64 + i))
            fed.append((MASK if is_hidden else clean, at + place, g, place if is_hidden else 0))
    columns = (groups.token_ids, groups.position_ids, groups.group_ids, groups.mask_places)
    assert [tuple(x) for x in torch.stack(columns, 1).tolist()] == fed
    columns = (groups.targets, groups.places, groups.text_places)
    assert [tuple(x) for x in torch.stack(columns, 1).tolist()] == targets
    assert groups.lens.tolist() == torch.bincount(groups.group_ids).tolist()
    if part is PART:
        assert (groups.lens == 4).all()
        assert len(targets) < len(fed)  # some reach beyond the end


def test_every_anchor_is_there_once() -> None:
    """Prevents an evaluation that leaves places out, the last prompt token above all."""
    rows = rows_of()
    drawn = all_anchors(rows, part=PART, form="skip")
    found = set(zip(drawn.rows.tolist(), drawn.anchors.tolist(), strict=True))
    starts = 0
    for row in range(4):
        for i in range(62):
            is_good = bool(rows.is_supervised[row, i + 1 : i + 3].all())
            is_good = is_good and rows.document_ids[row, i] == rows.document_ids[row, i + 2]
            assert ((row, i) in found) == is_good
            starts += is_good and not rows.is_supervised[row, i]
    assert starts > 3


def test_replayed_groups_begin_where_the_round_ends() -> None:
    """Prevents a replay from the wrong token: one too late or too early, or beyond the text."""
    part = replace(BOTH, views=("draft",), denoise_share=0.25, replay_share=0.5)
    rows = rows_of()
    assert not draw(part).is_replayed.any()
    drawn = draw(part, is_replaying=True)
    assert 0.2 < float(drawn.is_replayed.float().mean()) < 0.8
    runs = torch.arange(drawn.num_groups) % 5
    after = moved(rows, drawn, runs)
    expected = []
    for g in range(drawn.num_groups):
        row, anchor, run = int(drawn.rows[g]), int(drawn.anchors[g]), int(runs[g])
        new = anchor + run + (2 if drawn.kinds[g] == SKIP else 1)
        ids = rows.document_ids[row, [anchor, *range(new, min(new + 3, 64))]]
        is_good = len(ids) == 4 and bool((ids == ids[0]).all())
        is_good = is_good and bool(rows.is_supervised[row, new + 1 : new + 3].all())
        expected.append((row, new if drawn.is_replayed[g] and is_good else anchor))
    found = list(zip(after.rows.tolist(), after.anchors.tolist(), strict=True))
    assert found == sorted(expected)
    assert found != list(zip(drawn.rows.tolist(), drawn.anchors.tolist(), strict=True))
    assert after.is_hidden.sum() == drawn.is_hidden.sum()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_masks": 0}, "num_masks is 0, but must be at least 1"),
        ({"keep": 0.0}, "keep is 0.0, but must be above 0"),
        ({"spacing": 0}, "spacing is 0"),
        ({"forms": ()}, r"forms is \[\], but must be some of block, skip"),
        ({"views": ("denoise",)}, "views is .* but must hold draft"),
        ({"first_share": 0.3}, "first_share is 0.3, but means nothing"),
        ({"denoise_share": 0.5}, "denoise_share is 0.5, but means nothing"),
        ({"weights": "even", "decay_ratio": 0.5}, "decay_ratio is 0.5, but means nothing"),
        ({"uncorrected_weight": 0.1}, "uncorrected_weight is 0.1, but means nothing"),
        ({"adapts_clean": True}, "adapts_clean is True, but means nothing"),
        ({"replay_share": 1.5}, "replay_share is 1.5, but must lie between 0 and 1"),
    ],
)
def test_refusals(values: dict[str, object], message: str) -> None:
    """Prevents a run of hours with a key that nothing reads."""
    with pytest.raises(ConfigError, match=message):
        AnchorPart(**values)  # type: ignore[arg-type]


def test_keys_of_the_rounds_are_refused_beside_anchors() -> None:
    """Prevents published keys that anchors ignore, such as `sampled_share`."""
    with pytest.raises(ConfigError, match=r"sampled_share is 0\.5, but means nothing beside"):
        DrafterPart(sampled_share=0.5, anchors=PART)
    with pytest.raises(ConfigError, match=r"temperature is 1\.0, but means nothing beside"):
        DrafterPart(temperature=1.0, anchors=PART)
    assert DrafterPart(temperature=1.0, anchors=replace(PART, loss="lk")).temperature == 1.0
