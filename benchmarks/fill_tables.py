"""Put measured tables into the pages that show them, so that no number is typed by hand.

    python benchmarks/fill_tables.py

A page marks a place by `<!-- table: NAME -->` and `<!-- end of table -->`; what is between them is
replaced by what the files in `benchmarks/results` say. The names are those of `TABLES`.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = tuple(
    ROOT / name for name in ("README.md", "docs/training.md", "docs/modes.md", "docs/serving.md")
)

_PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def newest(stem: str) -> Path:
    """The newest result of a kind, by the month in its name."""
    return max(RESULTS.glob(f"{stem}_*.json"))


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def speculation_table() -> str:
    """What speculation brings on the model that people meet first; a line for each precision."""
    path = newest("speculation_smollm2")
    found = read(path)
    env = found["environment"]
    lines = [
        f"SmolLM2-135M-Instruct, {env['machine']}, {env['threads']} threads, one request at a time,"
        f" greedy, at most {env['arguments']['max_new_tokens']} new tokens, all contestants in"
        " turn, `linear` and `branching` with `lookup` and `min_gain` (their other arguments, all"
        f" contestants, intervals, command: `benchmarks/results/{path.stem}.md`):",
        "",
        "| | llama.cpp | `ar` | `linear` | `branching` | `auto` | `auto` over `ar` |"
        " best over `ar` | best over llama.cpp |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    num_texts = num_equal = 0
    for part in found["parts"]:
        if part["temperature"]:
            continue
        runs = part["runs"]
        speeds = {
            name: sum(run[name]["num_tokens"] for run in runs)
            / sum(run[name]["seconds"] for run in runs)
            for name in runs[0]
        }
        best = max(speeds, key=lambda name: speeds[name])
        others = [speeds.get("llama.cpp"), speeds["ar"], speeds["linear"]]
        others += [max(v for n, v in speeds.items() if n.startswith("branching")), speeds["auto"]]
        cells = ["-" if speed is None else f"{speed:.0f}" for speed in others]
        cells.append(f"{speeds['auto'] / speeds['ar']:.2f}")
        for other in ("ar", "llama.cpp"):
            cells.append(f"{speeds[best] / speeds[other]:.2f}" if other in speeds else "-")
        lines.append(f"| {part['form']}, {part['prompts']} | {' | '.join(cells)} |")
        for name in (name for name in runs[0] if name not in ("ar", "llama.cpp")):
            num_texts += len(runs)
            num_equal += sum(run[name]["is_equal"] for run in runs)
    return "\n".join([*lines, "", f"Texts equal to those of `ar`: {num_equal} of {num_texts}."])


def all_speculation_table() -> str:
    return newest("speculation_smollm2").with_suffix(".md").read_text(encoding="utf-8").strip()


def branching_table() -> str:
    """Some of the family of speculation: both ends of the published one, and what beats them."""
    rows = {row["name"]: row for row in read(newest("branching_cpu"))["summary"]}
    shown = ("ar", "linear, K 3", "linear, K 4", "linear, K 8", "quadratic, K 2", "quadratic, K 4")
    shown += ("quadratic, K 8", "branching, K 2, m 1", "branching, K 2, m 2")
    shown += ("branching, K 4, m 2", "branching, K 4, m 4")
    shown += ("branching, K 4, m 7", "branching, K 8, m 4", "branching, K 8, m 8")
    lines = [
        "| | TPF total | rounds of one forward | fed/new | tokens/s over ar |",
        "|---|---|---|---|---|",
    ]
    for row in (rows[name] for name in shown):
        free = "-" if row["free_drafts"] is None else f"{100 * row['free_drafts']:.0f} %"
        lines.append(
            f"| {row['name']} | {row['tpf_total']:.2f} | {free} |"
            f" {row['tokens_fed_per_new_token']:.1f} | {row['speed_over_ar']:.2f}x |"
        )
    return "\n".join(lines)


def revise_table() -> str:
    """What revising finds, puts right, and changes without need."""
    return newest("revise_cpu").with_suffix(".md").read_text(encoding="utf-8").strip()


def reveal_table() -> str:
    """Some points of the curve: references, policies and revisions where they compare."""
    shown = ("ar", "linear", "confidence_threshold, threshold 0.3")
    shown += ("confidence_threshold, threshold 0.5", "entropy_bound, bound 0.5", "steps, steps 4")
    shown += ("leftmost, steps 4", "random, steps 4", "ar_weighted, threshold 0.5")
    shown += ("joint_threshold, threshold 0.3", "ar_doubt, threshold 0.2")
    shown += ("remdm cap, steps 4", "remdm conf, steps 4", "remdm loop, steps 4")
    lines = [
        "| | forwards per token | NLL, nats per token | valid | distinct 3-grams |",
        "|---|---|---|---|---|",
    ]
    rows = {row["name"]: row for row in read(newest("reveal_cpu"))["summary"]}
    for row in (rows[name] for name in shown):
        lines.append(
            f"| {row['name']} | {row['forwards_per_token']:.2f} | {row['nll']:.2f} |"
            f" {row['num_valid']} of {row['num_judged']} | {100 * row['distinct']:.0f} % |"
        )
    return "\n".join(lines)


def infill_table() -> str:
    """Gaps filled, beside writing from left to right."""
    return newest("infill_cpu").with_suffix(".md").read_text(encoding="utf-8").strip()


def heal_table() -> str:
    """Prompts cut anywhere, gone on with and without healing."""
    paths = [newest("heal_cpu"), *sorted(RESULTS.glob("heal_smollm2_*.json"))[-1:]]
    texts = [path.with_suffix(".md").read_text(encoding="utf-8").strip() for path in paths]
    return "\n\n".join(texts)


def _twelve_over_one(found: dict[str, Any]) -> str:
    seconds = found["seconds"]
    return f"{seconds['step native 12'] / seconds['step native 1']:.2f}x"


def speed_table() -> str:
    """Tokens a second of AR by model, precision and engine; steps of 12 tokens over one."""
    path = newest("speed_cpu")
    found = read(path)
    models = found["models"]
    lines = ["| AR tokens/s | " + " | ".join(models) + " |", "|---" * (len(models) + 1) + "|"]
    contestants = [
        (form, who)
        for form in ("float32", "bfloat16", "int8")
        for who in ("native", "llama.cpp", "torch", "transformers")
        if form != "int8" or who in ("native", "llama.cpp")
    ]

    def row(name: str, figure: Callable[[dict[str, Any]], str], form: str) -> str:
        cells = [figure(forms[form]) if form in forms else "-" for forms in models.values()]
        return f"| {name} | " + " | ".join(cells) + " |"

    for form, who in contestants:
        if any(
            f"ar {who}" in forms.get(form, {"seconds": {}})["seconds"] for forms in models.values()
        ):
            lines.append(
                row(
                    f"{form}, {who}",
                    lambda found: f"{1 / found['seconds'][f'ar {who}']:.0f}",  # noqa: B023
                    form,
                )
            )
    for form in ("float32", "bfloat16", "int8"):
        name = f"{form}, native: a step of 12 tokens over one of 1"
        lines.append(row(name, _twelve_over_one, form))
        name = f"{form}, native: share of what the memory gives at that moment"
        lines.append(row(name, lambda found: f"{statistics.median(found['shares']):.2f}", form))
    env = found["environment"]
    lines += [
        "",
        f"{env['machine']}, {env['threads']} threads, batch 1"
        f" (`benchmarks/results/{path.stem}.md`).",
    ]
    for name, forms in found["quality"].items():
        nats = ", ".join(f"{who} {one['nats']:.4f}" for who, one in forms.items())
        lines.append(f"Held-out nats a token of {name}: {nats}.")
    return "\n".join(lines)


def views_table() -> str:
    """What each part of training did to both views."""
    training = read(RESULTS / "pocket_training.json")
    lines = [
        "| after | tokens | AR loss | diffusion loss | acceptance length, on the text |",
        "|---|---|---|---|---|",
    ]
    before = 0
    for leg in training["legs"]:
        tokens = 0
        for stage in leg["config"]["stages"]:
            tokens += -(-stage["tokens"] // stage["batch_tokens"]) * stage["batch_tokens"]
            found = min(leg["evaluations"], key=lambda one: abs(one["tokens"] - tokens))
            title = f"`{leg['name']}`, stage `{stage['name']}`"
            lines.append(_loss_row(title, {**found, "tokens": before + found["tokens"]}))
        before += tokens
    if training["control"] is not None:
        lines.append(_loss_row("AR alone, as many tokens", training["control"]["evaluations"][-1]))
    rows = {row["name"]: row for row in read(newest("pocket_cpu"))["summary"]}
    best = max(
        (one["report"] for one in training["drafter"]["evaluations"]),
        key=lambda report: report["with_adapter"]["round_acceptance_length"],
    )
    lines += [
        "",
        "| drafts by | acceptance length, held-out rounds | the same, decoding | TPF total |",
        "|---|---|---|---|",
    ]
    for title, key, name in (
        ("the diffusion view", "without_adapter", "linear"),
        ("the same with the drafter", "with_adapter", "linear, drafter"),
    ):
        lines.append(
            f"| {title} | {best[key]['round_acceptance_length']:.2f} |"
            f" {rows[name]['acceptance_length']:.2f} | {rows[name]['tpf_total']:.2f} |"
        )
    return "\n".join(lines)


def instruct_table() -> str:
    """The tuned model beside its base."""
    return newest("instruct_cpu").with_suffix(".md").read_text(encoding="utf-8").strip()


def auto_table() -> str:
    """`auto` beside fixed settings, at fixed and at changing concurrency."""
    return newest("auto_cpu").with_suffix(".md").read_text(encoding="utf-8").strip()


def serve_table() -> str:
    """Throughput over concurrency and latencies under load, beside `transformers serve`."""
    return newest("serve_cpu").with_suffix(".md").read_text(encoding="utf-8").strip()


def serve_smollm2_table() -> str:
    """The same of SmolLM2 with its adapter, beside llama-cpp-python's server as well."""
    return newest("serve_smollm2").with_suffix(".md").read_text(encoding="utf-8").strip()


def train_table() -> str:
    """The training step beside a plain one."""
    return newest("train_cpu").with_suffix(".md").read_text(encoding="utf-8").strip()


TABLES: dict[str, Callable[[], str]] = {
    "speculation": speculation_table,
    "all_speculation": all_speculation_table,
    "branching": branching_table,
    "revise": revise_table,
    "reveal": reveal_table,
    "infill": infill_table,
    "heal": heal_table,
    "speed": speed_table,
    "views": views_table,
    "instruct": instruct_table,
    "auto": auto_table,
    "serve": serve_table,
    "serve_smollm2": serve_smollm2_table,
    "train": train_table,
}


def filled(text: str) -> str:
    """A page with its tables as the results say."""
    return _PLACE.sub(lambda place: f"{place[1]}{TABLES[place[2]]()}\n{place[3]}", text)


def _loss_row(name: str, evaluation: dict[str, Any]) -> str:
    report = evaluation["report"]
    return (
        f"| {name} | {evaluation['tokens'] / 1e6:.1f}M | {report['ar_loss']:.2f} |"
        f" {report['diffusion_loss']:.2f} | {report['acceptance_length']:.2f} |"
    )


def main() -> None:
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
