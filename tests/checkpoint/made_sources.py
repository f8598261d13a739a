"""Random checkpoints of other families to convert, and ways to spoil them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from trimode.checkpoint.convert import convert
from trimode.checkpoint.io import load_model
from trimode.errors import CheckpointError
from trimode.model import TriModeModel

Source = Callable[..., Path]
"""The fixture `source`: `make_source` into a folder of the test's own."""

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]
"""The fixture `tokenizer`."""

FAMILIES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "ministral3": "Ministral3",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
}

SHAPE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "rms_norm_eps": 3e-5,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e3},
}

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 16.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

VISION = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 16,
    "patch_size": 4,
    "image_size": 16,
}


SLOTS = ("<SPECIAL_99>", "<SPECIAL_100>")
LLAMA_SLOTS = tuple(f"<|reserved_special_token_{i}|>" for i in range(4))


def make_source(
    folder: Path,
    family: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """A random checkpoint of a family, with `SHAPE` where `overrides` say nothing else."""
    values = SHAPE | overrides
    if family == "mistral3":
        tied = values.get("tie_word_embeddings", False)
        config = transformers.Mistral3Config(
            text_config=values | {"model_type": "ministral3", "head_dim": 32},
            vision_config=VISION,
            tie_word_embeddings=tied,
        )
        model_class: Any = transformers.Mistral3ForConditionalGeneration
    else:
        config = getattr(transformers, f"{FAMILIES[family]}Config")(**values)
        model_class = getattr(transformers, f"{FAMILIES[family]}ForCausalLM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:  # zeros and ones would hide a mistake
                torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def their_logits(folder: Path, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[T, V]: what transformers makes of the source, independent of the command's own proof."""
    is_vision = json.loads((folder / "config.json").read_text())["model_type"] == "mistral3"
    auto = "AutoModelForImageTextToText" if is_vision else "AutoModelForCausalLM"
    model = getattr(transformers, auto).from_pretrained(folder, dtype=dtype).float()
    with torch.no_grad():
        return model(ids[None]).logits[0]


def opened(folder: Path) -> TriModeModel:
    return load_model(folder, device="cpu", dtype=torch.float32).requires_grad_(False)


def refused(folder: Path, message: str, *, error: type = CheckpointError, **options: Any) -> None:
    """The source in `folder` is refused in one line that matches, and nothing is left behind."""
    target = folder.parent / "target"
    before = sorted(folder.parent.iterdir())
    with pytest.raises(error, match=message) as caught:
        convert(folder, target, **options)
    assert "\n" not in str(caught.value)
    assert sorted(folder.parent.iterdir()) == before
