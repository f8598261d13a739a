"""What tuning brought: the default model with and without `instruct_lora`, on held-out packages.

    python benchmarks/instruct_pairs.py data/pocket_instruct.jsonl
    python benchmarks/bench_instruct.py --output benchmarks/results/instruct_cpu_202611

Both get the same conversations in the same words. Loss is that of the AR view, in nats per token of
the answer. Answers are greedy; one that should be a function counts as valid if it ended by itself
and Python parses it. Writes OUTPUT.json and OUTPUT.md.
"""

from __future__ import annotations

import argparse
import ast
import json
from pathlib import Path
from typing import Any

import torch
from bench_decode import environment

import trimode
from trimode.conversation import answering

KINDS = ("write", "complete", "comment", "document")


def answer_loss(lm: trimode.TriModeLM, messages: list[dict[str, str]]) -> tuple[float, int]:
    """Sum of the AR view's losses over the answer's tokens and its EOS, and their number."""
    prompt = answering(lm.vocabulary, messages[:-1], {})["prompt"].token_ids
    assert lm.tokenizer is not None
    answer = lm.tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"]
    answer = [*answer, lm.model.config.eos_token_ids[0]]
    ids = torch.tensor([prompt + answer])
    with torch.inference_mode():
        logits = lm.model(ids).logits[0, len(prompt) - 1 : -1]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")
    return float(loss), len(answer)


def parses(text: str) -> bool:
    """Whether Python takes it for code that defines something."""
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError):
        return False
    return any(isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) for node in body)


def measure(
    lm: trimode.TriModeLM, record: dict[str, Any], *, mode: str, new_tokens: int
) -> dict[str, Any]:
    """One conversation through one model."""
    loss, num_tokens = answer_loss(lm, record["messages"])
    made = lm.chat(record["messages"][:-1], mode=mode, max_new_tokens=new_tokens)
    return {
        "kind": record["kind"],
        "loss": loss,
        "tokens": num_tokens,
        "text": made.text,
        "finish_reason": made.finish_reason,
        "is_valid": made.finish_reason == "stop" and parses(made.text),
        "new_tokens": made.stats.new_tokens,
        "forwards": made.stats.num_forwards,
    }


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Loss by kind, endings, validity of what should be a function."""
    lines = [
        "| | " + " | ".join(f"loss, {kind}" for kind in KINDS) + " | ended | valid functions |",
        "|---" * (len(KINDS) + 3) + "|",
    ]
    for name, found in runs.items():
        cells = [name]
        for kind in KINDS:
            some = [run for run in found if run["kind"] == kind]
            tokens = sum(run["tokens"] for run in some)
            cells.append(f"{sum(run['loss'] for run in some) / tokens:.2f}" if some else "-")
        ended = sum(run["finish_reason"] == "stop" for run in found) / len(found)
        functions = [run["is_valid"] for run in found if run["kind"] != "document"]
        cells += [f"{100 * ended:.0f} %", f"{100 * sum(functions) / len(functions):.0f} %"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=Path, default=Path("data/pocket_instruct_held_out.jsonl"))
    parser.add_argument("--lora", default="instruct_lora")
    parser.add_argument("--num", type=int, default=120)
    parser.add_argument("--new-tokens", type=int, default=192)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    tuned = trimode.load("pocket", dtype="float32", lora=arguments.lora)
    base = trimode.load("pocket", dtype="float32")
    base.tokenizer = tuned.tokenizer  # for its chat template; the vocabulary is the same
    lines = arguments.pairs.read_text(encoding="utf-8").splitlines()[: arguments.num]
    records = [json.loads(line) for line in lines]
    runs = {
        name: [measure(lm, one, mode="ar", new_tokens=arguments.new_tokens) for one in records]
        for name, lm in (("base", base), ("instruct", tuned))
    }
    text = (
        f"{len(records)} conversations from held-out packages, the first of the file; greedy, at"
        f" most {arguments.new_tokens} new tokens.\n\n{table(runs)}\n"
    )
    record = {"environment": environment(arguments), "runs": runs}
    arguments.output.with_suffix(".json").write_text(json.dumps(record) + "\n")
    arguments.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
