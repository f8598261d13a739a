"""The same bits in every mode: tokens and logits of speculation against those of `ar` alone.

    python benchmarks/same_bits.py --model pocket --output benchmarks/results/same_bits_202611

Each prompt is continued by `ar` alone, then in four cells drawn at random: a mode with a shape, a
law, and what is done to it meanwhile (alone, 8 or 32 at once with staggered arrivals, rows taken
away, prompts fed in pieces, prefixes reused, one thread or two). The tokens must be equal, and so
must the digest of every row of logits that the AR view gives on the way along the emitted text. No
exceptions. Writes OUTPUT.json with the number of comparisons, and the accepted lengths that were
reached in each cell. Ends with 1 where anything differs.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_decode import environment
from torch import Tensor

import trimode
from trimode.decoding import GenerationParams, Sequence
from trimode.decoding.choice import Choice
from trimode.decoding.setting import Setting
from trimode.engine import Engine
from trimode.engine.engine import cells_needed
from trimode.engine.planner import settings
from trimode.engine.runner import Feed, Runner
from trimode.model.masks import TRUNK
from trimode.model.native.library import load

MODES: dict[str, dict[str, Any]] = {
    "linear": {"mode": "linear", "block_length": 8},
    "branching 6, 4": {"mode": "branching", "block_length": 6, "branches": 4},
    "branching 4, 7": {"mode": "branching", "block_length": 4, "branches": 7},
    "branching 8, 2, no guesses": {
        **{"mode": "branching", "block_length": 8, "branches": 2},
        "guesses": False,
    },
    "quadratic": {"mode": "quadratic", "block_length": 5},
    "auto": {"mode": "auto", "block_length": 8},
}
LAWS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "0.7, top_p 0.9": {"temperature": 0.7, "top_p": 0.9},
    "1.0": {"temperature": 1.0},
    "0.9, top_k 20": {"temperature": 0.9, "top_k": 20},
}
CONDITIONS = ("alone", "8 at once", "32 at once", "preempted", "chunked", "prefix reused")
THREADS = (1, 2)
CELLS_A_PROMPT = 4


class Wandering:
    """Stands for the planner of `auto`: another of its settings every round, never `ar`."""

    def choose(self, seq: Sequence) -> Setting:
        """The next one."""
        widest = seq.params.setting("auto", seq.form)
        found = list(settings(widest.block_length, widest.num_masks))
        return found[5 * seq.num_rounds % len(found)]

    def note_forward(self, *_: Any) -> None:
        """Nothing is learned."""

    def note_seconds(self, _: float) -> None:
        """Nothing is learned."""


@dataclass
class Digests:
    """Of logits of the AR view, by sequence, text before them, and length of that text."""

    rows: dict[Sequence, dict[int, dict[bytes, bytes]]] = field(default_factory=dict)
    num_changed: int = 0

    def note(self, packed: list[Feed], logits: Tensor) -> None:
        """The wanted logits of one forward, before the choice."""
        rows, at = logits.numpy(), 0
        for feed in packed:
            seq, step = feed.seq, feed.step
            text = [*seq.prompt_ids, *seq.new_ids][: seq.length]
            trunk = [t for t, group in enumerate(step.groups) if group == TRUNK]
            for i in step.wanted:
                if step.groups[i] == TRUNK:
                    before = text + [step.token_ids[t] for t in trunk if t <= i]
                    known = self.rows.setdefault(seq, {}).setdefault(len(before), {})
                    digest = blake2b(rows[at].tobytes()).digest()
                    first = known.setdefault(_text_digest(before), digest)
                    self.num_changed += first != digest  # answered again, and not the same
                at += 1

    def along(self, seq: Sequence) -> dict[int, bytes]:
        """Those behind each emitted token of the text that there is now."""
        ids = [*seq.prompt_ids, *seq.new_ids]
        found = {}
        for length, by_text in self.rows.get(seq, {}).items():
            digest = by_text.get(_text_digest(ids[:length]))
            if digest is not None and len(seq.prompt_ids) <= length < len(ids):
                found[length] = digest
        return found


def _text_digest(ids: list[int]) -> bytes:
    return blake2b(np.array(ids, dtype=np.int32).tobytes()).digest()


class WatchedRunner(Runner):
    """A runner whose logits are noted."""

    digests: Digests

    def _choose(self, packed: list[Feed], states: Tensor, logits: Tensor) -> Choice:
        self.digests.note(packed, logits)
        return super()._choose(packed, states, logits)


def decode(
    lm: trimode.TriModeLM,
    requests: list[tuple[list[int], GenerationParams]],
    *,
    condition: str,
    threads: int,
    digests: Digests,
) -> list[Sequence]:
    """Continue all of them in one engine, as the condition says."""
    use_threads(threads)
    sequences = [lm.sequence(ids, params) for ids, params in requests]
    most = {"8 at once": 8, "32 at once": 32, "preempted": 3, "chunked": 8, "prefix reused": 4}
    num_rows = most.get(condition, 1)
    engine = Engine(
        lm.model,
        num_rows=num_rows,
        num_cells=max(map(cells_needed, sequences)) + 64,
        adapter=lm.adapter,
        planner=Wandering(),  # type: ignore[arg-type]
        time_slice=5 if condition == "preempted" else None,
        token_budget=4 * num_rows if condition == "chunked" else None,
    )
    runner = engine._runner
    runner.__class__ = WatchedRunner
    assert isinstance(runner, WatchedRunner)
    runner.digests = digests
    waiting = iter(sequences)
    num_steps = 0
    while True:
        if condition == "alone":
            arriving = [next(waiting, None)] if engine.is_idle else []
        else:  # some at first, then one every other step
            count = (num_rows + 1) // 2 if num_steps == 0 else 1 - num_steps % 2
            arriving = [next(waiting, None) for _ in range(count)]
        for seq in arriving:
            if seq is not None:
                engine.submit(seq)
        num_steps += 1
        if engine.is_idle and arriving and arriving[-1] is None:
            return sequences
        engine.step()


def use_threads(count: int) -> None:
    """As `--threads`."""
    native = load()
    assert native is not None, "there is no native step here"
    native.c.trimode_threads_resize(native.threads, count)
    torch.set_num_threads(count)


def prompts_of(lm: trimode.TriModeLM, count: int, num_tokens: int, seed: int) -> list[list[int]]:
    """Windows of this package's own sources, anywhere in them.

    Every eighth repeats its beginning, so that long drafts are accepted too.
    """
    rng = random.Random(seed)
    paths = sorted(Path(trimode.__file__).parent.rglob("*.py"))
    texts = [lm.encode(path.read_text("utf-8")) for path in paths]
    texts = [ids for ids in texts if len(ids) > 2 * num_tokens]
    found: list[list[int]] = []
    while len(found) < count:
        ids = rng.choice(texts)
        start = rng.randrange(len(ids) - num_tokens)
        window = ids[start : start + num_tokens]
        if len(found) % 8 == 7:
            window = (window[:6] * num_tokens)[:num_tokens]
        found.append(window)
    return found


def batches(cells: dict[Any, list[Any]], size: int = 32) -> Iterator[tuple[Any, list[Any]]]:
    """Of each cell, some at a time."""
    for cell, members in cells.items():
        for start in range(0, len(members), size):
            yield cell, members[start : start + size]


def twice(items: list[Any]) -> list[Any]:
    """Each four of them, again."""
    return [one for i in range(0, len(items), 4) for one in items[i : i + 4] * 2]


def compare(
    lm: trimode.TriModeLM, prompts: list[list[int]], *, new_tokens: int, seed: int
) -> dict[str, Any]:
    """All prompts in their cells."""
    rng = random.Random(seed)
    cells: dict[tuple[str, int], list[tuple[int, str, str]]] = {}
    for index in range(len(prompts)):
        for _ in range(CELLS_A_PROMPT):
            mode, law = rng.choice(list(MODES)), rng.choice(list(LAWS))
            cell = rng.choice(CONDITIONS), rng.choice(THREADS)
            cells.setdefault(cell, []).append((index, mode, law))
    expected: dict[tuple[int, str], tuple[list[int], dict[int, bytes]]] = {}
    lengths: dict[str, Counter[int]] = {}
    found = {"texts": 0, "unequal_texts": 0, "logits": 0, "unequal_logits": 0, "preemptions": 0}
    found |= {"reused_tokens": 0, "missing_logits": 0}
    by_condition: Counter[str] = Counter()

    def params_of(mode: dict[str, Any], law: str, index: int) -> GenerationParams:
        options = {"block_length": 8, **mode, **LAWS[law], "seed": index}
        return GenerationParams(max_new_tokens=new_tokens, ignore_eos=True, **options)

    for (condition, threads), members in batches(cells):
        digests = Digests()
        for index, _, law in members:  # the reference: alone, one thread
            if (index, law) not in expected:
                request = (prompts[index], params_of({"mode": "ar"}, law, index))
                (seq,) = decode(lm, [request], condition="alone", threads=1, digests=digests)
                expected[index, law] = seq.new_ids, digests.along(seq)
                digests.rows.clear()
        requests = [
            (prompts[index], params_of(MODES[mode], law, index)) for index, mode, law in members
        ]
        if condition == "prefix reused":  # behind the same prompts, whose rows still hold them
            requests, members = twice(requests), twice(members)
        sequences = decode(lm, requests, condition=condition, threads=threads, digests=digests)
        for seq, (index, mode, law) in zip(sequences, members, strict=True):
            tokens, logits = expected[index, law]
            found["texts"] += 1
            found["preemptions"] += seq.stats.num_preemptions
            found["reused_tokens"] += seq.stats.reused_tokens
            by_condition[condition] += 1
            lengths.setdefault(mode, Counter()).update(seq.stats.acceptance_lengths)
            if seq.new_ids != tokens:
                found["unequal_texts"] += 1
                print(f"prompt {index}, {mode}, {law}, {condition}: another text", flush=True)
            along = digests.along(seq)
            found["missing_logits"] += len(logits.keys() - along.keys())
            found["logits"] += len(along)
            found["unequal_logits"] += sum(one != logits[i] for i, one in along.items())
        found["unequal_logits"] += digests.num_changed
        print(f"{condition}, {threads} threads: {found}", file=sys.stderr, flush=True)
    found["conditions"] = by_condition
    found["accepted_lengths"] = {
        mode: dict(sorted(counts.items())) for mode, counts in lengths.items()
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--drafter", default=None)
    parser.add_argument("--forms", nargs="+", default=["float32", "bfloat16", "int8"])
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--prompt-tokens", type=int, default=48)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    record: dict[str, Any] = {"environment": environment(arguments), "forms": {}}
    for form in arguments.forms:
        options = {"drafter": arguments.drafter} if arguments.drafter else {}
        dtype = torch.bfloat16 if form == "bfloat16" else torch.float32
        weights = "int8" if form == "int8" else "native"
        lm = trimode.load(arguments.model, dtype=dtype, weights=weights, **options)
        prompts = prompts_of(lm, arguments.prompts, arguments.prompt_tokens, arguments.seed)
        found = compare(lm, prompts, new_tokens=arguments.new_tokens, seed=arguments.seed)
        record["forms"][form] = found
        arguments.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        print(form, json.dumps(found), flush=True)
    failed = [
        form
        for form, found in record["forms"].items()
        if found["unequal_texts"]
        or found["unequal_logits"]
        or found["missing_logits"]
        or not all(found[name] for name in ("texts", "preemptions", "reused_tokens"))
        or set(found["conditions"]) != set(CONDITIONS)
    ]
    if failed:
        sys.exit(f"not the same bits: {', '.join(failed)}")


if __name__ == "__main__":
    main()
