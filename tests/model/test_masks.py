"""What may attend to what: truth tables written out by hand, and slow twins."""

from __future__ import annotations

import random

import pytest
import torch

from tests import reference
from trimode.model.masks import TRUNK, cell_mask, dense_mask, fed_mask


def table(*rows: str) -> list[list[bool]]:
    """`x` may attend, `.` may not."""
    return [[mark == "x" for mark in row.replace(" ", "")] for row in rows]


def test_trunk_is_causal() -> None:
    """A verify or prefill that sees the future."""
    assert fed_mask([0, 0, 0, 0], [7, 8, 9, 10], [7, 8, 9, 10]).tolist() == table(
        "x . . .",
        "x x . .",
        "x x x .",
        "x x x x",
    )


def test_block_sees_all_of_itself() -> None:
    """A denoised block that is causal inside."""
    assert fed_mask([1, 1, 1], [7, 8, 9], [6, 6, 6]).tolist() == table(
        "x x x",
        "x x x",
        "x x x",
    )


def test_groups_see_the_trunk_before_their_start() -> None:
    """A group that sees the trunk token it replaces, or one after it; groups that see each other.

    Trunk d1 d2 d3 at 7, 8, 9. Group 1 imagines what follows d1 (from 8), group 2 what follows d2
    (from 9), group 3 what follows d3.
    """
    groups = [0, 0, 0, 1, 1, 2, 2, 3, 3]
    positions = [7, 8, 9, 8, 9, 9, 10, 10, 11]
    anchors = [7, 8, 9, 7, 7, 8, 8, 9, 9]
    assert fed_mask(groups, positions, anchors).tolist() == table(
        "x . .  . .  . .  . .",
        "x x .  . .  . .  . .",
        "x x x  . .  . .  . .",
        "x . .  x x  . .  . .",
        "x . .  x x  . .  . .",
        "x x .  . .  x x  . .",
        "x x .  . .  x x  . .",
        "x x x  . .  . .  x x",
        "x x x  . .  . .  x x",
    )


def test_interleaved_feed_order() -> None:
    """A mask that takes feed order for position, or a group's first fed token for its start.

    Fed: group 5's later half, a trunk token, group 5's first token, two more trunk tokens.
    """
    groups = [5, 0, 5, 0, 0]
    positions = [12, 10, 11, 11, 12]
    assert fed_mask(groups, positions, [10, 10, 10, 11, 12]).tolist() == table(
        "x x x . .",
        ". x . . .",
        "x x x . .",
        ". x . x .",
        ". x . x x",
    )


def test_masks_that_skip_the_bonus_see_no_draft_behind_their_anchor() -> None:
    """A group of masks that begins one place later taken to see one draft more, which the outcome
    it is for has rejected.

    Trunk last d1 d2 at 7, 8, 9. Group 1: nothing was accepted, so the bonus stands at 8 and its
    masks from 9 on. Group 2: d1 was accepted, the bonus stands at 9, its masks from 10 on.
    """
    groups = [0, 0, 0, 1, 1, 2, 2]
    positions = [7, 8, 9, 9, 10, 10, 11]
    anchors = [7, 8, 9, 7, 7, 8, 8]
    assert fed_mask(groups, positions, anchors).tolist() == table(
        "x . .  . .  . .",
        "x x .  . .  . .",
        "x x x  . .  . .",
        "x . .  x x  . .",
        "x . .  x x  . .",
        "x x .  . .  x x",
        "x x .  . .  x x",
    )


def test_group_before_the_trunk_sees_none_of_it() -> None:
    """A group at the committed length seeing fed trunk tokens at or after its start."""
    assert fed_mask([1, 1, 0, 0], [4, 5, 4, 5], [3, 3, 4, 5]).tolist() == table(
        "x x . .",
        "x x . .",
        ". . x .",
        ". . x x",
    )


@pytest.mark.parametrize("seed", range(20))
def test_fed_mask_equals_its_slow_twin(seed: int) -> None:
    """Any mixture of groups and positions that the written tables do not show."""
    draw = random.Random(seed)
    num_tokens = draw.randint(1, 12)
    groups = [draw.choice([TRUNK, TRUNK, 1, 2, 9]) for _ in range(num_tokens)]
    positions, anchors = drawn_places(draw, groups, 5)
    expected = reference.fed_mask(groups, positions, anchors)
    assert fed_mask(groups, positions, anchors).tolist() == expected


def drawn_places(
    draw: random.Random, groups: list[int], length: int
) -> tuple[list[int], list[int]]:
    """Positions and anchors of some groups: the trunk goes on from `length`, a group has one
    anchor and lies anywhere."""
    next_position, positions, anchors = length, [], []
    group_anchors = {group: length - 1 + draw.randint(0, 6) for group in set(groups)}
    for group in groups:
        if group == TRUNK:
            positions.append(next_position)
            anchors.append(next_position)
            next_position += 1
        else:
            positions.append(length + draw.randint(0, 7))
            anchors.append(group_anchors[group])
    return positions, anchors


def test_cell_mask_by_hand() -> None:
    """Fed cells placed at the row's end instead of after its length, or stale cells seen.

    Two rows feed two causal tokens each; 1 and 3 cells are committed, 6 are looked at.
    """
    fed = torch.tensor([table("x .", "x x")] * 2)
    mask = cell_mask(fed, torch.tensor([1, 3]), 6)
    assert mask.shape == (2, 1, 2, 6)
    assert mask[0, 0].tolist() == table(
        "x x . . . .",
        "x x x . . .",
    )
    assert mask[1, 0].tolist() == table(
        "x x x x . .",
        "x x x x x .",
    )


@pytest.mark.parametrize("seed", range(10))
def test_cell_mask_equals_its_slow_twin(seed: int) -> None:
    """Lengths of zero, equal lengths, and more cells than are needed."""
    draw = random.Random(seed)
    num_rows, num_tokens = draw.randint(1, 4), draw.randint(1, 5)
    lengths = [draw.choice([0, 0, draw.randint(0, 9)]) for _ in range(num_rows)]
    num_cells = max(lengths) + num_tokens + draw.choice([0, 3])
    tables = []
    for length in lengths:
        groups = [draw.choice([TRUNK, 1, 2]) for _ in range(num_tokens)]
        tables.append(reference.fed_mask(groups, *drawn_places(draw, groups, length)))
    mask = cell_mask(torch.tensor(tables), torch.tensor(lengths), num_cells)
    for row in range(num_rows):
        expected = reference.cell_mask(tables[row], lengths[row], num_cells)
        assert mask[row, 0].tolist() == expected


def test_dense_masks() -> None:
    """Padding seen by real tokens, or a padded token left with nothing to attend to (NaN)."""
    ids = torch.zeros(2, 4, dtype=torch.long)
    assert dense_mask("causal", ids, None) is None
    everything = dense_mask("bidirectional", ids, None)
    assert everything is not None
    assert everything.shape == (1, 1, 4, 4)
    assert everything.all()
    padding = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
    causal = dense_mask("causal", ids, padding)
    both_ways = dense_mask("bidirectional", ids, padding)
    assert causal is not None
    assert both_ways is not None
    assert causal[0, 0].tolist() == table("x . . .", ". x . .", ". x x .", ". x x x")
    assert causal[1, 0].tolist() == table("x . . .", "x x . .", "x x x .", "x x . x")
    assert both_ways[0, 0].tolist() == table("x x x x", ". x x x", ". x x x", ". x x x")
    assert both_ways[1, 0].tolist() == table("x x . .", "x x . .", "x x x .", "x x . x")
