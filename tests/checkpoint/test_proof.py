"""The proof fails where it must."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests.checkpoint.made_sources import (
    SHAPE,
    SLOTS,
    YARN,
    MakeTokenizer,
    Source,
    edit_json,
    edit_weights,
    refused,
)
from trimode.checkpoint import convert as convert_module
from trimode.checkpoint import proof
from trimode.checkpoint.convert import convert


def test_positions_beyond_the_original_context_are_proved(source: Source, tmp_path: Path) -> None:
    """A proof within the original context only, where YaRN's query scale does nothing."""
    record = convert(source("ministral3", rope_parameters=YARN), tmp_path / "target")
    probes = {probe["name"]: probe for probe in record["proof"]["probes"]}
    across, end = probes["end of the original context"], probes["end of the context"]
    assert across["first_position"] < 32 < across["first_position"] + len(across["ids"])
    assert end["first_position"] + len(end["ids"]) == 512


def swapped(mapping: dict[str, str]) -> dict[str, str]:
    return {
        name: theirs.replace("gate_proj", "up_proj") if "gate_proj" in theirs
        else theirs.replace("up_proj", "gate_proj")
        for name, theirs in mapping.items()
    }  # fmt: skip


def test_a_wrong_mapping_is_refused(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proof that cannot fail: gate and up have one shape, and only logits tell them apart."""
    folder, right = source("qwen3"), convert_module.map_tensors
    monkeypatch.setattr(convert_module, "map_tensors", lambda *args: swapped(right(*args)))
    message = "does not compute what .* logits of 'random tokens' differ by .*; nothing was written"
    refused(folder, message)


@pytest.mark.parametrize(
    ("name", "value", "probe"),
    [("rope_theta", 1.01e4, "random tokens"), ("llama_4_scaling_beta", 0.0, "end of the context")],
)
def test_wrong_angles_are_refused(
    source: Source, monkeypatch: pytest.MonkeyPatch, name: str, value: float, probe: str
) -> None:
    """Weights in place but positions computed otherwise, perhaps only far from the start."""
    rope = YARN | {"factor": 4.0, "original_max_position_embeddings": 128}
    folder, right = source("ministral3", rope_parameters=rope), convert_module.our_config

    def wrong(*args: Any, **options: Any) -> Any:
        config = right(*args, **options)
        config.rope_parameters[name] = value
        return config

    monkeypatch.setattr(convert_module, "our_config", wrong)
    refused(folder, f"logits of '{probe}' differ")


def test_weights_that_are_not_finite(source: Source) -> None:
    """Two networks that agree on NaN taken for proved."""
    folder = source("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(folder, lambda w: w | {name: torch.full_like(w[name], torch.nan)})
    refused(folder, "differ by nan")


def test_logits_that_overflow(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """An infinite bound, which anything is within."""
    found, right = iter([torch.inf, 0.0]), proof._logits

    def spoiled(*args: Any) -> list[torch.Tensor]:
        value = next(found)
        return [torch.full_like(logits, value) for logits in right(*args)]

    monkeypatch.setattr(proof, "_logits", spoiled)
    refused(source("llama"), "differ by inf, allowed inf")


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"pad_token_id": 320}, "Padding_idx must be within num_embeddings"),
        ("ministral3", {"rope_parameters": SHAPE["rope_parameters"]}, "unsupported operand"),
    ],
)
def test_sources_that_transformers_cannot_compute(
    source: Source, family: str, changes: dict[str, Any], message: str
) -> None:
    """A traceback of transformers for an incomplete configuration."""
    folder = source(family)
    edit_json(folder / "config.json", **changes)
    refused(folder, f"source: transformers does not compute the source: {message}")


def test_a_tokenizer_that_does_not_survive(
    source: Source,
    tokenizer: MakeTokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tokenizer that reads texts otherwise once it was saved."""
    folder, save = (
        source("llama", tokenizer=tokenizer(*SLOTS)),
        PreTrainedTokenizerFast.save_pretrained,
    )

    def spoil(self: PreTrainedTokenizerFast, path: Path) -> None:
        save(self, path)
        edit_json(path / "tokenizer.json", normalizer={"type": "Lowercase"})

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", spoil)
    refused(folder, "the tokenizer does not survive saving: text was")
