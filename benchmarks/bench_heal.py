"""Token healing measured: held-out files cut at any character, gone on with and without it.

    python benchmarks/bench_heal.py --data data/pocket --output benchmarks/results/heal_cpu_202611

Greedy, mode `linear`. Three kinds of cuts: anywhere, behind a line break that a line with
indentation follows, and in the middle of such an indentation.

* blank: the share of texts that are empty or white space, where the file goes on with more.
* right indentation: the share of texts whose first line stands where the file's does.
* bits per byte: of the next 64 bytes of the file after the prompt. With healing the choice of the
  first tokens is among those that say what was typed, so their probabilities are over these.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path
from typing import Any

import torch
from bench_decode import environment
from transformers import AutoTokenizer

import trimode
from trimode.decoding.bits import unpacked
from trimode.decoding.healing import Healing
from trimode.runtime import TriModeLM
from trimode.training.shards import TokenShards

PROMPT_CHARS = (80, 480)
NEXT_BYTES = 64
NEW_TOKENS = 24
KINDS = {"anywhere": 500, "line break": 120, "half an indentation": 120}


def documents(data: Path) -> list[str]:
    """Held-out files as text."""
    shards = TokenShards.open(data, "held_out")
    tokenizer, ends = AutoTokenizer.from_pretrained(data / "tokenizer"), [*shards.document_ends]
    texts = [
        tokenizer.decode(shards.tokens(first + 1, stop - 1))  # without BOS and EOS
        for first, stop in zip([0, *ends], ends, strict=False)
    ]
    return [text for text in texts if len(text) > 3 * PROMPT_CHARS[1]]


def cut(text: str, kind: str, rng: random.Random) -> tuple[str, str] | None:
    """A prompt and what follows; None where the file has no such place there."""
    at = rng.randrange(PROMPT_CHARS[1], len(text) - 2 * NEXT_BYTES)
    if kind != "anywhere":
        at = text.find("\n ", at) + 1
        indent = len(text[at:]) - len(text[at:].lstrip(" "))
        if not at or indent < 4 or text[at + indent] == "\n":
            return None
        at += indent // 2 if kind == "half an indentation" else 0
    start = text.rfind("\n", 0, at - rng.randrange(*PROMPT_CHARS)) + 1
    following = text[at : at + 4 * NEXT_BYTES]
    return (text[start:at], following) if following.strip() else None


def cases(texts: list[str], rng: random.Random) -> list[tuple[str, str, str]]:
    """Kind, prompt and what follows in the file."""
    found = []
    for kind, number in KINDS.items():
        made: list[tuple[str, str, str]] = []
        while len(made) < number:
            if (case := cut(rng.choice(texts), kind, rng)) is not None:
                made.append((kind, *case))
        found += made
    return found


@torch.inference_mode()
def bits(lm: TriModeLM, prompt: str, following: str, *, heal: bool) -> float:
    """Of the following text after the prompt, whose end is typed already."""
    vocabulary = lm.vocabulary
    assert vocabulary is not None
    encoded = lm.encode_prompt(prompt, heal=heal)
    kept, owed = encoded.token_ids, encoded.healed_bytes
    whole = lm.encode(prompt + following)
    if whole[: len(kept)] == kept and heal:
        rest = whole[len(kept) :]
    else:  # in tokens of its own
        rest = vocabulary.encode((owed + following.encode()).decode())
    ids = torch.tensor([*kept, *rest[:-1]])
    positions = torch.arange(len(ids))
    hidden = lm.model.encode_text(
        *(ids, positions), groups=[0] * len(ids), anchors=positions.tolist()
    )
    logits = lm.model.diffusion_head(hidden[len(kept) - 1 :]).double()
    logits[:, lm.model.config.banned_token_ids] = -torch.inf
    if owed:
        healing = Healing(encoded.taken_ids, vocabulary.token_bytes, num_tokens=logits.shape[-1])
        for number in range(len(rest)):
            allowed = healing.allowed_after(rest[:number])
            if allowed is None:
                break
            logits[number, ~unpacked(allowed, logits.shape[-1])] = -torch.inf
    law = logits.log_softmax(-1)
    return -float(law[torch.arange(len(rest)), torch.tensor(rest)].sum()) / math.log(2)


def indentation(text: str) -> int:
    line = text.partition("\n")[0]
    return len(line) - len(line.lstrip(" ")) if line.strip() else -1


def measure(lm: TriModeLM, plain: TriModeLM, case: tuple[str, str, str], heal: bool) -> Any:
    """What came of one cut, and what of it is right."""
    kind, prompt, following = case
    text = lm.generate(prompt, max_new_tokens=NEW_TOKENS, seed=0, heal=heal).text
    near = following.encode()[:NEXT_BYTES].decode(errors="ignore")
    return {
        "kind": kind,
        "heal": heal,
        "prompt": prompt[-60:],
        "following": near,
        "text": text,
        "is_blank": not text.strip(),
        "is_indented": kind == "anywhere" or indentation(text) == indentation(following),
        "bits": bits(plain, prompt, near, heal=heal),
        "bytes": len(near.encode()),
    }


def table(records: list[dict[str, Any]], about: str) -> str:
    lines = [
        *(about, ""),
        "| cut | prompts | | blank | right indentation | bits per byte |",
        "|---|---|---|---|---|---|",
    ]
    for kind, number in KINDS.items():
        for heal in (False, True):
            own = [one for one in records if (one["kind"], one["heal"]) == (kind, heal)]
            share = f"{sum(one['is_indented'] for one in own) / len(own):.0%}"
            per_byte = sum(one["bits"] for one in own) / sum(one["bytes"] for one in own)
            blank = sum(one["is_blank"] for one in own) / len(own)
            cells = (
                *(kind, str(number), "healed" if heal else "as it is", f"{blank:.1%}"),
                *("-" if kind == "anywhere" else share, f"{per_byte:.3f}"),
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data/pocket"))
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    lm = trimode.load(arguments.model)
    plain = trimode.load(arguments.model, weights="plain", dtype=torch.float32)
    drawn = cases(documents(arguments.data), random.Random(0))
    records = [measure(lm, plain, case, heal) for case in drawn for heal in (False, True)]
    env = environment(arguments)
    about = (
        f"{arguments.model}, held-out files cut at any character, greedy, {NEW_TOKENS} new tokens;"
        f" {env['machine']}, commit {env['commit']}. `{env['command']}`"
    )
    arguments.output.with_suffix(".json").write_text(
        json.dumps({"environment": env, "records": records}) + "\n", encoding="utf-8"
    )
    text = table(records, about)
    arguments.output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
