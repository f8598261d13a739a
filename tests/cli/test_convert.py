"""`trimode convert` at the terminal, and decoding what it wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from trimode.cli.main import main

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def qwen(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random Qwen3 of bytes: 259 tokens in 288 rows, tied."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=288,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=256,
            initializer_range=0.4,
            tie_word_embeddings=True,
            bos_token_id=256,
            eos_token_id=257,
        )
        Qwen3ForCausalLM(config).save_pretrained(tmp_path / "qwen")
    byte_tokenizer.save_pretrained(tmp_path / "qwen")
    return tmp_path / "qwen"


def test_convert_then_generate_in_three_modes(qwen: Path, capsys: Capture) -> None:
    """A result that is proved but that no mode can decode."""
    target = qwen.parent / "tri"
    capsys.readouterr()
    assert main(["convert", str(qwen), str(target), "--block-length", "8"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == f"wrote       {target}"
    assert lines[1].startswith("model       qwen3 as trimode, ")
    assert lines[2] == "vocabulary  288 rows, 0 of them new; tokens are the first 259"
    assert lines[3] == "head        tied to the embedding"
    assert lines[4] == "mask token  <|mask|>, id 258 (the tokenizer's own)"
    assert lines[6].startswith("proof       logits differ by ")
    name = "layers.*.input_layernorm.weight"
    assert f"model.{name} -> encoder.{name} [64] float32 x2\n" in err
    assert "model.embed_tokens.weight -> encoder.embed_tokens.weight [288, 64] float32\n" in err
    found = {}
    for mode in ("ar", "diffusion", "linear"):
        words = ["generate", "def f(x):", "--model", str(target), "--mode", mode, "--json"]
        assert main([*words, "--max-new-tokens", "20", "--seed", "1", "--ignore-eos"]) == 0
        found[mode] = json.loads(capsys.readouterr().out)
        assert found[mode]["new_tokens"] == 20
        assert max(found[mode]["token_ids"]) < 258  # neither the mask token nor a padded row
    assert found["linear"]["token_ids"] == found["ar"]["token_ids"]
    assert found["linear"]["block_length"] == 8


def test_a_context_cut_to_a_sliding_window(qwen: Path, capsys: Capture) -> None:
    """Prevents: a refusal that names an option which is not there, or does not help."""
    path = qwen / "config.json"
    changes = {"use_sliding_window": True, "sliding_window": 100, "layer_types": None}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes | {"max_window_layers": 0}))
    words = ["convert", str(qwen), str(qwen.parent / "tri")]
    assert main(words) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    option = re.search(r"`trimode convert (--max-context \d+)`", line)
    assert option is not None, line
    assert main([*words, *option[1].split()]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "context     100 of the source's 256"
    prompt = ["generate", "x" * 90, "--model", str(qwen.parent / "tri"), "--max-new-tokens"]
    assert main([*prompt, "10"]) == 0
    assert main([*prompt, "11"]) == 2
    assert "100" in capsys.readouterr().err.splitlines()[-1]


def test_json_is_the_record(qwen: Path, capsys: Capture) -> None:
    """Words among the JSON, or another object than the one that is kept."""
    target = qwen.parent / "tri"
    capsys.readouterr()
    assert main(["convert", str(qwen), str(target), "--json", "--mask-token", "258"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((target / "conversion.json").read_text())
    assert record["source"] == str(qwen)
    assert record["mask_token"] == {"token": "<|mask|>", "token_id": 258, "how": "named"}
    assert record["versions"].keys() == {"torch", "transformers", "safetensors"}
    assert main(["info", str(target)]) == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "exists and is not an empty folder"),
        (["--block-length", "0"], "block_size is 0; allowed: an integer of at least"),
        (["--mask-token", "<no>"], "mask token is '<no>'; allowed: a token of the vocabulary"),
        (["--dtype", "int8"], "dtype is 'int8'; allowed: float32"),
        (["--max-shard-size", "much"], "max_shard_size is 'much'; e.g. 5GB"),
    ],
)
def test_errors_are_one_line(qwen: Path, capsys: Capture, words: list[str], says: str) -> None:
    """A traceback for a mistake of the user, or a folder left behind by it."""
    target = qwen.parent / "tri" if words else qwen.parent
    capsys.readouterr()
    assert main(["convert", str(qwen), str(target), *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith("trimode: error: ")
    assert says in err.splitlines()[-1]
    assert [path.name for path in qwen.parent.iterdir()] == ["qwen"]
