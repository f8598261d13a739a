"""Attention over ragged K/V rows against a slow twin that sees one head of one token at a time."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import reference
from trimode.model import KVCache, RowAttention, TriModeConfig, TriModeModel
from trimode.model.attention import RowFeed
from trimode.model.masks import TRUNK

NUM_CELLS = 24


def causal(row: int, length: int, num_tokens: int) -> RowFeed:
    """Tokens in the AR view."""
    positions = range(length, length + num_tokens)
    return RowFeed(row, length, [TRUNK] * num_tokens, positions, positions)


def block(row: int, length: int, num_tokens: int) -> RowFeed:
    """Tokens in the diffusion view."""
    positions = range(length, length + num_tokens)
    return RowFeed(row, length, [1] * num_tokens, positions, [length - 1] * num_tokens)


def branches(row: int, length: int) -> RowFeed:
    """Two drafted tokens, and after each of them what might follow."""
    groups = [TRUNK, TRUNK, 1, 1, 2, 2]
    positions = [length + p for p in (0, 1, 1, 2, 2, 3)]
    return RowFeed(row, length, groups, positions, [length + a for a in (0, 1, 0, 0, 1, 1)])


def filled(config: TriModeConfig, num_rows: int) -> KVCache:
    """A cache in which every cell holds something: committed K/V, or what rejection left behind."""
    cache = KVCache(
        config, num_rows=num_rows, num_cells=NUM_CELLS, device="cpu", dtype=torch.float64
    )
    generator = torch.Generator().manual_seed(0)
    cache.keys.normal_(generator=generator)
    cache.values.normal_(generator=generator)
    return cache


def check(config: TriModeConfig, feeds: list[RowFeed], *, num_rows: int) -> None:
    """One layer's attention equals the twin's, and nothing but the fed cells changes."""
    cache = filled(config, num_rows)
    old_keys, old_values = cache.keys.clone(), cache.values.clone()
    num_tokens = sum(len(feed.groups) for feed in feeds)
    generator = torch.Generator().manual_seed(1)

    def draw(num_heads: int) -> Tensor:
        return torch.randn(num_tokens, num_heads, 32, generator=generator, dtype=torch.float64)

    query, key, value = draw(4), draw(2), draw(2)
    got = RowAttention(cache, feeds)(1, query, key, value)
    assert got.shape == (num_tokens, 4, 32)
    start = 0
    for feed in feeds:
        stop, length = start + len(feed.groups), feed.length
        prefix_key = old_keys[1, feed.row, :, :length].transpose(0, 1)
        prefix_value = old_values[1, feed.row, :, :length].transpose(0, 1)
        fed = reference.fed_mask(feed.groups, feed.positions, feed.anchors)
        expected = reference.attention(
            query[start:stop],
            torch.cat((prefix_key, key[start:stop])),
            torch.cat((prefix_value, value[start:stop])),
            torch.tensor(reference.cell_mask(fed, length, length + len(fed))),
        )
        torch.testing.assert_close(got[start:stop], expected, rtol=0, atol=1e-12)
        fed_cells = slice(length, length + len(fed))
        assert cache.keys[1, feed.row, :, fed_cells].equal(key[start:stop].transpose(0, 1))
        assert cache.values[1, feed.row, :, fed_cells].equal(value[start:stop].transpose(0, 1))
        old_keys[1, feed.row, :, fed_cells] = key[start:stop].transpose(0, 1)
        old_values[1, feed.row, :, fed_cells] = value[start:stop].transpose(0, 1)
        start = stop
    assert cache.keys.equal(old_keys)
    assert cache.values.equal(old_values)


@pytest.mark.parametrize(
    "feeds",
    [
        pytest.param([causal(0, 0, 5)], id="prefill"),
        pytest.param([causal(0, 0, 1)], id="prefill-of-one"),
        pytest.param([causal(0, 7, 1)], id="decode"),
        pytest.param([causal(0, 7, 4)], id="verify"),
        pytest.param([causal(0, NUM_CELLS - 4, 4)], id="verify-in-the-last-cells"),
        pytest.param([block(0, 7, 4)], id="denoise"),
        pytest.param([block(0, 0, 4)], id="denoise-without-prefix"),
        pytest.param([branches(0, 7)], id="branches"),
        pytest.param([causal(0, 0, 5), causal(1, 0, 5)], id="even-prefills"),
        pytest.param([causal(0, 6, 1), causal(1, 6, 1)], id="even-decodes"),
        pytest.param([causal(0, 2, 1), causal(1, 9, 1)], id="ragged-decodes"),
        pytest.param([block(1, 6, 3), block(2, 6, 3)], id="even-denoise-of-later-rows"),
        pytest.param([block(2, 6, 3), block(0, 6, 3)], id="even-denoise-out-of-order"),
        pytest.param([block(0, 4, 3), block(1, 9, 3)], id="ragged-denoise"),
        pytest.param([causal(0, 6, 4), causal(1, 6, 4)], id="even-verify"),
        pytest.param([causal(0, 6, 4), block(1, 6, 4)], id="verify-beside-denoise"),
        pytest.param([causal(0, 0, 4), block(1, 0, 4)], id="prefill-beside-denoise"),
        pytest.param([causal(0, 0, 4), causal(1, 3, 4)], id="prefill-beside-verify"),
        pytest.param([branches(0, 3), causal(2, 0, 6), block(1, 5, 6)], id="three-patterns"),
        pytest.param(
            [causal(3, 8, 1), causal(1, 2, 1), block(0, 5, 4), branches(2, 6), causal(4, 0, 7)],
            id="every-mode-at-once",
        ),
    ],
)
def test_equals_dense_attention(
    tiny_config: Callable[..., TriModeConfig], feeds: list[RowFeed]
) -> None:
    """Any shortcut (one call per width, no mask, plain causal) taken where it does not hold."""
    check(tiny_config(), feeds, num_rows=5)


@pytest.mark.parametrize("seed", range(25))
def test_random_mixtures_equal_dense_attention(
    tiny_config: Callable[..., TriModeConfig], seed: int
) -> None:
    """A mixture of rows, lengths and patterns that nobody thought of."""
    draw = random.Random(seed)
    rows = draw.sample(range(5), draw.randint(1, 5))
    feeds = []
    for row in rows:
        num_tokens, length = draw.choice([1, 3, 3, 6]), draw.choice([0, 0, 7, draw.randint(0, 15)])
        kind = draw.choice([causal, block])
        is_branching = num_tokens == 6 and draw.random() < 0.5
        feeds.append(branches(row, length) if is_branching else kind(row, length, num_tokens))
    check(tiny_config(), sorted(feeds, key=lambda feed: len(feed.groups)), num_rows=5)


def test_unsorted_feeds_are_our_own_mistake(tiny_config: Callable[..., TriModeConfig]) -> None:
    """Feeds of different widths packed in an order in which answers would be mixed up."""
    feeds = [causal(0, 0, 2), causal(1, 0, 3), causal(2, 0, 2)]
    query, key = torch.randn(7, 4, 32), torch.randn(7, 2, 32)
    with pytest.raises(AssertionError, match="sorted"):
        RowAttention(filled(tiny_config(), 3), feeds)(0, query, key, key)


def test_stale_cells_are_never_seen(tiny_config: Callable[..., TriModeConfig]) -> None:
    """K/V of a rejected draft, or a neighbour's NaN, leaking into what comes after it."""
    config = tiny_config()
    feeds = [causal(0, 3, 2), causal(1, 6, 2)]
    query, key, value = torch.randn(3, 4, 4, 32, dtype=torch.float64)
    outputs = []
    for rest in (0.0, 1e3):
        cache = filled(config, 3)
        cache.keys[:, 0, :, 5:] = rest
        cache.values[:, 0, :, 5:] = rest
        cache.keys[:, 2] = torch.nan
        outputs.append(RowAttention(cache, feeds)(0, query, key[:, :2], value[:, :2]))
    assert outputs[0].equal(outputs[1])


def test_rows_equal_whole_sequences(tiny_model: Callable[..., TriModeModel]) -> None:
    """Prefill, decode, rejected verify and denoise over cells differing from one dense forward.

    Two sequences of unlike length go through the same network in pieces; their causal logits must
    be those of the whole text, however it was cut and whatever was fed and not committed.
    """
    model = tiny_model()
    texts = [torch.arange(3, 17), torch.arange(60, 69)]
    cache = KVCache(model.config, num_rows=2, num_cells=40, device="cpu", dtype=torch.float64)
    lengths, collected = [0, 0], [[], []]  # type: ignore[var-annotated]

    def feed(parts: list[tuple[int, Tensor, Any]], *, is_kept: bool) -> None:
        """Feed (row, ids, pattern) together; keep their K/V and logits, or not."""
        parts = sorted(parts, key=lambda part: len(part[1]))
        feeds = [pattern(row, lengths[row], len(ids)) for row, ids, pattern in parts]
        ids = torch.cat([ids for _, ids, _ in parts])
        positions = torch.tensor([p for f in feeds for p in f.positions])
        hidden = model.encode(ids, positions, attend=RowAttention(cache, feeds))
        pieces = model.diffusion_head(hidden).split([len(ids) for _, ids, _ in parts])
        for (row, ids, _), logits in zip(parts, pieces, strict=True):
            if is_kept:
                collected[row].append(logits)
                lengths[row] += len(ids)

    junk = torch.tensor([250, 251, 252, 253, 254])
    feed([(0, texts[0][:6], causal), (1, texts[1][:2], causal)], is_kept=True)
    feed([(0, junk[:3], causal), (1, junk, block)], is_kept=False)
    feed([(0, texts[0][6:7], causal), (1, texts[1][2:7], causal)], is_kept=True)
    feed([(1, junk, block)], is_kept=False)
    feed([(0, texts[0][7:], causal)], is_kept=True)
    feed([(1, texts[1][7:], causal)], is_kept=True)
    for text, logits in zip(texts, collected, strict=True):
        whole = model(text[None]).logits[0]
        torch.testing.assert_close(torch.cat(logits), whole, rtol=0, atol=1e-10)
