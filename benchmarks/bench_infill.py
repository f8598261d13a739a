"""Infilling measured: held-out functions with a removed line or span (`infill_cases.py`).

    python benchmarks/bench_infill.py --output benchmarks/results/infill_cpu_202611

Greedy. Of every way to fill the gap:

* exact: the share of cases in which the removed text comes back, spaces at its ends aside.
* similarity: 1 - edit distance / length of the longer, in characters, averaged.
* valid: the share in which the function parses again.

`AR, left to right` sees the text before the gap only. Of a line it writes up to the newline, of a
span as many tokens as were removed, which nobody would tell it. `true length` tells infilling the
same; it chooses among lengths of its own otherwise. `by mean` ranks by the mean log-probability of
the fill's tokens plus the suffix's sum over the fill's number of tokens; the default ranks by the
sum, with which lengths compare as whole texts.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from bench_decode import environment
from infill_cases import parses

import trimode

Case = dict[str, Any]


def edit_distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def judged(case: Case, fill: str) -> dict[str, Any]:
    text, start, stop = case["text"], case["start"], case["stop"]
    removed = text[start:stop].strip()
    longer = max(len(fill.strip()), len(removed), 1)
    return {
        "fill": fill,
        "is_exact": fill.strip() == removed,
        "similarity": 1 - edit_distance(fill.strip(), removed) / longer,
        "is_valid": parses(text[:start] + fill + text[stop:]),
    }


def left_to_right(lm: trimode.TriModeLM, case: Case) -> str:
    prompt = case["text"][: case["start"]]
    is_line = case["kind"] == "line"
    num_tokens = 48 if is_line else len(removed_ids(lm, case))
    stop = "\n" if is_line else None
    made = lm.generate(prompt, mode="ar", max_new_tokens=num_tokens, stop=stop, seed=0)
    assert not isinstance(made, list)
    return made.text


def removed_ids(lm: trimode.TriModeLM, case: Case) -> list[int]:
    text = case["text"][case["start"] : case["stop"]]
    return list(lm.tokenizer(text, add_special_tokens=False)["input_ids"])


def measure(lm: trimode.TriModeLM, case: Case) -> dict[str, Any]:
    text, span = case["text"], (case["start"], case["stop"])
    begun = time.perf_counter()
    found: dict[str, Any] = {"AR, left to right": judged(case, left_to_right(lm, case))}
    half = time.perf_counter()
    filled = lm.infill(text, spans=[span], seed=0, language="python")
    seconds = {"ar": half - begun, "infill": time.perf_counter() - half}
    candidates = filled.gaps[0].candidates
    found["infill, python"] = judged(case, candidates[0].text)
    likeliest = max(candidates, key=lambda one: one.log_prob)
    found["infill"] = judged(case, likeliest.text)
    by_mean = max(candidates, key=lambda one: one.log_prob / len(one.token_ids))
    found["infill, by mean"] = judged(case, by_mean.text)
    length = len(removed_ids(lm, case))
    known = lm.infill(text, spans=[span], seed=0, lengths=[min(length, 48)])
    found["infill, true length"] = judged(case, known.gaps[0].text)
    best = max((judged(case, one.text) for one in candidates), key=lambda one: one["similarity"])
    found["the best of the candidates (oracle)"] = best
    return {
        "kind": case["kind"],
        "found": found,
        "seconds": seconds,
        "forwards": {kind: n for kind, n in filled.stats.forwards.items() if n},
        "candidates": [
            [one.text, one.fill_log_prob, one.suffix_log_prob, one.is_valid] for one in candidates
        ],
    }


def table(runs: list[dict[str, Any]]) -> list[str]:
    lines = ["| | gap | exact | similarity | valid |", "|---|---|---|---|---|"]
    for name in runs[0]["found"]:
        for kind in ("line", "span"):
            some = [run["found"][name] for run in runs if run["kind"] == kind]
            cells = [
                f"{100 * sum(one['is_exact'] for one in some) / len(some):.0f} %",
                f"{sum(one['similarity'] for one in some) / len(some):.2f}",
                f"{100 * sum(one['is_valid'] for one in some) / len(some):.0f} %",
            ]
            lines.append(f"| {name} | {kind} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="pocket", help="checkpoint")
    parser.add_argument("--cases", type=Path, default=Path(__file__).parent / "infill_cases.jsonl")
    parser.add_argument("--num-cases", type=int, default=160)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    lm = trimode.load(arguments.model, dtype="float32")
    lines = arguments.cases.read_text(encoding="utf-8").splitlines()[: arguments.num_cases]
    runs = [measure(lm, json.loads(line)) for line in lines]
    forwards = sum(sum(run["forwards"].values()) for run in runs) / len(runs)
    seconds = [sum(run["seconds"][name] for run in runs) / len(runs) for name in ("infill", "ar")]
    text = (
        f"{len(runs)} held-out functions, half with a line removed, half with a span; greedy.\n"
        f"Infilling took {forwards:.0f} forwards and {seconds[0]:.1f} s a gap, left to right"
        f" {seconds[1]:.1f} s.\n\n" + "\n".join(table(runs)) + "\n"
    )
    record = {"environment": environment(arguments), "runs": runs}
    arguments.output.with_suffix(".json").write_text(json.dumps(record) + "\n")
    arguments.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
