"""What cannot be converted is refused before weights are read, in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.made_sources import (
    LLAMA3,
    SHAPE,
    YARN,
    MakeTokenizer,
    Source,
    edit_json,
    opened,
    refused,
    their_logits,
)
from trimode.checkpoint.convert import convert
from trimode.checkpoint.io import load_tokenizer
from trimode.errors import CheckpointError, ConfigError, UnsupportedError


def test_eos_of_the_generation_defaults(source: Source, tmp_path: Path) -> None:
    """Chat models that run on, because only `generation_config.json` knows all their ends."""
    folder = source("llama")
    edit_json(folder / "generation_config.json", eos_token_id=[257, 259])
    convert(folder, tmp_path / "target")
    assert opened(tmp_path / "target").config.eos_token_ids == (257, 259)


@pytest.mark.parametrize(("eos", "expected"), [(0, (0,)), (None, (257,)), ([], (257,))])
def test_eos_zero_is_a_token(
    source: Source, tmp_path: Path, eos: int | list[int] | None, expected: tuple[int, ...]
) -> None:
    """Id 0 taken for none, so that texts end at another token, or never."""
    folder = source("llama")
    edit_json(folder / "generation_config.json", eos_token_id=eos)
    convert(folder, tmp_path / "target")
    assert opened(tmp_path / "target").config.eos_token_ids == expected


@pytest.mark.parametrize("eos", ["257", [257, "259"], [[257]], 257.0, True])
def test_ids_that_are_none(source: Source, eos: Any) -> None:
    """A traceback for a damaged `generation_config.json`."""
    folder = source("llama")
    edit_json(folder / "generation_config.json", eos_token_id=eos)
    refused(folder, "source: a special token has the id .*; allowed: an integer, a list")


def test_half_a_tokenizer(source: Source, tokenizer: MakeTokenizer) -> None:
    """The empty vocabulary that transformers makes up for Qwen, and id 3 as the mask token."""
    folder = source("qwen2", tokenizer=tokenizer("<|mask|>"), vocab_size=300)
    (folder / "tokenizer.json").unlink()
    message = "the tokenizer has no vocabulary beside tokenizer_config.json; one of these is miss"
    refused(folder, message)
    (folder / "vocab.json").touch()
    refused(folder, "no vocabulary beside tokenizer_config.json, vocab.json; one of these")


def test_a_tokenizer_without_its_settings(
    source: Source, tokenizer: MakeTokenizer, tmp_path: Path
) -> None:
    """A vocabulary left behind because a file beside it is missing."""
    folder = source("qwen2", tokenizer=tokenizer("<|mask|>"), vocab_size=300)
    (folder / "tokenizer_config.json").unlink()
    assert convert(folder, tmp_path / "target")["mask_token"]["token"] == "<|mask|>"


def test_a_tokenizer_of_vocab_and_merges(
    source: Source, tokenizer: MakeTokenizer, tmp_path: Path
) -> None:
    """An old tokenizer, without `tokenizer.json`, left behind."""
    folder = source("qwen2", bos_token_id=None, eos_token_id=256)
    vocab = json.loads(tokenizer().backend_tokenizer.to_str())["model"]["vocab"]
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    assert convert(folder, tmp_path / "target")["has_tokenizer"]
    after = load_tokenizer(tmp_path / "target")
    assert after is not None
    assert after("a é")["input_ids"] == list("a é".encode())


@pytest.mark.parametrize(
    ("family", "changes", "message", "error"),
    [
        ("llama", {"model_type": "gpt2"}, "model_type is 'gpt2'; allowed: llama, mistral", None),
        ("llama", {"model_type": ["llama"]}, "model_type is .*; allowed: llama", None),
        (
            "mistral",
            {"model_type": "mixtral", "num_local_experts": 8},
            r"model_type is 'mixtral' \(a mixture of experts\); allowed: llama",
            None,
        ),
        (
            "llama",
            {"architectures": ["LlamaForSequenceClassification"]},
            "architectures is .*; allowed: LlamaForCausalLM",
            None,
        ),
        ("llama", {"quantization_config": {"bits": 4}}, "quantized", UnsupportedError),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'", UnsupportedError),
        ("llama", {"hidden_size": "64"}, "the configuration cannot be read: .*hidden_size", None),
        ("mistral", {"sliding_window": 64}, "sliding_window is 64, within the", UnsupportedError),
        (
            "qwen2",
            {
                "use_sliding_window": True,
                "sliding_window": 64,
                "layer_types": ["full_attention", "sliding_attention"],
            },
            "sliding_window is 64, within the context of 512",
            UnsupportedError,
        ),
        (
            "qwen3",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type is 'dynamic'; supported: default, linear, llama3, yarn$",
            UnsupportedError,
        ),
        (
            "llama",
            {"rope_parameters": SHAPE["rope_parameters"] | {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5",
            UnsupportedError,
        ),
    ],
)
def test_sources_that_cannot_be_converted(
    source: Source, family: str, changes: dict[str, Any], message: str, error: type | None
) -> None:
    """Another network taken for ours, or a traceback of transformers."""
    folder = source(family)
    edit_json(folder / "config.json", **changes)
    refused(folder, message, error=error or CheckpointError)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"sliding_window": 64}),  # Llama's network does not read it
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}),
        ("qwen3", {"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 0}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 0}),
        ("mistral", {"sliding_window": 512}),
        (
            "qwen2",
            {
                "use_sliding_window": True,
                "sliding_window": 64,
                "layer_types": ["full_attention", "full_attention"],
            },
        ),
    ],
)
def test_windows_that_never_take_effect(
    source: Source, tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    """Prevents: a source refused for a number that its network does not use."""
    folder = source(family)
    content = json.loads((folder / "config.json").read_text())
    content.pop("layer_types", None)  # by which transformers tells Ministral from Mistral
    (folder / "config.json").write_text(json.dumps(content | changes))
    record = convert(folder, tmp_path / "target")
    assert record["context"] == record["source_context"] == 512
    ids = torch.randint(320, (200,), generator=torch.Generator().manual_seed(1))
    logits = opened(tmp_path / "target")(ids[None]).logits[0, :, :320]
    torch.testing.assert_close(logits, their_logits(folder, ids), rtol=0, atol=1e-4)


WINDOWS: list[tuple[str, dict[str, Any]]] = [
    ("mistral", {"sliding_window": 64}),
    ("ministral3", {"sliding_window": 64, "rope_parameters": YARN}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}),
]


@pytest.mark.parametrize(("family", "config"), WINDOWS)
def test_a_context_cut_to_the_window(
    source: Source, tmp_path: Path, family: str, config: dict[str, Any]
) -> None:
    """Prevents: Mistral 7B refused, or converted so that tokens beyond the window are seen."""
    folder = source(family, **config)
    says = "sliding_window is 64, within the context of {}; .*convert --max-context 64` "
    refused(folder, says.format(512), error=UnsupportedError)
    refused(folder, says.format(65), error=UnsupportedError, max_context=65)
    record = convert(folder, tmp_path / "target", max_context=64)
    assert (record["context"], record["source_context"]) == (64, 512)
    probes = record["proof"]["probes"]
    assert max(probe["first_position"] + len(probe["ids"]) for probe in probes) == 64
    model = opened(tmp_path / "target")
    assert model.config.max_position_embeddings == 64
    ids = torch.randint(320, (65,), generator=torch.Generator().manual_seed(1))
    theirs, ours = their_logits(folder, ids), model(ids[None]).logits[0, :, :320]
    torch.testing.assert_close(ours[:64], theirs[:64], rtol=0, atol=1e-4)
    assert (ours[64] - theirs[64]).abs().max() > 1e-3  # one more token, and it would be wrong


@pytest.mark.parametrize("rope", [YARN, YARN | {"factor": None}, LLAMA3])
def test_a_cut_context_keeps_its_angles(
    source: Source, tmp_path: Path, rope: dict[str, Any]
) -> None:
    """Prevents: scaled positions computed from the new context in the place of the source's."""
    folder = source("llama" if rope is LLAMA3 else "ministral3", rope_parameters=rope)
    convert(folder, tmp_path / "target", max_context=100)
    ids = torch.randint(320, (100,), generator=torch.Generator().manual_seed(1))
    logits = opened(tmp_path / "target")(ids[None]).logits[0, :, :320]
    torch.testing.assert_close(logits, their_logits(folder, ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("length", "says"),
    [
        (513, "max_context is 513; allowed: 1 to 512, the context of .*source$"),
        (0, "max_context is 0; allowed: 1 to 512"),
        (31, "max_context is 31; allowed: at least the block length, 32"),
        ("48", "max_context is '48'; allowed: an integer"),
        (True, "max_context is True; allowed: an integer"),
    ],
)
def test_contexts_that_cannot_be(source: Source, length: Any, says: str) -> None:
    """Prevents: positions that the source was never trained on, given out as its context."""
    refused(source("llama"), says, error=ConfigError, max_context=length)


def test_a_cut_context_is_the_tokenizers_too(
    source: Source, tokenizer: MakeTokenizer, tmp_path: Path
) -> None:
    """Prevents: transformers' tokenizer truncating at a length that the model refuses."""
    folder = source("llama", tokenizer=tokenizer())
    convert(folder, tmp_path / "target", max_context=100)
    after = load_tokenizer(tmp_path / "target")
    assert after is not None
    assert after.model_max_length == 100


def test_damaged_files(source: Source) -> None:
    """A truncated download or a pickle opened as far as it goes."""
    folder = source("llama")
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    refused(folder, "model.safetensors is not a whole safetensors file")
    path.rename(folder / "pytorch_model.bin")
    refused(folder, "found only pytorch_model.bin, and pickles are not opened")
