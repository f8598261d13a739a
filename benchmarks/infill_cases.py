"""Draw held-out functions with a removed line or span, for `bench_infill.py`.

    python benchmarks/infill_cases.py --data data/pocket --output benchmarks/infill_cases.jsonl

Functions of 40 to 250 tokens that parse on their own, dedented, one of a held-out document. Of half
of them a line of the body is removed but for its indentation, of the others 2 to 12 tokens within a
line, of which something is left on either side; no name is cut in two. Fixed seed.
"""

from __future__ import annotations

import argparse
import ast
import json
import textwrap
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from trimode.training.shards import TokenShards

NUM_CASES = 160
FUNCTION_TOKENS = (40, 250)
SPAN_TOKENS = (2, 12)
LINE_TOKENS = (2, 24)


def functions(source: str, tokenizer: Any) -> list[str]:
    """The source's functions that stand on their own and have the right length."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return []
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or len(node.body) < 3:
            continue
        lines = source.split("\n")[node.lineno - 1 : node.end_lineno]
        text = textwrap.dedent("\n".join(lines)) + "\n"
        is_right = FUNCTION_TOKENS[0] <= len(tokenizer(text)["input_ids"]) <= FUNCTION_TOKENS[1]
        if is_right and parses(text):
            found.append(text)
    return found


def parses(text: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True


def removable_lines(text: str) -> list[tuple[int, int]]:
    """Start and end of the statements that are one line, from behind the indentation."""
    starts = np.cumsum([0, *(len(line) + 1 for line in text.split("\n"))])
    spans = []
    for node in ast.walk(ast.parse(text)):
        is_line = isinstance(node, ast.stmt) and node.lineno == node.end_lineno
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_line and not is_text and node.lineno > 1:
            line = text.split("\n")[node.lineno - 1]
            start = int(starts[node.lineno - 1])
            spans.append((start + len(line) - len(line.lstrip()), start + len(line)))
    return sorted(set(spans))


def line_gap(text: str, tokenizer: Any, rng: np.random.Generator) -> tuple[int, int] | None:
    spans = [
        (start, stop)
        for start, stop in removable_lines(text)
        if LINE_TOKENS[0] <= num_tokens(text[start:stop], tokenizer) <= LINE_TOKENS[1]
    ]
    return spans[int(rng.integers(len(spans)))] if spans else None


def span_gap(text: str, tokenizer: Any, rng: np.random.Generator) -> tuple[int, int] | None:
    """A run of tokens inside one line."""
    lines = removable_lines(text)
    rng.shuffle(lines)  # type: ignore[arg-type]
    for line_start, line_stop in lines:
        ids = tokenizer(text[line_start:line_stop], add_special_tokens=False)["input_ids"]
        if len(ids) < SPAN_TOKENS[0] + 2:
            continue
        for _ in range(20):
            length = int(rng.integers(SPAN_TOKENS[0], min(SPAN_TOKENS[1], len(ids) - 2) + 1))
            first = int(rng.integers(1, len(ids) - length))
            pieces = [len(tokenizer.decode(ids[:n])) for n in (first, first + length)]
            start, stop = (int(line_start) + piece for piece in pieces)
            if not (is_in_word(text, start) or is_in_word(text, stop)):
                return start, stop
    return None


def is_in_word(text: str, place: int) -> bool:
    """Whether a cut here would go through a name or number."""
    return all(sign.isalnum() or sign == "_" for sign in text[place - 1 : place + 1])


def num_tokens(text: str, tokenizer: Any) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def draw(data: TokenShards, tokenizer: Any, *, seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    ends = data.document_ends
    starts = np.concatenate(([0], ends[:-1]))
    records: list[dict[str, Any]] = []
    for document in rng.permutation(data.num_documents):
        if len(records) == NUM_CASES:
            break
        source = tokenizer.decode(data.tokens(int(starts[document]) + 1, int(ends[document]) - 1))
        texts = functions(source, tokenizer)
        if not texts:
            continue
        text = texts[int(rng.integers(len(texts)))]
        kind = ("line", "span")[len(records) % 2]
        gap = (line_gap if kind == "line" else span_gap)(text, tokenizer, rng)
        if gap is not None:
            records.append(
                {
                    "kind": kind,
                    "text": text,
                    "start": gap[0],
                    "stop": gap[1],
                    "document": int(document),
                }
            )
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data/pocket"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/infill_cases.jsonl"))
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.data / "tokenizer")
    records = draw(TokenShards.open(arguments.data, "held_out"), tokenizer, seed=0)
    arguments.output.write_text("".join(json.dumps(record) + "\n" for record in records))
    print(f"{len(records)} cases")


if __name__ == "__main__":
    main()
