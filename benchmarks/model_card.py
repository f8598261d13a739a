"""Write the default model's card from what its runs, its data and its benchmark recorded.

    python benchmarks/model_card.py

Nothing in the card is typed by hand but its prose; the samples are the first prompts, not picked.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fill_tables import RESULTS, instruct_table, newest, read, views_table

import trimode
from trimode.checkpoint.io import POCKET_MODEL

NUM_SAMPLES = 2
SAMPLE_TOKENS = 64

TEMPLATE = Path(__file__).with_suffix(".template.md")


def stages(configs: list[dict[str, Any]]) -> str:
    """`4,001,792 ar, then 10,002,432 joint (...)`: every stage rounded up to whole steps."""
    parts = []
    for stage in (stage for config in configs for stage in config["stages"]):
        tokens = -(-stage["tokens"] // stage["batch_tokens"]) * stage["batch_tokens"]
        how = (
            f" (alpha {stage['diffusion_weight']}, K {stage['block_lengths'][0]},"
            f" draft_share {stage['draft_share']}"
        )
        if stage.get("infill_share"):
            how += f", infill_share {stage['infill_share']}"
        how += ")"
        parts.append(f"{tokens:,} {stage['name']}{how if stage['diffusion_weight'] else ''}")
    return ", then ".join(parts)


def package_row(package: dict[str, Any]) -> str:
    """One line of the table of packages."""
    names = ("name", "version", "licence", "num_documents", "split")
    return "| " + " | ".join(str(package[name]) for name in names) + " |"


def samples(lm: trimode.TriModeLM) -> str:
    """What the modes write after the first prompts."""
    lines = (POCKET_MODEL / "heldout_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    parts = []
    for line in lines[:NUM_SAMPLES]:
        prompt = json.loads(line)["prompt"]
        end = "\n".join(prompt.splitlines()[-6:])
        parts.append(f"Prompt:\n\n````python\n{end}\n````")
        for mode in ("ar", "diffusion"):
            found = lm.generate(prompt, mode=mode, max_new_tokens=SAMPLE_TOKENS, seed=0)
            assert isinstance(found, trimode.Generation)
            parts.append(f"`{mode}`:\n\n````python\n{found.text}\n````")
    return "\n\n".join(parts)


def main() -> None:
    training = read(RESULTS / "pocket_training.json")
    legs, data = training["legs"], training["data"]
    run, configs = legs[-1], [leg["config"] for leg in legs]
    report = run["evaluations"][-1]["report"]
    benchmark = newest("pocket_cpu").with_suffix(".md").read_text(encoding="utf-8")
    lm = trimode.load("pocket", weights="plain")  # packed weights are no parameters
    shape, num_parameters = lm.model.config, sum(p.numel() for p in lm.model.parameters())
    packages = sorted(data["packages"], key=lambda p: (p["split"] != "train", p["name"]))
    card = TEMPLATE.read_text(encoding="utf-8").format(
        parameters=num_parameters / 1e6,
        num_parameters=num_parameters,
        config="` and `".join(f"configs/{leg['name']}.yaml" for leg in legs),
        export=run["config"]["export"]["dtype"],
        shape=f"{shape.num_hidden_layers} layers, hidden {shape.hidden_size}, MLP"
        f" {shape.intermediate_size}, {shape.num_attention_heads} heads"
        f" ({shape.num_key_value_heads} K/V) of {shape.head_dim}, vocabulary {shape.vocab_size},"
        f" untied, block length {shape.block_size}",
        stages=stages(configs),
        available=data["train"]["num_tokens"],
        hardware=f"{run['environment']['threads']} threads, {run['environment']['device']}",
        hours=sum(leg["seconds"] for leg in legs) / 3600,
        ar_loss=report["ar_loss"],
        diffusion_loss=report["diffusion_loss"],
        last_offset=report["block_length"] - 1,
        agreement=", ".join(f"{value:.2f}" for value in report["agreement_by_offset"]),
        num_documents=data["train"]["num_documents"],
        megabytes=data["train"]["num_bytes"] / 1e6,
        num_held_out=data["held_out"]["num_documents"],
        packages="\n".join(map(package_row, packages)),
        benchmark=benchmark.strip(),
        views=views_table(),
        read=sum(leg["evaluations"][-1]["tokens"] for leg in legs) / 1e6,
        instruct=instruct_table(),
        num_samples=NUM_SAMPLES,
        sample_tokens=SAMPLE_TOKENS,
        samples=samples(lm),
        window=max(stage["sequence_length"] for config in configs for stage in config["stages"]),
    )
    (POCKET_MODEL / "README.md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    main()
