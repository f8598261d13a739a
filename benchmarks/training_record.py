"""Keep what is worth keeping of the default model's runs: their logs are not committed.

    python benchmarks/training_record.py --run runs/pocket_cpu runs/pocket_infill \\
        --data data/pocket --drafter runs/pocket_drafter --instruct runs/pocket_instruct

Writes benchmarks/results/pocket_training.json: of each run its config, its environment, the time it
took and its held-out evaluations; of the data counts, packages and licences. The card and the
tables are made from it (`make results`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

OUTPUT = Path(__file__).parent / "results" / "pocket_training.json"


def run_record(folder: Path) -> dict[str, Any]:
    """A finished run without its steps."""
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    steps = [row for row in rows if row["kind"] == "step"]
    record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {
        "name": folder.name,
        "config": record["config"],
        "environment": record["environment"],
        "seconds": steps[-1]["seconds"],
        "evaluations": [
            {key: row[key] for key in ("step", "tokens", "report")}
            for row in rows
            if row["kind"] == "held_out"
        ],
    }


def data_record(folder: Path) -> dict[str, Any]:
    """Counts of the splits and the packages they came from."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    counts = ("num_tokens", "num_documents", "num_bytes")
    splits = {
        split: {key: manifest[split][key] for key in counts} for split in ("train", "held_out")
    }
    return {**splits, "packages": manifest["packages"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--run", type=Path, nargs="+", required=True, help="the model's legs, each from the last"
    )
    parser.add_argument("--data", type=Path, default=Path("data/pocket"))
    parser.add_argument("--drafter", type=Path, required=True)
    parser.add_argument("--instruct", type=Path, required=True)
    parser.add_argument("--control", type=Path, help="the same tokens, all for the AR view")
    arguments = parser.parse_args()
    record = {
        "legs": [run_record(folder) for folder in arguments.run],
        "data": data_record(arguments.data),
        "drafter": run_record(arguments.drafter),
        "instruct": run_record(arguments.instruct),
        "control": run_record(arguments.control) if arguments.control else None,
    }
    OUTPUT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(OUTPUT)


if __name__ == "__main__":
    main()
