"""Adapters trained from anchors, side by side: what each run's held-out evaluations said.

    python benchmarks/adapter_runs.py runs/ablation_* --output benchmarks/results/NAME

Writes NAME.md and NAME.json. Configs and evaluations are the runs' own; nothing is run. A curve of
one run is the table of its evaluations (`--curve`).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from training_record import run_record

FORMS = ("skip", "block")


def record_of(folder: Path) -> dict[str, Any]:
    """A run, with the drafted tokens seen at each evaluation."""
    found = run_record(folder)
    at_step = {0: 0}
    for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["kind"] == "step":
            at_step[row["step"]] = row["drafted_tokens"]
    for one in found["evaluations"]:
        known = [step for step in at_step if step <= one["step"]]
        one["drafted_tokens"] = at_step[max(known)]
    return found


def changed(config: dict[str, Any], base: dict[str, Any], prefix: str = "") -> list[str]:
    """Keys of a config that differ from another's, folder and data apart."""
    found = []
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            found += changed(value, base[key], f"{name}.")
        elif name not in ("output_dir", "data") and value != base.get(key):
            found.append(f"{name}={json.dumps(value)}")
    return found


def cells(evaluation: dict[str, Any]) -> list[list[str]]:
    """A row for every form that was measured."""
    rows = []
    for form in FORMS:
        after = evaluation["report"]["with_adapter"][form]
        if after is None:
            continue
        places = " ".join(f"{x:.2f}" for x in after["conditional_by_offset"])
        recall = " ".join(f"{x:.2f}" for x in after["recall_by_offset"])
        tokens = f"{after['round_acceptance_length']:.3f}"
        rows.append([form, tokens, f"{after['fused_tokens']:.3f}", places, recall])
    return rows


def as_page(runs: list[dict[str, Any]], *, is_curve: bool) -> str:
    """Tables in Markdown."""
    first = runs[0]
    untrained = first["evaluations"][-1]["report"]["untrained"]
    environment = json.dumps(first["environment"])
    lines = [
        f"`python {' '.join(['benchmarks/adapter_runs.py', *sys.argv[1:]])}`",
        "",
        f"Environment of `{first['name']}`: {environment}",
        "",
        "Tokens a round: two forwards of `linear`, walked over held-out greedy answers. Fused:"
        " tokens a forward where each verifies and every outcome has its group. By place, from"
        " place 2 on: share right if all before are, and share whose token is among the 8"
        " likeliest. Untrained:"
        + "; ".join(
            f" {form} {untrained[form]['round_acceptance_length']:.3f}"
            for form in FORMS
            if untrained[form] is not None
        )
        + ".",
        "",
        "| run | changed | drafted tokens | form | tokens a round | fused | right | recall |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        what = ", ".join(changed(run["config"], first["config"])) or "-"
        for evaluation in run["evaluations"] if is_curve else run["evaluations"][-1:]:
            drafted = f"{evaluation['drafted_tokens']:,}"
            for row in cells(evaluation):
                lines.append("| " + " | ".join([run["name"], what, drafted, *row]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "runs", type=Path, nargs="+", help="the first is what others are compared to"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="PREFIX")
    parser.add_argument("--curve", action="store_true", help="all evaluations, not the last ones")
    arguments = parser.parse_args()
    runs = [record_of(folder) for folder in arguments.runs]
    page = as_page(runs, is_curve=arguments.curve)
    arguments.output.with_suffix(".md").write_text(page, encoding="utf-8")
    text = json.dumps(runs, indent=1) + "\n"
    arguments.output.with_suffix(".json").write_text(text, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
