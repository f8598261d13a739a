"""Acceptance in training and in decoding, on one set of answers: they should be one figure.

    python benchmarks/adapter_agreement.py configs/smollm2_adapter.yaml \\
        --output benchmarks/results/agreement_smollm2_202611

A run's held-out report walks rounds over the AR view's own greedy answers; here the engine decodes
the same answers from the same prompts with the adapter that the run has kept, in float32. Writes
OUTPUT.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from bench_decode import environment

import trimode
from trimode.cli.config_file import read_config
from trimode.training.anchor_walk import answers
from trimode.training.config import TrainConfig
from trimode.training.evaluate import heldout_rows
from trimode.training.parallel import Parallel
from trimode.training.shards import TokenShards


def held_out_answers(config: TrainConfig, block_length: int) -> list[tuple[list[int], list[int]]]:
    """Prompts and answers of the rows that the run's evaluation reads."""
    data = TokenShards.open(config.data, "held_out")
    parallel = Parallel(config.parallel, 0, torch.device("cpu"), None)
    found = []
    for _, _, rows, _ in heldout_rows(
        data, config=config, block_length=block_length, parallel=parallel
    ):
        for row in range(len(rows.clean_ids)):
            ids, documents = rows.clean_ids[row].tolist(), rows.document_ids[row].tolist()
            for start, end in answers(rows.is_supervised[row].tolist(), documents):
                found.append((ids[documents.index(documents[start]) : start], ids[start:end]))
    return found


def best_report(run: Path) -> dict[str, Any]:
    """The held-out report of the adapter that is kept: the best so far."""
    lines = (run / "log.jsonl").read_text("utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    reports = [record for record in records if record["kind"] == "held_out"]
    form = reports[0]["report"]["form"]

    def score(record: dict[str, Any]) -> float:
        return float(record["report"]["with_adapter"][form]["round_acceptance_length"])

    return max(reports, key=score)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    config = read_config(TrainConfig, arguments.config, [])
    run = Path(config.output_dir)
    report = best_report(run)
    form, num_masks = report["report"]["form"], report["report"]["num_masks"]
    drafter = run / "drafter"
    lm = trimode.load(config.model.init, dtype="float32", drafter=drafter)
    options: dict[str, Any] = {"draft_form": form, "block_length": num_masks + 1, "seed": 0}
    if form == "skip":
        options |= {"skip_masks": num_masks, "block_length": num_masks + 2}
    emitted = rounds = num_greedy = 0
    for prompt, answer in held_out_answers(config, lm.model.config.block_size):
        length = len(answer)
        ar = lm.generate(prompt, mode="ar", max_new_tokens=length, seed=0)
        linear = lm.generate(prompt, mode="linear", max_new_tokens=length, **options)
        assert linear.token_ids == ar.token_ids
        if ar.token_ids != answer:
            continue  # written at a temperature, or not the same to the last token in this dtype
        num_greedy += 1
        emitted += length - 1
        rounds += len(linear.stats.acceptance_lengths)
    record = {
        "environment": environment(arguments),
        "step": report["step"],
        "form": form,
        "answers": num_greedy,
        "tokens": emitted,
        "rounds": rounds,
        "decoding": emitted / rounds,
        "training": report["report"]["with_adapter"][form]["round_acceptance_length"],
        "training_rounds": report["report"]["with_adapter"][form]["rounds"],
    }
    arguments.output.with_suffix(".json").write_text(json.dumps(record) + "\n")
    print({name: value for name, value in record.items() if name != "environment"})


if __name__ == "__main__":
    main()
