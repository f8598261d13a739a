"""Mode `auto` beside fixed settings: many requests at once, at fixed and at changing concurrency.

    python benchmarks/bench_auto.py --output benchmarks/results/auto_cpu_202611

The engine alone, no HTTP. Every repeat runs every contestant on the same requests, in an order of
its own, so a machine that slows down slows them all; one planner lives through all of it, as in a
server. Two loads: so many requests run at any time, as soon as one ends the next begins; and a mix
of requests, some of them easy to draft, at a concurrency that goes up and down. Writes OUTPUT.json
and OUTPUT.md.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_decode import environment

import trimode
from trimode.checkpoint.io import POCKET_MODEL
from trimode.conversation import answering
from trimode.decoding import Sequence
from trimode.engine import Engine
from trimode.engine.costs import Costs

Options = dict[str, Any]

CONCURRENCIES = (1, 2, 4, 8, 16, 32)
PHASES = ((1, 3), (8, 12), (32, 24), (2, 4), (16, 16), (1, 3), (4, 6))
"""Mixed load: concurrency, and how many requests begin before the next phase."""

CONTESTANTS: dict[str, Options] = {
    "ar": {"mode": "ar"},
    "linear, K 3": {"mode": "linear", "block_length": 3},
    "linear, K 8": {"mode": "linear", "block_length": 8},
    "branching, K 2, m 1": {"mode": "branching", "block_length": 2, "branches": 1},
    "branching, K 2, m 2": {"mode": "branching", "block_length": 2, "branches": 2},
    "branching, K 8, m 4": {"mode": "branching", "block_length": 8, "branches": 4},
    "auto": {"mode": "auto"},
}

DRAFTER_CONTESTANTS: dict[str, Options] = {
    "ar": {"mode": "ar"},
    "linear, 5 masks": {"mode": "linear", "skip_masks": 5, "min_gain": 0.0},
    "linear, gain 0.06": {"mode": "linear", "lookup": True, "min_gain": 0.06},
    "linear, gain 0.2": {"mode": "linear", "lookup": True, "min_gain": 0.2},
    "branching, 4 masks, m 1": {
        **{"mode": "branching", "skip_masks": 4, "branches": 1, "guesses": False},
        **{"lookup": True, "min_gain": 0.0},
    },
    "branching, gain 0.1": {"mode": "branching", "guesses": False, "lookup": True, "min_gain": 0.1},
    "auto": {"mode": "auto"},
}
"""With an adapter whose masks skip the bonus."""

REPETITIVE = (
    "0, 0, 0, 0, " * 12,
    "x = 1\n" * 20,
    "assert a == b\n" * 15,
    "# " + "=" * 70 + "\n# =",
)


@dataclass(frozen=True)
class Request:
    """A prompt, and what of its arguments is not the contestant's."""

    prompt: str
    options: Options


def held_out(prompts: list[str], number: int, *, start: int, new_tokens: int) -> list[Request]:
    """So many requests, greedy."""
    taken = [prompts[(start + i) % len(prompts)] for i in range(number)]
    return [Request(prompt, {"max_new_tokens": new_tokens}) for prompt in taken]


def mixed(prompts: list[str], number: int, *, seed: int, new_tokens: int) -> list[Request]:
    """Half held-out and half repetitive prompts, half greedy and half sampled, of many lengths."""
    chance = random.Random(seed)
    found = []
    for index in range(number):
        prompt = chance.choice(REPETITIVE if index % 2 else prompts)
        options: Options = {"max_new_tokens": chance.randrange(new_tokens // 2, 2 * new_tokens)}
        if index % 4 > 1:
            options["temperature"] = 0.8
        found.append(Request(prompt, options))
    return found


def run(
    lm: trimode.TriModeLM,
    sequences: Iterator[Sequence],
    phases: Iterable[tuple[int, int]],
    *,
    num_cells: int,
) -> float:
    """Seconds until all are done: in each phase so many run while so many begin."""
    engine = Engine(
        lm.model,
        num_rows=max(concurrency for concurrency, _ in phases),
        num_cells=num_cells,
        adapter=lm.adapter,
        planner=lm.planner,
    )
    started_s = time.perf_counter()
    for concurrency, number in phases:
        num_left = number
        while num_left:
            while num_left and engine.num_running + engine.num_waiting < concurrency:
                engine.submit(next(sequences))
                num_left -= 1
            engine.step()
    engine.run()
    return time.perf_counter() - started_s


def one_run(
    lm: trimode.TriModeLM, requests: list[Request], options: Options, phases: list[tuple[int, int]]
) -> dict[str, Any]:
    """One contestant on one load."""
    sequences = []
    for index, one in enumerate(requests):
        arguments = {"prompt": one.prompt, "seed": index, "ignore_eos": True, **one.options}
        if lm.tokenizer is not None and lm.tokenizer.chat_template:
            message = {"role": "user", "content": arguments.pop("prompt")}
            arguments = answering(lm.vocabulary, [message], arguments) | {"stop_token_ids": None}
        sequences.append(lm.prepare(**arguments, **options))
    switches, probes = lm.planner.num_switches, lm.planner.num_probes
    seconds = run(lm, iter(sequences), phases, num_cells=512)
    return {
        "seconds": seconds,
        "new_tokens": sum(len(seq.new_ids) for seq in sequences),
        "forwards": sum(seq.stats.num_forwards for seq in sequences),
        "texts": [seq.new_ids for seq in sequences],
        "switches": lm.planner.num_switches - switches,
        "probes": lm.planner.num_probes - probes,
    }


def interval(values: list[float]) -> tuple[float, float]:
    """95 % of the means of samples drawn anew from these values."""
    draws = np.random.default_rng(0).choice(values, (10_000, len(values)))
    low, high = np.percentile(draws.mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def summarise(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Of one load: tokens a second of each contestant, and auto over the best that is fixed."""
    speeds = {name: [one["new_tokens"] / one["seconds"] for one in r] for name, r in runs.items()}
    best = max((name for name in speeds if name != "auto"), key=lambda n: np.mean(speeds[n]))
    over = [a / b for a, b in zip(speeds["auto"], speeds[best], strict=True)]
    texts = [[text for one in r for text in one["texts"]] for r in runs.values()]
    return {
        "speeds": {
            name: {"mean": float(np.mean(values)), "interval": interval(values)}
            for name, values in speeds.items()
        },
        "best_fixed": best,
        "auto_over_best": {"mean": float(np.mean(over)), "interval": interval(over)},
        "switches_per_1000_tokens": 1000
        * sum(one["switches"] for one in runs["auto"])
        / sum(one["new_tokens"] for one in runs["auto"]),
        "probes": sum(one["probes"] for one in runs["auto"]),
        "equal_texts": sum(
            one == other for t in texts[1:] for one, other in zip(t, texts[0], strict=True)
        ),
        "num_texts": sum(map(len, texts[1:])),
    }


def table(summary: dict[str, dict[str, Any]]) -> str:
    """Tokens a second: a row for each contestant, a column for each load."""
    lines = ["| tokens/s | " + " | ".join(summary) + " |", "|---" * (len(summary) + 1) + "|"]
    for name in next(iter(summary.values()))["speeds"]:
        cells = []
        for load in summary.values():
            found = load["speeds"][name]
            low, high = found["interval"]
            cell = f"{found['mean']:.0f} ({low:.0f}-{high:.0f})"
            cells.append(f"**{cell}**" if name == load["best_fixed"] else cell)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    cells = []
    for load in summary.values():
        low, high = load["auto_over_best"]["interval"]
        cells.append(f"{load['auto_over_best']['mean']:.2f} ({low:.2f}-{high:.2f})")
    lines.append("| auto over the best fixed | " + " | ".join(cells) + " |")
    cells = [f"{load['switches_per_1000_tokens']:.1f}" for load in summary.values()]
    lines.append("| switches per 1000 tokens | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(
    runs: dict[str, dict[str, list[dict[str, Any]]]],
    arguments: argparse.Namespace,
    *,
    planner_s: float,
    costs: Costs,
) -> str:
    """Write what was found so far; the page."""
    num_repeats = len(runs["mixed"]["auto"])
    summary = {load: summarise(found) for load, found in runs.items()}
    env = environment(arguments)
    num_equal = sum(load["equal_texts"] for load in summary.values())
    num_texts = sum(load["num_texts"] for load in summary.values())
    rows = ", ".join(str(concurrency) for concurrency, _ in PHASES)
    new = arguments.new_tokens
    text = (
        f"The engine without HTTP, {arguments.model}, {arguments.dtype}, {env['machine']},"
        f" {env['threads']} threads, default block length of `auto`;"
        f" {num_repeats} repeats after one to warm up, mean (95 %"
        f" bootstrap interval over repeats; the best fixed one bold). {new} new tokens a request,"
        " greedy, held-out prompts; mixed: half of the prompts repetitive, half of the texts"
        f" sampled, {new // 2} to {2 * new - 1} new tokens, {rows} at once in turn. Drafter"
        f" {arguments.drafter or 'its own'}. {env['date']}, torch {env['torch']}, commit"
        f" {env['commit']}. Measuring forwards took {planner_s:.1f} s. Texts equal to those of"
        f" `ar`: {num_equal} of {num_texts}.\n\n{table(summary)}\n"
    )
    shown = {
        load: {
            name: [{k: v for k, v in one.items() if k != "texts"} for one in made]
            for name, made in found.items()
        }
        for load, found in runs.items()
    }
    record = {"environment": env, "summary": summary, "runs": shown}
    record["costs"] = {"seconds": costs.seconds, "per_row": costs.per_row}
    arguments.output.with_suffix(".json").write_text(json.dumps(record) + "\n")
    arguments.output.with_suffix(".md").write_text(text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--drafter", default=None)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=Path, default=POCKET_MODEL / "heldout_prompts.jsonl")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    lm = trimode.load(
        arguments.model, drafter=arguments.drafter, dtype=getattr(torch, arguments.dtype)
    )
    lines = arguments.prompts.read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    started_s = time.perf_counter()
    lm.planner  # noqa: B018 (made here)
    planner_s = time.perf_counter() - started_s
    contestants = CONTESTANTS if lm.adapter is None else DRAFTER_CONTESTANTS
    loads = [f"{concurrency} at once" for concurrency in CONCURRENCIES] + ["mixed"]
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {
        load: {name: [] for name in contestants} for load in loads
    }
    for repeat in range(-1, arguments.repeats):  # the first one warms up
        for load, concurrency in zip(loads, (*CONCURRENCIES, None), strict=True):
            if concurrency is None:
                phases = list(PHASES)
                number = sum(number for _, number in phases)
                requests = mixed(prompts, number, seed=repeat, new_tokens=arguments.new_tokens)
            else:
                number = concurrency + 2
                phases = [(concurrency, number)]
                requests = held_out(
                    prompts, number, start=7 * (repeat + 1), new_tokens=arguments.new_tokens
                )
            names = list(contestants)
            random.Random(repeat).shuffle(names)
            for name in names:
                made = one_run(lm, requests, contestants[name], phases)
                if repeat >= 0:
                    runs[load][name].append(made)
        if repeat >= 0:
            print(report(runs, arguments, planner_s=planner_s, costs=lm.planner.costs))


if __name__ == "__main__":
    main()
