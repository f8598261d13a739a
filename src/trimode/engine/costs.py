"""What a forward costs here: seconds over (rows, tokens), measured once and kept in a file."""

from __future__ import annotations

import bisect
import hashlib
import json
import logging
import math
import os
import platform
import tempfile
import time
from collections.abc import Mapping
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any

import torch

from trimode.decoding import GenerationParams, Sequence
from trimode.decoding.step import Group, Step, causal_step, group_step
from trimode.engine.runner import Feed, Runner
from trimode.errors import CapacityError
from trimode.model import DrafterAdapter, TriModeModel
from trimode.model.adapter import PUBLISHED_FORM
from trimode.model.native import library
from trimode.user_cache import cache_folder

logger = logging.getLogger(__name__)

ROWS = (1, 2, 4, 8, 16, 32)
TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
"""Of each row. Forwards of more than `MOST_TOKENS` are not measured."""

MOST_TOKENS = 256
FEWEST_TOKENS = 8
"""Forwards up to so many tokens are measured however long it takes."""

LIMIT_S = 3.0
NUM_PASSES = 5
SHORT_S = 0.01
"""A forward that takes no longer is run three times in a pass."""

CALM = 1.2
"""Two times of the same forward differ by less than this, if nothing else runs."""

NUM_COMMITTED = 96
"""Cells that a row of a measured forward looks back at."""

DRIFT_RATE = 0.03
POINT_RATE = 0.03
MOST_SURPRISE = 1.5
"""A forward so many times slower or faster than expected counts as no more than that."""

Point = tuple[int, int]


class Curve:
    """Seconds of a forward of some number of rows over its tokens, straight between points."""

    def __init__(self, num_tokens: list[float], seconds: list[float]) -> None:
        self._num_tokens = num_tokens
        self._seconds = seconds

    def __call__(self, num_tokens: float) -> float:
        tokens, seconds = self._num_tokens, self._seconds
        i = min(max(bisect.bisect_left(tokens, num_tokens), 1), len(tokens) - 1)
        share = (num_tokens - tokens[i - 1]) / (tokens[i] - tokens[i - 1])
        return max(seconds[i - 1] + share * (seconds[i] - seconds[i - 1]), 1e-9)


class Costs:
    """Seconds of a forward, refined by those that run.

    Only what differs between points matters to a planner. So a machine that is slower for a while
    moves common factors as well, and the points themselves by what these leave. There are two:
    what is done around a forward takes longer where drafts are made and checked, whatever their
    length, so forwards of more tokens than rows have one of their own.

    Args:
        seconds: For (rows, tokens of each row), at least 2 numbers of each, in all pairs.
    """

    def __init__(self, seconds: Mapping[Point, float]) -> None:
        self.seconds = dict(seconds)
        self._rows = sorted({rows for rows, _ in seconds})
        self._tokens = sorted({tokens for _, tokens in seconds})
        self._drift = {False: 0.0, True: 0.0}  # of forwards of a token a row, of others
        self._curves: dict[int, Curve] = {}
        self._nearest: dict[Point, Point] = {}

    def seconds_of(self, num_rows: int, num_tokens: float) -> float:
        """Of a forward of so many tokens in all, which may be an average."""
        share = min(max(num_tokens / num_rows - 1, 0.0), 1.0)
        more = math.exp(self._drift[True] - self._drift[False])
        return self.curve(num_rows)(num_tokens) * (1 + share * (more - 1))

    def curve(self, num_rows: int) -> Curve:
        """For so many rows, without what is done around a forward."""
        known = self._curves.get(num_rows)
        if known is not None:
            return known
        rows = self._rows
        i = min(max(bisect.bisect_left(rows, num_rows), 1), len(rows) - 1)
        share = (num_rows - rows[i - 1]) / (rows[i] - rows[i - 1])
        seconds: list[float] = []
        for t in self._tokens:
            low, high = self.seconds[rows[i - 1], t], self.seconds[rows[i], t]
            seconds.append(max(low + share * (high - low), 1e-9))
        made = Curve([float(num_rows * t) for t in self._tokens], seconds)
        self._curves[num_rows] = made
        return made

    def note(self, num_rows: int, num_tokens: int, seconds: float) -> None:
        """Learn from a forward that ran."""
        has_drafts = num_tokens > num_rows
        expected_s = self.curve(num_rows)(num_tokens)
        surprise = math.log(max(seconds, 1e-9) / expected_s) - self._drift[has_drafts]
        most = math.log(MOST_SURPRISE)
        surprise = min(max(surprise, -most), most)
        self._drift[has_drafts] += DRIFT_RATE * surprise
        self.seconds[self._point(num_rows, num_tokens)] *= math.exp(POINT_RATE * surprise)
        self._curves.clear()

    def _point(self, num_rows: int, num_tokens: int) -> Point:
        """The nearest that is kept."""
        known = self._nearest.get((num_rows, num_tokens))
        if known is None:
            known = self._nearest[num_rows, num_tokens] = (
                min(self._rows, key=lambda rows: abs(math.log(rows / num_rows))),
                min(self._tokens, key=lambda tokens: abs(math.log(tokens * num_rows / num_tokens))),
            )
        return known


def find_costs(
    model: TriModeModel, *, adapter: DrafterAdapter | None = None, folder: Path | None = None
) -> Costs:
    """Those of this network on this machine, from the file of an earlier run if there is one.

    Args:
        model: The network, as it is to run.
        adapter: Its drafter adapter.
        folder: Of the file; None means `$XDG_CACHE_HOME/trimode`, by default `~/.cache/trimode`.
    """
    key = _key(model, adapter)
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = (cache_folder() if folder is None else folder) / f"costs_{name}.json"
    if path.exists():
        try:
            return Costs(_read(path, key))
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s is not usable (%s); measuring again", path, error)
    started_s = time.perf_counter()
    seconds, is_calm = measure(model, adapter=adapter, limit_s=LIMIT_S)
    costs = Costs(seconds)
    logger.info("measured the cost of forwards in %.1f s", time.perf_counter() - started_s)
    if not is_calm:
        logger.warning("the cost of forwards is not kept: other work disturbed the measurement")
        return costs
    try:
        _write(path, key, costs.seconds)
    except OSError as error:
        logger.warning("cannot keep what forwards cost: %s", error)
    return costs


def measure(
    model: TriModeModel, *, adapter: DrafterAdapter | None = None, limit_s: float
) -> tuple[dict[Point, float], bool]:
    """Run forwards of all sizes on K/V rows of their own; the shortest time of each.

    Larger ones are left out when a third of the time is gone, and taken to go on as the measured
    ones do. Every size has its turn in every pass, so that one slow moment spoils none; and what
    does more in less time bounds what does less: too low is mended as forwards run, while what
    looks too dear is never tried.

    Returns:
        Seconds for all pairs of `ROWS` and `TOKENS`, and whether the machine was calm: half of the
        sizes took nearly as long twice.
    """
    sequences, runner = _scratch(model, adapter)
    sizes = [(rows, tokens) for rows in ROWS for tokens in TOKENS if rows <= len(sequences)]
    sizes = sorted((s for s in sizes if s[0] * s[1] <= MOST_TOKENS), key=lambda s: s[0] * s[1])
    found: dict[Point, list[float]] = {}
    started_s = time.perf_counter()
    for number in range(NUM_PASSES):
        for size in sizes:
            elapsed_s = time.perf_counter() - started_s
            if number == 0:
                if elapsed_s > limit_s / 3 and size[0] * size[1] > FEWEST_TOKENS:
                    continue
                runner.run(_feeds(sequences, size))  # to warm up
            elif elapsed_s > limit_s or size not in found:
                continue
            for _ in range(3):
                feeds = _feeds(sequences, size)
                before_s = time.perf_counter()
                runner.run(feeds)  # its answers come to the host, so a GPU is done as well
                found.setdefault(size, []).append(time.perf_counter() - before_s)
                if found[size][-1] > SHORT_S:
                    break
    twice = [sorted(seconds)[:2] for seconds in found.values() if len(seconds) > 1]
    num_calm = sum(second < CALM * first for first, second in twice)
    shortest = {
        size: min(min(seconds) for other, seconds in found.items() if _is_within(size, other))
        for size in found
    }
    return _completed(shortest), 2 * num_calm > len(found)


def _is_within(size: Point, other: Point) -> bool:
    """Whether the other does all that this one does."""
    return size[0] <= other[0] and size[1] <= other[1]


def _scratch(model: TriModeModel, adapter: DrafterAdapter | None) -> tuple[list[Sequence], Runner]:
    """As many sequences as fit, each with a text behind it, and a runner with rows for them."""
    num_rows, num_cells = ROWS[-1], NUM_COMMITTED + TOKENS[-1]
    while True:
        try:
            cache = model.new_cache(num_rows=num_rows, num_cells=num_cells)
            break
        except CapacityError:
            if num_rows == 1:
                raise
            num_rows //= 2
    params = GenerationParams(mode="linear", max_new_tokens=1, block_length=TOKENS[-1], seed=0)
    sequences = []
    for row in range(num_rows):
        form = PUBLISHED_FORM if adapter is None else adapter.form
        seq = Sequence([0], params, mask_token_id=model.config.mask_token_id, form=form)
        seq.length = NUM_COMMITTED - row % 16  # no two lengths alike, as in earnest
        sequences.append(seq)
    return sequences, Runner(model, cache, adapter=adapter)


def _feeds(sequences: list[Sequence], size: Point) -> list[Feed]:
    num_rows, num_tokens = size
    return [Feed(seq, row, _step(seq, num_tokens)) for row, seq in enumerate(sequences[:num_rows])]


def _step(seq: Sequence, num_tokens: int) -> Step:
    """Half of it verified, half of it drafted: between what linear and branching feed."""
    first = (num_tokens + 1) // 2
    trunk = causal_step("verify", [0] * first, start=seq.length, wanted=range(first))
    if first == num_tokens:
        return trunk
    num_masks = num_tokens - first
    group = Group(
        [seq.mask_token_id] * num_masks,
        [True] * num_masks,
        *(seq.length + first, seq.length + first - 1),
        range(num_masks),
    )
    return group_step("verify", [group], form=seq.form, trunk=trunk, wants_runner_up=True)


def _completed(found: dict[Point, float]) -> dict[Point, float]:
    """With the pairs that were not measured, at so much for each further token as the smallest and
    the largest forward tell."""
    sizes = sorted(found, key=lambda size: size[0] * size[1])
    small, large = sizes[0], sizes[-1]
    grown = large[0] * large[1] - small[0] * small[1]
    per_token = max(found[large] - found[small], 0.0) / max(grown, 1)

    def seconds(size: Point) -> float:
        if size in found:
            return found[size]
        smaller = [one for one in sizes if _is_within(one, size)]
        nearest = max(smaller, key=lambda one: one[0] * one[1])
        num_more = size[0] * size[1] - nearest[0] * nearest[1]
        return found[nearest] + per_token * num_more

    return {(rows, tokens): seconds((rows, tokens)) for rows in ROWS for tokens in TOKENS}


def _key(model: TriModeModel, adapter: DrafterAdapter | None) -> dict[str, Any]:
    """All that a cost depends on."""
    config = model.config
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
        " num_key_value_heads head_dim"
    ).split()
    device = model.device
    is_cuda = device.type == "cuda"
    return {
        **{name: getattr(config, name) for name in names},
        "dtype": str(model.dtype),
        "weights": model.weights,
        "adapter": None if adapter is None else _shape(adapter),
        "ranks": model.num_ranks,
        "device": torch.cuda.get_device_name(device) if is_cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
        "native": library.signature() if device.type == "cpu" else None,
        "torch": torch.__version__,
        "measured": [ROWS, TOKENS, NUM_COMMITTED],
    }


def _shape(adapter: DrafterAdapter) -> Items[Any]:
    """What an adapter adds to the cost of a forward depends on this; nothing where it is off."""
    if "draft" not in adapter.form.views:
        return []
    sizes = sorted({(target, len(pair.down)) for _, target, pair in adapter.items()})
    corrector = adapter.corrector
    walked = [] if corrector is None else [len(corrector.before), corrector.num_candidates]
    return [sizes, adapter.form.adapts_clean, adapter.mask_embeddings is not None, walked]


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _read(path: Path, key: Mapping[str, Any]) -> dict[Point, float]:
    """What a file says.

    Raises:
        OSError, ValueError, KeyError, TypeError: it is damaged, or not about this.
    """
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["key"] != json.loads(json.dumps(key)):
        raise ValueError("it is about another model or machine")
    found = {(int(rows), int(tokens)): float(s) for rows, tokens, s in record["seconds"]}
    if sorted(found) != [(rows, tokens) for rows in ROWS for tokens in TOKENS]:
        raise ValueError("sizes are missing")
    if not all(0 < seconds < math.inf for seconds in found.values()):
        raise ValueError("a time is not a positive number")
    return found


def _write(path: Path, key: Mapping[str, Any], seconds: Mapping[Point, float]) -> None:
    """All of it or nothing, whoever else writes it."""
    points: Items[Items[float]] = [[rows, tokens, s] for (rows, tokens), s in seconds.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump({"key": key, "seconds": points}, file)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
