"""The family of speculation on one model: branches m, block length K, cut-offs, passes per draft.

    python benchmarks/bench_branching.py --output benchmarks/results/branching_cpu_202611

Every prompt goes through every setting in turn, so a machine that slows down slows them all. All
settings but the first must write what `ar` writes. Writes OUTPUT.json and OUTPUT.md.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from bench_decode import environment

import trimode
from trimode.checkpoint.io import POCKET_MODEL

Options = dict[str, Any]


def settings() -> dict[str, Options]:
    """Name -> arguments of `generate`."""
    found: dict[str, Options] = {"ar": {"mode": "ar"}}
    for length in (2, 3, 4, 6, 8):
        found[f"linear, K {length}"] = {"mode": "linear", "block_length": length}
    for length in (2, 4, 8):
        found[f"quadratic, K {length}"] = {"mode": "quadratic", "block_length": length}
    for length, counts in ((2, (1, 2, 3)), (3, (2, 5)), (4, (1, 2, 4, 7)), (8, (1, 2, 4, 8, 15))):
        for number in counts:
            found[f"branching, K {length}, m {number}"] = {
                **{"mode": "branching", "block_length": length, "branches": number}
            }
    for number in (2, 4):
        found[f"branching, K 8, m {number}, no guesses"] = {
            **{"mode": "branching", "block_length": 8, "branches": number, "guesses": False}
        }
    for cutoff in (0.2, 0.4):
        found[f"linear, K 8, cut-off {cutoff}"] = {
            **{"mode": "linear", "block_length": 8, "draft_cutoff": cutoff}
        }
        found[f"branching, K 8, m 4, cut-off {cutoff}"] = {
            **{"mode": "branching", "block_length": 8, "branches": 4, "draft_cutoff": cutoff}
        }
    for passes in (2, 3):
        found[f"linear, K 8, {passes} passes"] = {
            **{"mode": "linear", "block_length": 8, "steps": passes}
        }
    return found


def summarise(name: str, runs: list[dict[str, Any]], base: float) -> dict[str, Any]:
    """Totals of one setting over all prompts."""
    tokens = sum(len(run["token_ids"]) for run in runs)
    seconds = sum(run["seconds"] for run in runs)
    forwards = sum(sum(run["forwards"].values()) for run in runs)
    lengths = [length for run in runs for length in run["acceptance_lengths"]]
    rounds = sum(run["forwards"]["verify"] for run in runs)
    drafts = sum(run["forwards"]["draft"] for run in runs)
    return {
        "name": name,
        "tokens_per_second": tokens / seconds,
        "speed_over_ar": tokens / seconds / base if base else 1.0,
        "tpf_total": tokens / forwards,
        "acceptance_length": sum(lengths) / len(lengths) if lengths else None,
        "free_drafts": 1 - drafts / rounds if drafts <= rounds and rounds else None,
        "tokens_fed_per_new_token": sum(sum(run["tokens_fed"].values()) for run in runs) / tokens,
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| | TPF total | acceptance length | rounds without a draft forward | fed/new | tokens/s |"
        " over ar |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        length, free = row["acceptance_length"], row["free_drafts"]
        cells = [row["name"], f"{row['tpf_total']:.2f}", "-" if length is None else f"{length:.2f}"]
        cells.append("-" if free is None else f"{100 * free:.0f} %")
        cells.append(f"{row['tokens_fed_per_new_token']:.1f}")
        cells += [f"{row['tokens_per_second']:.0f}", f"{row['speed_over_ar']:.2f}x"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--drafter", default=None)
    parser.add_argument("--prompts", type=Path, default=POCKET_MODEL / "heldout_prompts.jsonl")
    parser.add_argument("--num-prompts", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    lm = trimode.load(arguments.model, dtype="float32", drafter=arguments.drafter)
    lines = arguments.prompts.read_text(encoding="utf-8").splitlines()[: arguments.num_prompts]
    prompts = [lm.encode(json.loads(line)["prompt"]) for line in lines]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in settings()}
    for prompt in [prompts[0], *prompts]:  # the first one warms up
        for name, options in settings().items():
            started_s = time.perf_counter()
            made = lm.generate(
                prompt, max_new_tokens=arguments.new_tokens, seed=0, ignore_eos=True, **options
            )
            assert isinstance(made, trimode.Generation)
            seconds = time.perf_counter() - started_s
            stats = made.stats
            runs[name].append(
                {
                    "seconds": seconds,
                    "token_ids": made.token_ids,
                    "forwards": stats.forwards,
                    "tokens_fed": stats.tokens_fed,
                    "acceptance_lengths": stats.acceptance_lengths,
                }
            )
    runs = {name: found[1:] for name, found in runs.items()}
    rows: list[dict[str, Any]] = []
    for name, found in runs.items():
        rows.append(summarise(name, found, rows[0]["tokens_per_second"] if rows else 0.0))
    texts = {name: [run["token_ids"] for run in found] for name, found in runs.items()}
    num_equal = sum(
        one == other
        for found in texts.values()
        for one, other in zip(found, texts["ar"], strict=True)
    )
    env = environment(arguments)
    lens = [len(prompt) for prompt in prompts]
    text = (
        f"Greedy, batch 1, float32, {env['machine']}, {env['threads']} threads, {len(prompts)}"
        f" held-out prompts of {min(lens)} to {max(lens)} tokens, {arguments.new_tokens} new tokens"
        f" each, drafter {arguments.drafter or 'own'}. {env['date']}, torch {env['torch']}, commit"
        f" {env['commit']}. Texts equal to those of `ar`: {num_equal - len(prompts)} of"
        f" {len(prompts) * (len(texts) - 1)}.\n\n{table(rows)}\n"
    )
    record = {"environment": env, "summary": rows, "runs": runs}
    arguments.output.with_suffix(".json").write_text(json.dumps(record) + "\n")
    arguments.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
