"""Post-editing measured: tokens of held-out code replaced at random, and clean code left alone.

    python benchmarks/bench_revise.py --output benchmarks/results/revise_cpu_202611

In each prompt one token of its last two thirds is replaced by a random one; one edit may be made.
`found` is the share of prompts in which the edit is at that place, `repaired` that in which it puts
the old token back, `clean edited` the share of the undamaged prompts in which an edit is made. Each
at several `min_gain`, from one run at 0. `AR proposals only` leaves out the diffusion view's.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from bench_decode import environment

import trimode
from trimode.checkpoint.io import POCKET_MODEL
from trimode.decoding import editing

GAINS = (0, 4, 8, 12, 16, 20)


def best(lm: trimode.TriModeLM, ids: list[int]) -> editing.Replacement | None:
    """The one edit that a budget of one allows, whatever it brings."""
    special = {i for i, token in lm.tokenizer.added_tokens_decoder.items() if token.special}
    made = editing.revise(
        lm.model,
        ids,
        editable=range(len(ids)),
        budget=1,
        block_length=lm.model.config.block_size,
        min_gain=0.0,
        banned=special,
    )
    return made[0] if made else None


def measure(lm: trimode.TriModeLM, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """One record for each prompt."""
    rng, runs = random.Random(0), []
    for ids in prompts:
        index = rng.randrange(len(ids) // 3, len(ids) - 4)
        damaged = [*ids[:index], rng.randrange(20, lm.model.config.vocab_size), *ids[index + 1 :]]
        edit, clean = best(lm, damaged), best(lm, ids)
        runs.append(
            {
                "gain": edit.gain if edit else 0.0,
                "is_found": edit is not None and edit.index == index,
                "is_repaired": edit is not None
                and (edit.index, edit.new_id) == (index, ids[index]),
                "clean_gain": clean.gain if clean else 0.0,
            }
        )
    return runs


def rows(name: str, runs: list[dict[str, Any]]) -> list[str]:
    def share(values: list[bool]) -> str:
        return f"{100 * sum(values) / len(values):.0f} %"

    lines = []
    for least in GAINS:
        found = share([run["is_found"] and run["gain"] >= least for run in runs])
        repaired = share([run["is_repaired"] and run["gain"] >= least for run in runs])
        clean = share([run["clean_gain"] >= max(least, 1e-9) for run in runs])
        lines.append(f"| {name} | {least} | {found} | {repaired} | {clean} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=Path, default=POCKET_MODEL / "heldout_prompts.jsonl")
    parser.add_argument("--num-prompts", type=int, default=50)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    lm = trimode.load("pocket", dtype="float32")
    lines = arguments.prompts.read_text(encoding="utf-8").splitlines()[: arguments.num_prompts]
    prompts = [lm.encode(json.loads(line)["prompt"]) for line in lines]
    runs = {"both views propose": measure(lm, prompts)}
    plain = editing._proposals
    editing._proposals = lambda model, ids, doubtful, **_: [ids[i] for i in doubtful]
    runs["AR proposals only"] = measure(lm, prompts)
    editing._proposals = plain
    table = ["| | min_gain, nats | found | repaired | clean edited |", "|---|---|---|---|---|"]
    for name, found in runs.items():
        table += rows(name, found)
    text = f"{len(prompts)} held-out prompts, one damaged token each, a budget of one edit.\n\n"
    text += "\n".join(table) + "\n"
    record = {"environment": environment(arguments), "runs": runs}
    arguments.output.with_suffix(".json").write_text(json.dumps(record) + "\n")
    arguments.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
