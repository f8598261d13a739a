"""Run folders as the trainer leaves them, written from numbers: no training needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DRAFTS = {
    "block_length": 4,
    "accuracy_by_offset": [0.31, 0.21, 0.11],
    "agreement_by_offset": [0.61, 0.41, 0.21],
}
STAGES = [
    {"name": "ar", "tokens": 4000, "batch_tokens": 1000, "diffusion_weight": 0.0},
    {"name": "joint", "tokens": 3900, "batch_tokens": 1000, "diffusion_weight": 0.3},
]


def step(number: int, stage: str, **values: float) -> dict[str, Any]:
    """A `step` record."""
    return {
        "kind": "step",
        "stage": stage,
        "step": number,
        "tokens": 1000 * number,
        **values,
        "grad_norm": 1.5,
        "rate_ratio": number / 8,
        "tokens_per_second": 1234.0,
        "seconds": 10.0 * number,
        "eta_s": 10.0 * (8 - number),
    }


def held_out(number: int, **values: Any) -> dict[str, Any]:
    """A `held_out` record."""
    report = {"tokens": 512, **values}
    return {"kind": "held_out", "step": number, "tokens": 1000 * number, "report": report}


def model_records() -> list[dict[str, Any]]:
    """A finished run of 4 steps `ar` and 4 `joint`, evaluated in the middle and at the end."""
    quality = {**DRAFTS, "acceptance_length": 1.5678, "text_acceptance_length": 1.2345}
    return [
        *(step(n, "ar", ar_loss=7.0 - n / 8) for n in range(1, 5)),
        held_out(4, ar_loss=6.7891, diffusion_loss=7.4321, **quality),
        *(step(n, "joint", ar_loss=6.0 - n / 8, diffusion_loss=5.5 - n / 8) for n in range(5, 9)),
        held_out(8, ar_loss=5.6789, diffusion_loss=6.5432, **quality),
    ]


def drafter_records() -> list[dict[str, Any]]:
    """A finished run of a drafter."""
    before = {
        "tokens": 512,
        "round_acceptance_length": 1.2468,
        "acceptance_length": 1.3579,
        "agreement_by_offset": [0.5, 0.3, 0.1],
    }
    after = before | {"round_acceptance_length": 1.8642, "agreement_by_offset": [0.7, 0.5, 0.3]}
    values = {"lk_loss": 0.8, "ce_loss": 2.25, "overlap": 0.4, "acceptance_length": 1.5}
    return [
        *(step(n, "drafter", **values) for n in range(1, 9)),
        held_out(8, block_length=4, without_adapter=before, with_adapter=after),
    ]


def anchor_records() -> list[dict[str, Any]]:
    """A finished run from anchors, of the form `skip`."""

    def quality(length: float, offsets: list[float]) -> dict[str, Any]:
        skip = {
            "round_acceptance_length": length,
            "fused_tokens": length - 1,
            "conditional_by_offset": offsets,
        }
        return {"tokens": 512, "skip": skip, "block": None}

    reports = {
        "without_adapter": quality(2.0123, [0.01, 0.0]),
        "untrained": quality(2.0456, [0.05, 0.1]),
        "with_adapter": quality(2.7891, [0.5, 0.4]),
    }
    steps = [
        step(n, "drafter", loss=5.0 - n / 4, overlap=0.3, drafted_tokens=n * 700)
        for n in range(1, 9)
    ]
    return [*steps, held_out(8, num_masks=2, form="skip", **reports)]


def write_run(
    folder: Path, records: list[dict[str, Any]], *, torn: str = "", **config: Any
) -> Path:
    """A folder with a log, the resolved config (keys of `config` added) and the versions."""
    is_drafter = any(record.get("stage") == "drafter" for record in records)
    drafter_stage = {"name": "drafter", "tokens": 8000, "batch_tokens": 1000}
    saved = {
        "data": "nowhere",
        "output_dir": str(folder),
        "stages": [drafter_stage] if is_drafter else STAGES,
        "drafter": {"rank": 4} if is_drafter else None,
        "optimizer": {"name": "adamw", "learning_rate": 0.004},
        **config,
    }
    folder.mkdir(parents=True, exist_ok=True)
    record = {"config": saved, "environment": {"torch": "9.8.7", "commit": "c0ffee"}}
    (folder / "config.json").write_text(json.dumps(record), encoding="utf-8")
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "log.jsonl").write_text(lines + torn, encoding="utf-8")
    return folder
