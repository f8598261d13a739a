"""Who goes next: shares of a forward, and fairness between clients."""

from __future__ import annotations

import random
from typing import Any

import pytest

from trimode.decoding import GenerationParams, Sequence
from trimode.engine.scheduler import Demand, Waiting, WaitingList, share


def made() -> Sequence:
    params = GenerationParams(mode="ar", max_new_tokens=4, block_length=4, seed=0)
    return Sequence([1, 2], params, mask_token_id=9)


def waiting(*clients: str) -> tuple[WaitingList, list[Sequence]]:
    found, sequences = WaitingList(), []
    for number, client in enumerate(clients):
        sequences.append(made())
        found.add(Waiting(sequences[-1], client, float(number), None))
    return found, sequences


def decode(num_tokens: int, fed_at: int = 0) -> Demand:
    return Demand(num_tokens, False, fed_at)


def prompt(num_tokens: int, fed_at: int = 0) -> Demand:
    return Demand(num_tokens, True, fed_at)


@pytest.mark.parametrize(
    ("demands", "budget", "expected"),
    [
        pytest.param([prompt(900), decode(8)], None, [900, 8], id="no limit"),
        pytest.param([prompt(900), decode(8)], 100, [92, 8], id="the prompt has what is left"),
        pytest.param([prompt(10), decode(8)], 100, [10, 8], id="all fits"),
        pytest.param([decode(60, 2), decode(60, 1)], 100, [0, 60], id="longest without goes first"),
        pytest.param([decode(60, 1), decode(60, 2), decode(9, 3)], 100, [60, 0, 0], id="in order"),
        pytest.param([decode(500), decode(1, 1)], 100, [500, 0], id="the first goes in any case"),
        pytest.param([decode(90), prompt(50)], 100, [90, 25], id="a quarter is for prompts"),
        pytest.param([decode(90), prompt(50)], 200, [90, 50], id="no more than it needs"),
        pytest.param([prompt(500), prompt(20), prompt(500)], 120, [50, 20, 50], id="short whole"),
    ],
)
def test_shares(demands: list[Demand], budget: int | None, expected: list[int]) -> None:
    """Prevents: a long prompt that holds up everybody, or that is never fed."""
    assert share(demands, budget) == expected


def test_nothing_waits_for_good() -> None:
    """Prevents: a large step overtaken by small ones for ever; a prompt that gets no token."""
    chance = random.Random(0)
    for _ in range(200):
        budget = chance.randrange(32, 128)
        sizes = [chance.randrange(1, 200) for _ in range(8)]
        kinds = [chance.random() < 0.4 for _ in sizes]
        fed_at = [0] * len(sizes)
        for number in range(1, 40):
            demands = [Demand(*one) for one in zip(sizes, kinds, fed_at, strict=True)]
            granted = share(demands, budget)
            for i, num_tokens in enumerate(granted):
                assert 0 <= num_tokens <= sizes[i]
                assert kinds[i] or num_tokens in (0, sizes[i])
                if num_tokens:
                    fed_at[i] = number
            over = [g for g, is_prefill in zip(granted, kinds, strict=True) if not is_prefill and g]
            assert sum(granted) <= budget + max([0, *over])
            assert min(fed_at) > number - 2 * len(sizes)


def test_clients_share_the_rows() -> None:
    """Prevents: a client with many requests keeping all others out."""
    found, sequences = waiting("a", "a", "a", "b", "c")
    taken: list[str] = []
    order = []
    while len(found):
        entry = found.next(taken)
        found.remove(entry.seq)
        taken.append(entry.client)
        order.append(sequences.index(entry.seq))
    assert order == [0, 3, 4, 1, 2]


@pytest.mark.parametrize(
    ("clients", "mine", "running", "expected"),
    [
        (["a"], "a", [], True),  # another of its own: it goes to the end
        (["b"], "a", [], True),
        (["b"], "a", ["b"], False),  # it would get its row back at once
        (["b"], "a", ["b", "a"], True),
        ([], "a", [], False),
    ],
)
def test_a_row_goes_to_one_that_waits(
    clients: list[str], mine: str, running: list[str], expected: bool
) -> None:
    """Prevents: a sequence that gives its row away only to take it again."""
    found, _ = waiting(*clients)
    assert found.has_one_for(mine, running) is expected


def test_the_waiting_list_forgets() -> None:
    """Prevents: an aborted request that is started later."""
    found, (first, second) = waiting("a", "a")
    removed: Any = found.remove(first)
    assert removed.seq is first
    assert found.remove(first) is None
    assert found.next([]).seq is second
