"""Speculation on a CPU against plain decoding, its own and llama.cpp's, in every precision.

    python benchmarks/bench_speculation.py --output benchmarks/results/speculation_smollm2_202611 \\
        --llama-python LLAMA/bin/python

SmolLM2 with its drafter, one request at a time, chat prompts and HumanEval. LLAMA is an environment
with `llama-cpp-python` and `gguf` from PyPI; without it llama.cpp is left out. Every prompt goes
through every contestant in turn, so a machine that slows down slows them all; seconds include the
prompt. llama.cpp makes as many tokens as `ar` did, with the same weights. The same command goes on
where it was stopped. Writes OUTPUT.json and OUTPUT.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bench_cpu import LLAMA_KINDS, Llama
from bench_decode import environment
from bench_drafting import PROMPT_SETS

import trimode

Options = dict[str, Any]

FORMS: dict[str, Options] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "float32", "weights": "int8"},
}

SETTINGS: dict[str, Options] = {
    "ar": {"mode": "ar"},
    "linear": {"mode": "linear", "lookup": True, "min_gain": 0.06},
    "branching, 1 group": {
        **{"mode": "branching", "branches": 1, "guesses": False, "skip_masks": 4},
        **{"lookup": True, "min_gain": 0.0},
    },
    "branching, min_gain": {
        **{"mode": "branching", "branches": 4, "guesses": False},
        **{"lookup": True, "min_gain": 0.1},
    },
    "auto": {"mode": "auto"},
}
"""Contestants of ours; the first is the reference."""

LLAMA = "llama.cpp"
NUM_DRAWS = 2000


def prompts(name: str) -> list[str]:
    """All of a set."""
    return [one["prompt"] for one in PROMPT_SETS[name]()]


def measure(
    lm: trimode.TriModeLM, llama: Llama | None, texts: list[str], *, law: Options
) -> list[dict[str, Any]]:
    """One prompt after the other through every contestant."""
    found = []
    for index, text in enumerate(texts):
        messages = [{"role": "user", "content": text}]
        own: dict[str, Any] = {}
        for name, setting in SETTINGS.items():
            started_s = time.perf_counter()
            made = lm.chat(messages, seed=index, **setting, **law)
            stats = made.stats
            reference = own.get("ar", {"token_ids": made.token_ids})["token_ids"]
            own[name] = {
                "seconds": time.perf_counter() - started_s,
                "num_tokens": len(made.token_ids),
                "is_equal": made.token_ids == reference,
                "forwards": stats.num_forwards - stats.forwards["prefill"],
                "fed": sum(stats.tokens_fed.values()) - stats.tokens_fed["prefill"],
            }
            if name == "ar":
                own[name]["token_ids"] = made.token_ids
        if llama is not None:
            ids = lm.answering(messages, {})["prompt"].token_ids
            made_there = llama.ask(ids=ids, new_tokens=own["ar"]["num_tokens"])
            own[LLAMA] = {
                "seconds": made_there["seconds"],
                "num_tokens": len(made_there["token_ids"]),
                "is_equal": made_there["token_ids"] == own["ar"]["token_ids"],
            }
        found.append(own)
    return found


def per_second(runs: list[dict[str, Any]], name: str) -> float:
    """Tokens of all prompts together."""
    tokens = sum(run[name]["num_tokens"] for run in runs)
    return tokens / sum(run[name]["seconds"] for run in runs)


def over(runs: list[dict[str, Any]], name: str, other: str) -> tuple[float, float, float]:
    """Ratio of two speeds and its 95 % bootstrap interval over the prompts."""
    draw = random.Random(0)
    drawn = sorted(
        per_second(some, name) / per_second(some, other)
        for some in (draw.choices(runs, k=len(runs)) for _ in range(NUM_DRAWS))
    )
    whole = per_second(runs, name) / per_second(runs, other)
    return whole, drawn[NUM_DRAWS // 40], drawn[-NUM_DRAWS // 40]


def lines(record: dict[str, Any]) -> Iterator[str]:
    """OUTPUT.md."""
    env, arguments = record["environment"], record["environment"]["arguments"]
    yield (
        f"SmolLM2-135M-Instruct, {env['machine']}, {env['threads']} threads, one request at a time,"
        f" at most {arguments['max_new_tokens']} new tokens; a prompt goes through all contestants"
        f" in turn, seconds include it. torch {env['torch']}, `{env['command']}`. In brackets 95 %"
        " bootstrap intervals over the prompts. TPF: tokens a forward, the prefill apart; fed:"
        " tokens a forward feeds."
    )
    yield ""
    yield "; ".join(f"`{name}`: {json.dumps(setting)}" for name, setting in SETTINGS.items())
    for part in record["parts"]:
        runs = part["runs"]
        same = {name: sum(run[name]["is_equal"] for run in runs) for name in runs[0]}
        ours = sum(same[name] for name in SETTINGS if name != "ar")
        yield ""
        yield f"### {part['form']}, {part['prompts']}, temperature {part['temperature']:g}"
        yield ""
        yield (
            f"{len(runs)} prompts; texts equal to those of `ar`: {ours} of"
            f" {len(runs) * (len(SETTINGS) - 1)}; of llama.cpp's {same.get(LLAMA, 0)}. Load average"
            f" before: {part['load_average']:.1f}. {part['date']}, commit {part['commit']}."
        )
        yield ""
        yield "| | tokens/s | over own `ar` | over llama.cpp | TPF | fed |"
        yield "|---|---|---|---|---|---|"
        for name in runs[0]:
            cells = [f"{per_second(runs, name):.0f}"]
            for other in ("ar", LLAMA):
                if name == other or other not in runs[0]:
                    cells.append("-")
                    continue
                ratio, low, high = over(runs, name, other)
                cells.append(f"{ratio:.2f} ({low:.2f}-{high:.2f})")
            if name in SETTINGS:
                forwards = sum(run[name]["forwards"] for run in runs)
                tokens = sum(run[name]["num_tokens"] - 1 for run in runs)
                cells += [
                    f"{tokens / forwards:.2f}",
                    f"{sum(run[name]['fed'] for run in runs) / forwards:.1f}",
                ]
            else:
                cells += ["-", "-"]
            yield f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--drafter", default=None, help="default: the model's own")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--prompts", nargs="+", default=["chat", "humaneval"])
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0])
    parser.add_argument("--num-prompts", type=int, default=24, help="of each set, evenly spread")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--llama-python", type=Path, default=None)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    record: dict[str, Any] = {"environment": environment(arguments), "parts": []}
    file = arguments.output.with_suffix(".json")
    if file.exists():  # goes on where it was stopped
        before = json.loads(file.read_text())
        for name in ("num_prompts", "max_new_tokens", "drafter"):
            was, now = (one["environment"]["arguments"][name] for one in (before, record))
            if was != now:
                parser.error(f"{file} was measured with {name} {was}, not {now}; remove it first")
        record["parts"] = before["parts"]
    done = {(part["form"], part["prompts"], part["temperature"]) for part in record["parts"]}
    plain = None
    if arguments.llama_python is not None:
        plain = trimode.load("smollm2", dtype="float32", weights="plain", drafter="none").model
    with tempfile.TemporaryDirectory() as folder:
        for form in arguments.forms:
            wanted = [
                (name, temperature)
                for name in arguments.prompts
                for temperature in arguments.temperatures
                if (form, name, temperature) not in done
            ]
            if not wanted:
                continue
            llama = None
            if plain is not None:
                kind = LLAMA_KINDS[form]
                llama = Llama.of(arguments.llama_python, plain, kind, Path(folder))
            lm = trimode.load("smollm2", drafter=arguments.drafter, **FORMS[form])
            _ = lm.planner  # measured before, and not within a request
            measure(lm, llama, prompts("chat")[-1:], law={"max_new_tokens": 32})  # to warm up
            for name, temperature in wanted:
                texts = prompts(name)
                step = max(len(texts) // arguments.num_prompts, 1)
                law = {"max_new_tokens": arguments.max_new_tokens, "temperature": temperature}
                load = os.getloadavg()[0]
                greedy = llama if temperature == 0 else None
                chosen = texts[::step][: arguments.num_prompts]
                runs = measure(lm, greedy, chosen, law=law)
                part = {"form": form, "prompts": name, "temperature": temperature}
                part |= {key: record["environment"][key] for key in ("date", "commit")}
                record["parts"].append(part | {"load_average": load, "runs": runs})
                file.write_text(json.dumps(record))
                text = "\n".join(lines(record)) + "\n"
                arguments.output.with_suffix(".md").write_text(text, encoding="utf-8")
            if llama is not None:
                llama.close()
    print("\n".join(lines(record)))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
