"""The drafter of `smollm2` into the package, with its card.

    python recipes/smollm2/publish.py runs/smollm2_adapter   # compress, and write the card
    python recipes/smollm2/publish.py                        # the card alone, from newer results

The card takes its figures from `benchmarks/results` and from the run's log, whose evaluations are
kept in `training.json` beside this file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from trimode.checkpoint.compress import compress_adapter

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TARGET = ROOT / "src" / "trimode" / "assets" / "smollm2"
TRAINING = HERE / "training.json"
RANK = 16
VIEWS = ["draft", "denoise"]
"""It was trained to draft; denoising with it is poor, and poorer without it."""


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def publish(run: Path) -> None:
    """Compress the run's best adapter, and keep what its log says of it."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text("utf-8").splitlines()]
    drafted = {row["step"]: row["drafted_tokens"] for row in rows if row["kind"] == "step"}
    evaluations = []
    for row in rows:
        if row["kind"] == "held_out":
            quality = row["report"]["with_adapter"]
            known = max((step for step in drafted if step <= row["step"]), default=0)
            evaluations.append(
                {
                    "step": row["step"],
                    "drafted_tokens": drafted.get(known, 0),
                    "tokens_a_round": quality["skip"]["round_acceptance_length"],
                    "right_by_place": {
                        form: quality[form]["conditional_by_offset"] for form in ("skip", "block")
                    },
                }
            )
    best = max(evaluations, key=lambda one: one["tokens_a_round"])  # which was exported
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "adapter"
        kept = compress_adapter(run / "drafter", made, rank=RANK, dtype=torch.bfloat16)
        view = read(made / "trimode_view.json") | {"views": VIEWS}
        view["acceptance"] = [best["right_by_place"][form] for form in view["draft_forms"]]
        (made / "trimode_view.json").write_text(json.dumps(view, indent=2) + "\n", "utf-8")
        for file in made.iterdir():
            shutil.copyfile(file, TARGET / file.name)
    record = {"kept": kept["kept"], "source_rank": kept["source_rank"], "evaluations": evaluations}
    TRAINING.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


def newest(stem: str) -> Path | None:
    return max(RESULTS.glob(f"{stem}_{'[0-9]' * 6}.md"), default=None)


def card() -> str:
    training = read(TRAINING)
    best = max(training["evaluations"], key=lambda one: one["tokens_a_round"])
    digests = []
    for file in sorted(TARGET.iterdir()):
        if file.name not in ("README.md", "LICENSE"):
            content = file.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            digests.append(f"| `{file.name}` | {len(content):,} | `{digest}` |")
    last: list[dict[str, Any]] = training["evaluations"]
    some = [one for i, one in enumerate(last) if i % max(len(last) // 8, 1) == 0 or one is last[-1]]
    curve = [
        f"| {one['drafted_tokens']:,} | {one['tokens_a_round']:.2f} |"
        f" {' '.join(f'{chance:.2f}' for chance in one['right_by_place']['skip'])} |"
        for one in some
    ]
    tables = {
        name: path.read_text("utf-8").strip() if (path := newest(stem)) is not None else ""
        for name, stem in (("drafting", "drafting_smollm2"), ("speculation", "speculation_smollm2"))
    }
    values = {
        "drafted": f"{best['drafted_tokens'] / 1e6:.1f}M",
        "tokens_a_round": f"{best['tokens_a_round']:.2f}",
        "rank": str(RANK),
        "source_rank": str(training["source_rank"]),
        "kept": f"{100 * training['kept']:.1f}",
        "curve": "\n".join(curve),
        "digests": "\n".join(digests),
        **tables,
    }
    text = (HERE / "card.template.md").read_text("utf-8")
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", value)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", nargs="?", type=Path)
    arguments = parser.parse_args()
    if arguments.run is not None:
        publish(arguments.run)
    (TARGET / "README.md").write_text(card(), "utf-8")


if __name__ == "__main__":
    sys.exit(main())
