"""What a forward costs here: seconds over tokens and rows, measured once and kept in a file."""

from __future__ import annotations

import bisect
import hashlib
import json
import logging
import math
import os
import platform
import statistics
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

TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
"""Of one row; beyond, a forward goes on as between the last two."""

ROWS = (8, 32)
"""Of one token each."""

DRAFTED = (6, 8, 12)
"""Of one row, half of them masks: what these cost more than as many that are only verified."""

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
POINT_RATE = 0.01
MOST_SURPRISE = 1.5
"""A forward so many times slower or faster than expected counts as no more than that."""


class Costs:
    """Seconds of a forward, refined by those that run.

    So many for its tokens, whoever feeds them, straight between those that were measured; and so
    many for each row beyond the first; and so many where anything is drafted in it, which turns the
    adapter on. Only what differs between settings matters to a planner. So
    two factors are learned beside the points: one of all forwards, for a machine that is slower for
    a while; and one of drafts, since what is done around a forward takes longer where they are made
    and checked, whatever their length.

    Args:
        seconds: Of one row over its tokens, at least 2 numbers of them.
        per_row: For each further row.
        drafting: For a forward that drafts.
    """

    def __init__(
        self, seconds: Mapping[int, float], per_row: float = 0.0, drafting: float = 0.0
    ) -> None:
        self.seconds = dict(sorted(seconds.items()))
        self.per_row = per_row
        self.drafting = drafting
        self._tokens = list(self.seconds)
        self._drift = 0.0  # logarithms
        self._drift_of_drafts = 0.0

    def seconds_of(self, num_rows: int, num_tokens: float, *, drafting: float = 0.0) -> float:
        """Of a forward of so many tokens in all, which may be an average, as may be whether it
        drafts."""
        around = math.exp(_share_of_drafts(num_rows, num_tokens) * self._drift_of_drafts)
        alone = self._alone(num_rows, num_tokens) + drafting * self.drafting
        return alone * around

    def note(
        self, num_rows: int, num_tokens: int, seconds: float, *, drafting: bool = False
    ) -> None:
        """Learn from a forward that ran, and all that was done around it."""
        expected_s = self.seconds_of(num_rows, num_tokens, drafting=drafting)
        surprise = math.log(max(seconds, 1e-9) / expected_s) - self._drift
        most = math.log(MOST_SURPRISE)
        surprise = min(max(surprise, -most), most)
        self._drift += DRIFT_RATE * surprise
        self._drift_of_drafts += DRIFT_RATE * _share_of_drafts(num_rows, num_tokens) * surprise
        nearest = min(self._tokens, key=lambda tokens: abs(tokens - num_tokens))
        self.seconds[nearest] *= math.exp(POINT_RATE * surprise)

    def _alone(self, num_rows: int, num_tokens: float) -> float:
        """Without what is done around it."""
        i = min(max(bisect.bisect_left(self._tokens, num_tokens), 1), len(self._tokens) - 1)
        low, high = self._tokens[i - 1 : i + 1]
        slope = (self.seconds[high] - self.seconds[low]) / (high - low)
        seconds = self.seconds[low] + slope * (num_tokens - low)
        return max(seconds + self.per_row * (num_rows - 1), 1e-9)


def _share_of_drafts(num_rows: int, num_tokens: float) -> float:
    """Of the rows of a forward, about how many feed more than one token."""
    return min(max(num_tokens / num_rows - 1, 0.0), 1.0)


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
            return _read(path, key)
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s is not usable (%s); measuring again", path, error)
    started_s = time.perf_counter()
    costs, is_calm = measure(model, adapter=adapter, limit_s=LIMIT_S)
    logger.info("measured the cost of forwards in %.1f s", time.perf_counter() - started_s)
    if not is_calm:
        logger.warning("the cost of forwards is not kept: other work disturbed the measurement")
        return costs
    try:
        _write(path, key, costs)
    except OSError as error:
        logger.warning("cannot keep what forwards cost: %s", error)
    return costs


def measure(
    model: TriModeModel, *, adapter: DrafterAdapter | None = None, limit_s: float
) -> tuple[Costs, bool]:
    """Run forwards of all sizes on K/V rows of their own; the shortest time of each.

    Larger ones are left out when a third of the time is gone. Every size has its turn in every
    pass, so that one slow moment spoils none; and what does more in less time bounds what does
    less: too low is mended as forwards run, while what looks too dear is never tried.

    Returns:
        What they cost, and whether the machine was calm: half of the sizes took nearly as long
        twice.
    """
    sequences, runner = _scratch(model, adapter)
    sizes = [(1, tokens, False) for tokens in TOKENS]
    sizes += [(1, tokens, True) for tokens in DRAFTED]
    sizes += [(rows, 1, False) for rows in ROWS if rows <= len(sequences)]
    sizes.sort(key=lambda size: size[0] * size[1])
    found: dict[tuple[int, int, bool], list[float]] = {}
    started_s = time.perf_counter()
    for number in range(NUM_PASSES):
        for size in sizes:
            elapsed_s = time.perf_counter() - started_s
            if number == 0:
                if elapsed_s > limit_s / 3 and size[0] * size[1] > FEWEST_TOKENS:
                    continue
                runner.run(_feeds(sequences, *size))  # to warm up
            elif elapsed_s > limit_s or size not in found:
                continue
            for _ in range(3):
                feeds = _feeds(sequences, *size)
                before_s = time.perf_counter()
                runner.run(feeds)  # its answers come to the host, so a GPU is done as well
                found.setdefault(size, []).append(time.perf_counter() - before_s)
                if found[size][-1] > SHORT_S:
                    break
    twice = [sorted(seconds)[:2] for seconds in found.values() if len(seconds) > 1]
    num_calm = sum(second < CALM * first for first, second in twice)
    least = {size: min(seconds) for size, seconds in found.items()}
    lengths = [tokens for rows, tokens, drafts in least if rows == 1 and not drafts]
    costs = Costs({n: min(least[1, more, False] for more in lengths if more >= n) for n in lengths})
    drafted = [tokens for _, tokens, drafts in least if drafts]
    more_s = [least[1, tokens, True] - costs.seconds_of(1, tokens) for tokens in drafted]
    costs.drafting = max(statistics.median(more_s), 0.0)
    for rows in (rows for rows, _, _ in least if rows > 1):
        each_s = least[rows, 1, False] - costs.seconds_of(1, rows)
        costs.per_row = max(each_s / (rows - 1), 0.0)
    return costs, 2 * num_calm > len(found)


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


def _feeds(
    sequences: list[Sequence], num_rows: int, num_tokens: int, has_drafts: bool
) -> list[Feed]:
    some = enumerate(sequences[:num_rows])
    return [Feed(seq, row, _step(seq, num_tokens, has_drafts)) for row, seq in some]


def _step(seq: Sequence, num_tokens: int, has_drafts: bool) -> Step:
    """All of it verified, or half of it verified and half of it drafted, as branching does."""
    first = (num_tokens + 1) // 2 if has_drafts else num_tokens
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
        "measured": [TOKENS, DRAFTED, ROWS, NUM_COMMITTED],
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


def _read(path: Path, key: Mapping[str, Any]) -> Costs:
    """What a file says.

    Raises:
        OSError, ValueError, KeyError, TypeError: it is damaged, or not about this.
    """
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["key"] != json.loads(json.dumps(key)):
        raise ValueError("it is about another model or machine")
    found = {int(tokens): float(s) for tokens, s in record["seconds"]}
    per_row, drafting = float(record["per_row"]), float(record["drafting"])
    if not set(TOKENS) >= set(found) >= {n for n in TOKENS if n <= FEWEST_TOKENS}:
        raise ValueError("sizes are missing")
    more = (per_row, drafting)
    if not (all(0 < s < math.inf for s in found.values()) and all(0 <= s < math.inf for s in more)):
        raise ValueError("a time is not a positive number")
    return Costs(found, per_row, drafting)


def _write(path: Path, key: Mapping[str, Any], costs: Costs) -> None:
    """All of it or nothing, whoever else writes it."""
    record: dict[str, Any] = {"key": key, "seconds": list(costs.seconds.items())}
    record |= {"per_row": costs.per_row, "drafting": costs.drafting}
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(record, file)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
