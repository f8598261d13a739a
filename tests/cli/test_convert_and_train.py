"""From a checkpoint of another family to tri-mode text: convert, prepare, train, generate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from trimode.cli.main import main

Capture = pytest.CaptureFixture[str]

WORDS = "one two three four five six seven eight nine ten".split()
BLOCK_LENGTH = 4
NUM_STEPS = 200


def counting(first: int, num_words: int) -> str:
    """Counts in a circle: nothing but the word before tells what is next."""
    return " ".join(WORDS[(first + i) % len(WORDS)] for i in range(num_words)) + " "


@pytest.fixture
def qwen(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random small Qwen3 with a tied head: 258 tokens in 288 rows, and no mask token."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=288,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=256,
            eos_token_id=257,
        )
        Qwen3ForCausalLM(config).save_pretrained(tmp_path / "qwen")
    content = json.loads(byte_tokenizer.backend_tokenizer.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "<|mask|>"]
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(tmp_path / "qwen")
    return tmp_path / "qwen"


def write_yaml(path: Path, **content: Any) -> str:
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)


def prepare_config(folder: Path, tokenizer: Path) -> str:
    lines = [json.dumps({"text": counting(i, 60 + i)}) for i in range(40)]
    (folder / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return write_yaml(
        folder / "data.yaml",
        output_dir=str(folder / "data"),
        jsonl=[str(folder / "texts.jsonl")],
        tokenizer=str(tokenizer),
        near_duplicate_threshold=1.0,  # they are alike on purpose
        max_held_out_overlap=1.0,
        held_out_share=0.2,
    )


def train_config(folder: Path, init: Path) -> str:
    batch = {"sequence_length": 64, "batch_tokens": 512, "micro_batch_sequences": 8}
    stage = {**batch, "tokens": 512 * NUM_STEPS // 2, "block_lengths": [BLOCK_LENGTH]}
    return write_yaml(
        folder / "train.yaml",
        data=str(folder / "data"),
        output_dir=str(folder / "run"),
        model={"init": str(init)},
        stages=[
            {"name": "ar", **stage, "diffusion_weight": 0.0},
            {"name": "joint", **stage, "draft_share": 0.5},
        ],
        optimizer={"learning_rate": 1e-2},
        evaluation={"tokens": 1024, "every_steps": 0},
        precision="fp32",
        device="cpu",
        log_every_steps=5,
    )


def test_another_family_learns_to_decode_in_three_modes(qwen: Path, capsys: Capture) -> None:
    """Commands that work alone but not on what the command before has written."""
    folder, converted, final = qwen.parent, qwen.parent / "tri", qwen.parent / "run" / "final"
    convert = ["convert", str(qwen), str(converted), "--block-length", str(BLOCK_LENGTH)]
    assert main(convert) == 0
    assert main(["prepare", prepare_config(folder, converted)]) == 0
    assert main(["train", train_config(folder, converted), "--no-report"]) == 0

    log = (folder / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [record for record in map(json.loads, log) if record["kind"] == "step"]
    assert steps[-1]["step"] == NUM_STEPS
    ar_losses = [step["ar_loss"] for step in steps]
    diffusion_losses = [step["diffusion_loss"] for step in steps if step["stage"] == "joint"]
    assert ar_losses[0] > 3
    assert ar_losses[-1] < 0.2
    assert diffusion_losses[0] > 2
    assert diffusion_losses[-1] < 0.6

    for written in (converted, final):  # QK-norm and padded rows: the published type has neither
        config = json.loads((written / "config.json").read_text(encoding="utf-8"))
        assert config["model_type"] == "trimode"
        assert config["use_qk_norm"]
        assert (config["mask_token_id"], config["num_valid_tokens"]) == (258, 259)

    capsys.readouterr()
    found = {}
    for mode in ("ar", "linear", "diffusion"):
        words = ["generate", counting(2, 3), "--model", str(final), "--mode", mode, "--json"]
        assert main([*words, "--max-new-tokens", "40"]) == 0
        found[mode] = json.loads(capsys.readouterr().out)
        assert found[mode]["text"] == counting(5, 12)[:40]
    assert found["linear"]["token_ids"] == found["ar"]["token_ids"]
    assert found["linear"]["block_length"] == BLOCK_LENGTH
    for mode in ("linear", "diffusion"):  # what the joint stage is for
        assert found[mode]["forwards"]["total"] < 0.75 * found["ar"]["forwards"]["total"]
