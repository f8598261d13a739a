"""Quality against forwards: reveal policies and revisions of block diffusion at several settings.

    python benchmarks/bench_reveal.py --output benchmarks/results/reveal_cpu_202611

Greedy; all prompts of a setting run in one batch, and forwards are counted per prompt. `ar` and
`linear` are points of reference. Of every setting:

* forwards per token: all forwards, the prefill included, over the new tokens.
* NLL: what the new tokens cost under the AR view that sees the prompt and all tokens before them,
  in nats a token, at temperature 1 with the mask token banned. Greedy texts repeat themselves, and
  repetition is cheap, so it stands beside the share of 3-grams of new tokens that are distinct.
* valid: the share of prompts whose continuation is Python so far. Prompts are cut out of files, so
  the lines at a prompt's start that have lost their beginning are left out (`context_of`), and so
  are prompts of which no line is left to judge by. What must parse is the rest of the prompt and
  the continuation up to its last complete line; a block, bracket or string that is still open at
  the end is no fault, one that can no longer be closed is.

Writes OUTPUT.json, OUTPUT.md and OUTPUT.png.
"""

from __future__ import annotations

import argparse
import ast
import codeop
import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import torch
from bench_decode import environment
from matplotlib import pyplot

import trimode
from trimode.checkpoint.io import POCKET_MODEL
from trimode.decoding.params import REVISIONS

Options = dict[str, Any]

REFERENCES = ("ar", "linear")

_PARSE_ONLY = ast.PyCF_ONLY_AST | codeop.PyCF_DONT_IMPLY_DEDENT | codeop.PyCF_ALLOW_INCOMPLETE_INPUT


def settings() -> dict[str, tuple[str, Options]]:
    """Name -> the curve that it is a point of, and arguments of `generate`."""
    found: dict[str, tuple[str, Options]] = {name: (name, {"mode": name}) for name in REFERENCES}

    def add(policy: str, name: str, **knobs: Any) -> None:
        found[f"{policy}, {name}"] = (policy, {"mode": "diffusion", "policy": policy, **knobs})

    def revise(curve: str, name: str, **knobs: Any) -> None:
        revision = curve.split()[0]
        found[f"{curve}, {name}"] = (curve, {"mode": "diffusion", "revision": revision, **knobs})

    for threshold in (0.1, 0.2, 0.3, 0.5, 0.7, 0.9):
        add("confidence_threshold", f"threshold {threshold}", threshold=threshold)
    for bound in (0.1, 0.5, 1.0, 2.0, 4.0, 8.0):
        add("entropy_bound", f"bound {bound}", entropy_bound=bound)
    for policy in ("steps", "leftmost", "random"):
        for steps in (1, 2, 3, 4, 7):
            add(policy, f"steps {steps}", steps=steps)
    for threshold in (0.1, 0.2, 0.3, 0.5, 0.7):
        add("ar_weighted", f"threshold {threshold}", threshold=threshold)
    for threshold in (0.1, 0.2, 0.3):
        revise("joint_threshold", f"threshold {threshold}", threshold=threshold)
    for threshold in (0.1, 0.2, 0.3):
        revise("ar_doubt", f"threshold {threshold}", threshold=threshold)
    for schedule, all_steps in {"cap": (4, 7), "conf": (4, 7), "loop": (3, 4)}.items():
        for steps in all_steps:
            knobs = {"steps": steps, "remask_schedule": schedule}
            revise(f"remdm {schedule}", f"steps {steps}", **knobs)
    return found


def syntax_of(source: str) -> str:
    """`complete`, `incomplete` (Python, but something is open at its end) or `invalid`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            ast.parse(source)
        except (SyntaxError, ValueError):
            pass
        else:
            return "complete"
        try:
            compile(source, "<text>", "exec", flags=_PARSE_ONLY, dont_inherit=True)
        except (SyntaxError, ValueError) as error:
            return "incomplete" if "incomplete input" in str(error) else "invalid"
    return "incomplete"


def with_outer_blocks(lines: list[str]) -> str:
    """Lines that begin inside blocks, with an outer block put around each level they return to."""
    indents = [len(line) - len(line.lstrip(" ")) for line in lines if line.strip()]
    first = indents[0] if indents else 0
    levels = sorted({0, *indents} & set(range(first)))
    return "".join(f"{' ' * level}if 1:\n" for level in levels) + "\n".join(lines) + "\n"


def context_of(prompt: str) -> list[str] | None:
    """The prompt without the lines at its start that no longer parse; None if nothing is left.

    A rest that ends in an open triple-quoted string does not count: cut inside a docstring, its
    closing quotes would be taken for opening ones, and anything may follow them.
    """
    lines = prompt.removesuffix("\n").split("\n")
    for start, line in enumerate(lines):
        if not line.strip():
            continue
        rest = with_outer_blocks(lines[start:])
        found = syntax_of(rest)
        is_in_string = any(
            syntax_of(f"{rest}{quotes}\n") == "complete" for quotes in ('"""', "'''")
        )
        if found == "complete" or (found == "incomplete" and not is_in_string):
            return lines[start:]
    return None


def is_valid(context: list[str], text: str) -> bool:
    """Whether a continuation up to its last complete line is Python so far."""
    return syntax_of(with_outer_blocks([*context, *text.split("\n")[:-1]])) != "invalid"


@torch.inference_mode()
def nats(lm: trimode.TriModeLM, prompt_ids: list[int], new_ids: list[int]) -> float:
    """Negative log-likelihood of all new tokens under the AR view."""
    config = lm.model.config
    logits = lm.model(torch.tensor([prompt_ids + new_ids])).logits[0, len(prompt_ids) - 1 : -1]
    logits[:, config.banned_token_ids] = -torch.inf
    logits = logits.double().log_softmax(dim=-1)
    return -float(logits.gather(-1, torch.tensor(new_ids)[:, None]).sum())


def measure(
    lm: trimode.TriModeLM, prompts: list[str], options: Options, *, new_tokens: int
) -> list[dict[str, Any]]:
    """Every prompt under one setting, in one batch."""
    made = lm.generate(prompts, max_new_tokens=new_tokens, seed=0, ignore_eos=True, **options)
    assert isinstance(made, list)
    runs = []
    for prompt, one in zip(prompts, made, strict=True):
        context = context_of(prompt)
        runs.append(
            {
                "token_ids": one.token_ids,
                "forwards": {kind: n for kind, n in one.stats.forwards.items() if n},
                "nats": nats(lm, one.prompt_ids, one.token_ids),
                "is_valid": None if context is None else is_valid(context, one.text),
            }
        )
    return runs


def summarise(name: str, curve: str, runs: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Totals of one setting over all prompts."""
    tokens = sum(len(run["token_ids"]) for run in runs)
    judged = [run["is_valid"] for run in runs if run["is_valid"] is not None]
    trigrams = [
        list(zip(ids, ids[1:], ids[2:], strict=False)) for ids in (run["token_ids"] for run in runs)
    ]
    return {
        "name": name,
        "curve": curve,
        "forwards_per_token": sum(sum(run["forwards"].values()) for run in runs) / tokens,
        "nll": sum(run["nats"] for run in runs) / tokens,
        "num_valid": sum(judged),
        "num_judged": len(judged),
        "distinct": sum(len(set(t)) for t in trigrams) / sum(map(len, trigrams)),
        "seconds": seconds,
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| | forwards per token | tokens per forward | NLL, nats per token | valid | distinct"
        " 3-grams |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["name"], f"{row['forwards_per_token']:.2f}"]
        cells += [f"{1 / row['forwards_per_token']:.2f}", f"{row['nll']:.2f}"]
        cells += [f"{row['num_valid']} of {row['num_judged']}", f"{100 * row['distinct']:.0f} %"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """NLL and valid share over forwards per token, a line for each policy, dashed for revisions."""
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 4.2), layout="constrained")
    colours = pyplot.get_cmap("tab20").colors
    for number, curve in enumerate(dict.fromkeys(row["curve"] for row in rows)):
        points = sorted(
            (row["forwards_per_token"], row["nll"], 100 * row["num_valid"] / row["num_judged"])
            for row in rows
            if row["curve"] == curve
        )
        style = {"linestyle": "", "marker": "*", "markersize": 13, "zorder": 3}
        if curve not in REFERENCES:
            is_revision = curve.split()[0] in REVISIONS
            style = {"marker": "o", "markersize": 4, "linestyle": "--" if is_revision else "-"}
        style["color"] = colours[number % len(colours)]
        for axis, column in zip(axes, (1, 2), strict=True):
            axis.plot([p[0] for p in points], [p[column] for p in points], label=curve, **style)
    axes[0].set_ylabel("NLL under the AR view, nats per token")
    axes[1].set_ylabel("continuations that are Python so far, %")
    for axis in axes:
        axis.set_xlabel("forwards per token")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--prompts", type=Path, default=POCKET_MODEL / "heldout_prompts.jsonl")
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    logging.getLogger("trimode").setLevel(logging.ERROR)  # the slowest settings are meant
    lm = trimode.load(arguments.model, dtype="float32")
    lines = arguments.prompts.read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines[: arguments.num_prompts]]
    runs: dict[str, list[dict[str, Any]]] = {}
    rows = []
    for name, (curve, options) in settings().items():
        started_s = time.perf_counter()
        runs[name] = measure(lm, prompts, options, new_tokens=arguments.new_tokens)
        rows.append(summarise(name, curve, runs[name], time.perf_counter() - started_s))
    env = environment(arguments)
    text = (
        f"Greedy, float32, {env['machine']}, {env['threads']} threads, {len(prompts)} held-out"
        f" prompts in one batch, {arguments.new_tokens} new tokens each, block length"
        f" {lm.model.config.block_size}, no drafter. {env['date']}, torch {env['torch']}, commit"
        f" {env['commit']}. What the columns mean: `benchmarks/bench_reveal.py`; curves:"
        f" `{arguments.output.with_suffix('.png').name}`.\n\n{table(rows)}\n"
    )
    env["batch_size"] = len(prompts)
    record = {"environment": env, "summary": rows, "runs": runs}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_suffix(".json").write_text(json.dumps(record) + "\n")
    arguments.output.with_suffix(".md").write_text(text)
    draw(rows, arguments.output.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
