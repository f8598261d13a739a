"""Acceptance of drafts: many settings of speculation on one model and drafter, prompt by prompt.

    python benchmarks/bench_drafting.py --model smollm2 --drafter FOLDER --prompts chat,humaneval \\
        --output benchmarks/results/drafting_smollm2_cpu_202611

Every batch of prompts goes through every setting in turn, so a machine that slows down slows them
all; `ar` comes first and is the reference. The text of a prompt does not depend on the batch, so a
larger `--batch` gives the same acceptance sooner; speed at batch 1 needs `--batch 1`. Results are
kept after every batch: the same command goes on where it was stopped, with more prompts or settings
if it asks for more. Writes OUTPUT.json and OUTPUT.md.

A model with a chat template answers each prompt as a user's message; others continue its text.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import humaneval_prompts
import torch
from bench_decode import environment
from drafting_record import (
    REFERENCE,
    Record,
    by_place,
    first_difference,
    margins_line,
    table,
    totals,
)

import trimode
from trimode.checkpoint.adapter import find_adapter
from trimode.checkpoint.model_cache import resolve
from trimode.conversation import answering
from trimode.decoding import Event, Sequence, Stats
from trimode.decoding.noise import gumbel, noise_key
from trimode.errors import TriModeError
from trimode.runtime import MAX_BATCH

Options = dict[str, Any]
Prompts = list[dict[str, str]]

CHAT_PROMPTS = Path(__file__).with_name("chat_prompts.jsonl")
PROMPT_SETS = {
    "chat": lambda: [json.loads(line) for line in CHAT_PROMPTS.read_text("utf-8").splitlines()],
    "humaneval": humaneval_prompts.read,
}


FUSED = ((1, 3, True), (2, 3, True), (2, 4, False), (3, 2, True), (3, 2, False), (4, 1, False))
"""Masks that skip the bonus, groups and whether these may guess it: at most 12 tokens a forward."""


def settings() -> dict[str, Options]:
    """Name -> arguments of `generate`. The reference comes first."""
    found: dict[str, Options] = {REFERENCE: {"mode": "ar"}}
    block: Options = {"draft_form": "block"}
    for length in (2, 3, 4, 6, 8):
        found[f"linear-k{length}"] = {"mode": "linear", "block_length": length} | block
    found["linear-k8-cut0.3"] = found["linear-k8"] | {"draft_cutoff": 0.3}
    found["linear-k8-2passes"] = found["linear-k8"] | {"steps": 2}
    for length, counts in ((2, (2, 3)), (3, (2, 5)), (4, (2, 4, 7)), (6, (4, 8)), (8, (4, 8))):
        for number in counts:
            found[f"branching-k{length}-m{number}"] = {
                **{"mode": "branching", "block_length": length, "branches": number, **block}
            }
    for length in (4, 6):
        found[f"quadratic-k{length}"] = {"mode": "quadratic", "block_length": length} | block
    for length in (4, 6, 8):
        linear = {"mode": "linear", "block_length": length, "draft_form": "block"}
        found[f"linear-k{length}-lookup"] = linear | {"lookup": True}
    for masks in (2, 3, 5):
        found[f"linear-skip{masks}"] = {"mode": "linear", "skip_masks": masks}
    found["linear-skip5-lookup"] = {"mode": "linear", "skip_masks": 5, "lookup": True}
    for masks, number, has_guesses in FUSED:
        name = f"fused-skip{masks}-m{number}" + ("" if has_guesses else "-no-guess")
        found[name] = {
            **{"mode": "branching", "block_length": 8, "skip_masks": masks},
            **{"branches": number, "guesses": has_guesses},
        }
        found[f"{name}-lookup"] = found[name] | {"lookup": True}
    for gain in (0.05, 0.1):
        found[f"gain{gain:g}-lookup"] = {
            **{"mode": "branching", "branches": 4, "guesses": False},
            **{"lookup": True, "min_gain": gain},
        }
    for name, options in found.items():
        if name != REFERENCE:
            options.setdefault("min_gain", 0.0)  # nothing is left out, but where a name says so
    return found


class WatchedStats(Stats):
    """The counts of a sequence, and the most tokens that it fed in one forward of decoding."""

    widest_step = 0

    def count(self, kind: str, num_tokens: int) -> None:
        """Note one forward."""
        super().count(kind, num_tokens)
        if kind != "prefill":
            self.widest_step = max(self.widest_step, num_tokens)


def prepared(
    lm: trimode.TriModeLM, prompt: str, options: Options, rounds: list[tuple[int, int]]
) -> Sequence:
    """A sequence that answers or continues one prompt.

    Args:
        lm: The model.
        prompt: Its text.
        options: Of `generate`.
        rounds: Gets how many drafted tokens each round checks and accepts.
    """

    def watch(_: int, event: Event) -> None:
        if event.kind == "verify":
            rounds.append((len(event.token_ids), event.num_accepted))

    arguments = {"prompt": prompt, **options}
    if has_template(lm):
        arguments = answering(lm.vocabulary, [{"role": "user", "content": prompt}], options)
    seq = lm.prepare(**arguments, on_event=watch)
    seq.stats = WatchedStats()
    return seq


def has_template(lm: trimode.TriModeLM) -> bool:
    return lm.tokenizer is not None and bool(lm.tokenizer.chat_template)


def measure(
    lm: trimode.TriModeLM, prompts: Prompts, options: Options, *, first_seed: int
) -> dict[str, dict[str, Any]]:
    """A batch of prompts under one setting.

    Args:
        lm: The model.
        prompts: At most `MAX_BATCH`.
        options: Of `generate`.
        first_seed: Of the first prompt; the next has the next seed.

    Returns:
        By the prompt's id what it cost; `seconds` is an equal share of those of the batch.
    """
    rounds: list[list[tuple[int, int]]] = [[] for _ in prompts]
    sequences = [
        prepared(lm, one["prompt"], {**options, "seed": first_seed + index}, rounds[index])
        for index, one in enumerate(prompts)
    ]
    engine = lm.engine(sequences)
    started_s = time.perf_counter()
    engine.run()
    seconds = time.perf_counter() - started_s
    found = {}
    for one, seq, seen in zip(prompts, sequences, rounds, strict=True):
        stats = seq.stats
        assert isinstance(stats, WatchedStats)
        if seq.finish_reason == "abort":
            raise RuntimeError(f"prompt {one['id']} with {options} aborted: {seq.abort_reason}")
        found[one["id"]] = {
            "kind": one["kind"],
            "prompt_tokens": len(seq.prompt_ids),
            "new_tokens": len(seq.new_ids),
            "token_ids": seq.new_ids,
            "prompt_ids": seq.prompt_ids,
            "finish_reason": seq.finish_reason,
            "num_rounds": len(stats.acceptance_lengths),
            "forwards": stats.forwards,
            "tokens_fed": stats.tokens_fed,
            "widest_step": stats.widest_step,
            "places": by_place(seen),
            "seconds": seconds / len(prompts),
            "load": os.getloadavg()[0],
        }
    return found


def two_best(
    lm: trimode.TriModeLM, token_ids: list[int], *, temperature: float, seed: int
) -> tuple[int, float]:
    """What the AR view chooses after some tokens, and by how much, in logits.

    The score of a token is its logit plus, above temperature 0, `temperature` times the noise.
    """
    with torch.inference_mode():
        scores = lm.model(torch.tensor([token_ids])).logits[0, -1].double()
        scores[list(lm.model.config.banned_token_ids)] = -torch.inf
        if temperature:
            key = torch.tensor([noise_key(seed, len(token_ids))])
            scores += temperature * gumbel(key, len(scores))[0]
        (best, second), (chosen, _) = (found.tolist() for found in scores.topk(2))
    return int(chosen), best - second


def compare(
    lm: trimode.TriModeLM,
    runs: dict[str, dict[str, Any]],
    reference: dict[str, dict[str, Any]],
    *,
    temperature: float,
    first_seed: int,
) -> None:
    """Note in each run where its text leaves the reference's, and the margin there; drop the ids.

    The reference keeps its ids, since later settings are compared with them.
    """
    for index, (name, run) in enumerate(runs.items()):
        ids, prompt_ids = reference[name]["token_ids"], run.pop("prompt_ids")
        place = first_difference(ids, run["token_ids"])
        run["first_difference"], run["margin"] = place, None
        if place is not None and place < len(ids):
            before = prompt_ids + ids[:place]
            seed = first_seed + index
            run["margin"] = two_best(lm, before, temperature=temperature, seed=seed)[1]
        if run is not reference[name]:
            del run["token_ids"]


def chosen_settings(names: list[str] | None) -> dict[str, Options]:
    """The settings that were asked for, the reference among them; without names, all.

    Raises:
        SystemExit: a name is not in the table.
    """
    every = settings()
    unknown = [name for name in names or () if name not in every]
    if unknown:
        raise SystemExit(f"settings has {unknown[0]!r}; allowed: {', '.join(every)}")
    return {name: every[name] for name in (every if names is None else [REFERENCE, *names])}


def run_all(
    lm: trimode.TriModeLM,
    record: Record,
    *,
    prompt_sets: dict[str, Prompts],
    num_prompts: int | None,
    temperatures: list[float],
    chosen: dict[str, Options],
    max_new_tokens: int,
    batch: int,
    seed: int,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Run what the record lacks.

    Returns:
        Name of prompts and temperature -> setting -> totals over the first `num_prompts`.
    """
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for set_name, prompts in prompt_sets.items():
        digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
        used = prompts[:num_prompts]
        for temperature in temperatures:
            cases = {
                name: record.case(
                    *(set_name, temperature, name),
                    {"options": options, "prompts_sha256": digest},
                )
                for name, options in chosen.items()
            }
            for start in range(0, len(used), batch):
                group = used[start : start + batch]
                for name, options in chosen.items():
                    runs = cases[name]
                    if all(one["id"] in runs for one in group):
                        continue
                    found = measure(
                        lm,
                        group,
                        {**options, "temperature": temperature, "max_new_tokens": max_new_tokens},
                        first_seed=seed + start,
                    )
                    reference = found if name == REFERENCE else cases[REFERENCE]
                    compare(lm, found, reference, temperature=temperature, first_seed=seed + start)
                    record.add(runs, found)
                done = min(start + batch, len(used))
                print(
                    f"{set_name}, temperature {temperature:g}: {done}/{len(used)} prompts",
                    file=sys.stderr,
                )
            summary[f"{set_name}, temperature {temperature:g}"] = {
                name: totals([runs[one["id"]] for one in used]) for name, runs in cases.items()
            }
    return summary


def page(summary: dict[str, dict[str, dict[str, Any]]], about: str) -> str:
    """The Markdown of a record."""
    parts = [about]
    for title, rows in summary.items():
        reference = rows[REFERENCE]
        loads = [load for row in rows.values() for load in row["load"]]
        parts += [
            f"### {title}",
            f"{reference['num_prompts']} prompts, {reference['new_tokens']} tokens of"
            f" `{REFERENCE}`, {reference['num_ended']} texts ended by themselves."
            f" {margins_line(rows)} Load average {min(loads):.1f} to {max(loads):.1f}.",
            table(rows),
        ]
    return "\n\n".join(parts) + "\n"


def about(record: Record, arguments: argparse.Namespace, *, is_chat: bool) -> str:
    """What was run, where, and what the columns mean."""
    env = record.content["sessions"][-1]
    commits = dict.fromkeys(one["commit"] for one in record.content["sessions"])
    form = "as a user's message" if is_chat else "as plain text"
    return (
        f"Model {arguments.model}, drafter {arguments.drafter or 'its own'}, each prompt"
        f" {form}, at most {arguments.max_new_tokens} new tokens, {arguments.batch} prompts at a"
        f" time, seed {arguments.seed} onwards, {env['dtype']}, weights {env['weights']},"
        f" {env['machine']}, {env['threads']} threads. {env['date']}, torch {env['torch']}, trimode"
        f" {env['trimode']}, commit {', '.join(commits)}.\n\n"
        "All figures are ratios of totals over the prompts. Acceptance: emitted tokens but the"
        " prefill's / rounds of drafting and verifying, so accepted drafts plus the bonus token."
        " Fed: tokens that a sequence feeds, the prefill not counted; widest: the most in one"
        " forward. Tokens/s: all of the time, the prefill included."
    )


def identity_of(arguments: argparse.Namespace, *, is_chat: bool) -> dict[str, Any]:
    """What the runs of one record share."""
    folder = resolve(arguments.model)
    found = {
        "model_sha256": weights_sha256(folder),
        "drafter_sha256": None,
        "is_chat": is_chat,
        **{name: getattr(arguments, name) for name in ("max_new_tokens", "batch", "seed")},
        **{"weights": arguments.weights},
    }
    if arguments.drafter is not None:
        drafter = find_adapter(arguments.drafter, checkpoint=folder)
        found["drafter_sha256"] = weights_sha256(drafter)
    return found


def weights_sha256(folder: Path) -> str:
    """Of all safetensors files of a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2", help="a name or a folder")
    parser.add_argument("--drafter", default=None, help="adapter folder, or its name in the model")
    parser.add_argument("--weights", default=None, help="their form, as of trimode.load")
    parser.add_argument("--prompts", default="chat,humaneval", help="of chat, humaneval")
    parser.add_argument("--num-prompts", type=int, default=None, help="first of each; default all")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperatures", default="0,0.7")
    parser.add_argument("--settings", default=None, help="names of the table; default all")
    parser.add_argument("--batch", type=int, default=1, help=f"prompts at a time, 1 to {MAX_BATCH}")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    if not 1 <= arguments.batch <= MAX_BATCH:
        parser.error(f"batch is {arguments.batch}; allowed: 1 to {MAX_BATCH}")
    if arguments.num_prompts is not None and arguments.num_prompts < 1:
        parser.error(f"num-prompts is {arguments.num_prompts}; allowed: at least 1")
    for name in arguments.prompts.split(","):
        if name not in PROMPT_SETS:
            parser.error(f"prompts has {name!r}; allowed: {', '.join(PROMPT_SETS)}")
    return arguments


def main() -> None:
    arguments = parse()
    prompt_sets = {name: PROMPT_SETS[name]() for name in arguments.prompts.split(",")}
    try:
        lm = trimode.load(arguments.model, drafter=arguments.drafter, weights=arguments.weights)
    except TriModeError as error:
        raise SystemExit(str(error)) from error
    is_chat = has_template(lm)
    if not is_chat:
        print("no chat template: each prompt is continued as plain text", file=sys.stderr)
    names = None if arguments.settings is None else arguments.settings.split(",")
    chosen = chosen_settings(names)
    env = environment(arguments)
    env |= {"batch_size": arguments.batch, "load_average": os.getloadavg()}
    env |= {"dtype": str(lm.model.dtype).removeprefix("torch.")}
    env |= {"weights": arguments.weights or "default"}
    path = arguments.output.with_name(arguments.output.name + ".json")
    record = Record(path, identity_of(arguments, is_chat=is_chat), env)
    warm_up = next(iter(prompt_sets.values()))[:1]
    for options in chosen.values():
        measure(lm, warm_up, {**options, "max_new_tokens": 8}, first_seed=0)
    summary = run_all(
        lm,
        record,
        prompt_sets=prompt_sets,
        num_prompts=arguments.num_prompts,
        temperatures=[float(one) for one in arguments.temperatures.split(",")],
        chosen=chosen,
        max_new_tokens=arguments.max_new_tokens,
        batch=arguments.batch,
        seed=arguments.seed,
    )
    record.write(summary=summary)
    text = page(summary, about(record, arguments, is_chat=is_chat))
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
