"""Draw the held-out prompts that are committed beside the default model.

    python benchmarks/heldout_prompts.py --data data/pocket --output src/trimode/assets/pocket

Prompts are stretches of held-out documents of 64 to 256 tokens, drawn with a fixed seed. Each
starts and ends with a line. Where each came from is kept with it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from trimode.training.shards import TokenShards

NUM_PROMPTS = 50
LENGTHS = (64, 256)


def draw(data: TokenShards, tokenizer: object, *, seed: int) -> list[dict[str, object]]:
    """Prompts of whole lines, each from another document, with their place in the split."""
    rng = np.random.default_rng(seed)
    ends = data.document_ends
    starts = np.concatenate(([0], ends[:-1]))
    records: list[dict[str, object]] = []
    for document in rng.permutation(data.num_documents):
        if len(records) == NUM_PROMPTS:
            break
        begin, end = int(starts[document]) + 1, int(ends[document]) - 1  # without BOS and EOS
        length = int(rng.integers(LENGTHS[0], LENGTHS[1] + 1))
        if end - begin < 2 * LENGTHS[1]:
            continue
        first = int(rng.integers(begin, end - length - LENGTHS[1]))
        text = tokenizer.decode(data.tokens(first, first + length + 32))  # type: ignore[attr-defined]
        lines = text.split("\n")[1:-1]
        prompt = "\n".join(lines) + "\n"
        num_tokens = len(tokenizer(prompt)["input_ids"])  # type: ignore[operator]
        if not LENGTHS[0] <= num_tokens <= LENGTHS[1] or not prompt.strip():
            continue
        records.append(
            {
                "prompt": prompt,
                "num_tokens": num_tokens,
                "document": int(document),
                "first_token": first,
            }
        )
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data/pocket"))
    parser.add_argument("--output", type=Path, default=Path("src/trimode/assets/pocket"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    data = TokenShards.open(arguments.data, "held_out")
    tokenizer = AutoTokenizer.from_pretrained(arguments.data / "tokenizer")
    records = draw(data, tokenizer, seed=arguments.seed)
    path = arguments.output / "heldout_prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    lens = sorted(int(str(record["num_tokens"])) for record in records)
    print(f"{path}: {len(records)} prompts of {lens[0]} to {lens[-1]} tokens")


if __name__ == "__main__":
    main()
