"""A GGUF file converts into what the checkpoint that it was made of computes and reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests.checkpoint.made_gguf import TEMPLATE, TEXTS, make_gguf
from tests.checkpoint.made_sources import opened, refused, their_logits
from trimode.checkpoint import gguf_file
from trimode.checkpoint.convert import convert
from trimode.checkpoint.io import load_tokenizer
from trimode.errors import CheckpointError, ConfigError, UnsupportedError

IDS = torch.randint(260, (100,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("kind", "tolerance"), [("F32", 1e-4), ("Q8_0", 0.6)])
def test_logits(tmp_path: Path, kind: str, tolerance: float) -> None:
    """Prevents: query rows in llama.cpp's order, which the proof cannot see."""
    source, file = make_gguf(tmp_path, kind=kind)
    record = convert(file, tmp_path / "target")
    assert record["source"] == str(file)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "source.gguf", "target"]
    assert not (tmp_path / "target" / "unpacked").exists()
    model = opened(tmp_path / "target")
    expected = their_logits(source, IDS)
    assert expected.std() > 1
    logits = model(IDS[None]).logits[0, :, : expected.shape[1]]
    torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance)
    assert model.config.tie_word_embeddings
    assert model.config.eos_token_ids == (2,)
    weights = load_file(tmp_path / "target" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert "diffusion_head.weight" not in weights


def test_an_own_head(tmp_path: Path) -> None:
    """Prevents: the embedding taken for the head where the file has both."""
    source, file = make_gguf(tmp_path, tie_word_embeddings=False)
    assert convert(file, tmp_path / "target", dtype="float16")["head"] == "its own"
    logits = opened(tmp_path / "target")(IDS[None]).logits[0]
    expected = their_logits(source, IDS, torch.float16)
    torch.testing.assert_close(logits[:, : expected.shape[1]], expected, rtol=0, atol=1e-4)


def test_the_tokenizer(tmp_path: Path) -> None:
    """Prevents: digits that take the space before them along, or markers read as text."""
    source, file = make_gguf(tmp_path)
    convert(file, tmp_path / "target")
    before = AutoTokenizer.from_pretrained(source)
    after = load_tokenizer(tmp_path / "target")
    assert after is not None
    for text in (*TEXTS, "x =   12\n    34", " é 東京 🙂", "<|im_start|>user\na<|im_end|><spare>"):
        ids = before(text)["input_ids"]
        assert after(text)["input_ids"] == ids
        assert after.decode(ids) == text
    plain = {t.content: t.special for t in before.added_tokens_decoder.values()}
    kept = {t.content: t.special for t in after.added_tokens_decoder.values()}
    assert plain.items() <= kept.items()
    assert after.chat_template == TEMPLATE
    assert (after.bos_token_id, after.eos_token_id, after.unk_token_id) == (1, 2, 0)
    assert after.model_max_length == 512


def test_generation_defaults(tmp_path: Path) -> None:
    """Prevents: sampling settings or a second end of text of the file lost."""
    extra = {"general.sampling.temp": 0.5, "general.sampling.top_k": 20}
    _, file = make_gguf(tmp_path, extra=extra | {"tokenizer.ggml.eot_token_id": 0})
    convert(file, tmp_path / "target")
    content = json.loads((tmp_path / "target" / "generation_config.json").read_text())
    assert content == {"temperature": 0.5, "top_k": 20, "do_sample": True, "eos_token_id": [0, 2]}
    assert opened(tmp_path / "target").config.eos_token_ids == (0, 2)


def test_nothing_is_invented(tmp_path: Path) -> None:
    """Prevents: sampling settings for a file that has none."""
    _, file = make_gguf(tmp_path)
    convert(file, tmp_path / "target")
    assert not (tmp_path / "target" / "generation_config.json").exists()


def test_a_folder_with_a_file(tmp_path: Path) -> None:
    """Prevents: a downloaded repository of one GGUF file refused for want of config.json."""
    _, file = make_gguf(tmp_path)
    (tmp_path / "hub").mkdir()
    file.rename(tmp_path / "hub" / "made.gguf")
    convert(tmp_path / "hub", tmp_path / "target")
    (tmp_path / "hub" / "other.gguf").touch()
    with pytest.raises(CheckpointError, match=r"several GGUF files.*made.gguf, other.gguf"):
        convert(tmp_path / "hub", tmp_path / "again")


@pytest.mark.parametrize(
    ("extra", "error", "message"),
    [
        ({"llama.rope.scaling.type": "yarn"}, UnsupportedError, "rope.scaling.type is 'yarn'"),
        ({"tokenizer.ggml.pre": "poro"}, UnsupportedError, "pre is 'poro'; supported: gpt-2"),
        ({"tokenizer.ggml.pre": None}, UnsupportedError, "pre is None"),
        ({"tokenizer.ggml.model": "t5"}, UnsupportedError, "model is 't5'; supported: gpt2"),
        ({"llama.attention.sliding_window": 64}, UnsupportedError, "sliding_window is 64"),
        ({"split.count": 2}, UnsupportedError, "split.count is 2; supported: one file"),
        ({"llama.block_count": 3}, CheckpointError, r"missing tensors \(blk.2.attn_"),
        ({"llama.block_count": 1}, CheckpointError, r"extra tensors \(blk.1.attn_"),
    ],
)
def test_what_the_reader_would_lose(
    tmp_path: Path, extra: dict[str, Any], error: type, message: str
) -> None:
    """Prevents: a network that computes or reads otherwise, since a setting was dropped."""
    _, file = make_gguf(tmp_path, extra=extra)
    refused(file, f"source.gguf: .*{message}", error=error)


def test_tensors_that_the_reader_would_make_up_or_leave_out(tmp_path: Path) -> None:
    """Prevents: random numbers in the place of a lost tensor, or a bias that is not added, both
    proved right against a network with the same fault."""
    _, file = make_gguf(tmp_path, renamed={"blk.1.ffn_up.weight": "blk.1.attn_q.bias"})
    refused(file, r"missing tensors \(blk.1.ffn_up.weight\); 1 extra tensors \(blk.1.attn_q.bias\)")


def test_other_architectures(tmp_path: Path) -> None:
    """Prevents: a traceback of the reader for a family that we do not have."""
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "falcon.gguf", "falcon")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(tmp_path / "falcon.gguf", "is 'falcon'; allowed: llama, qwen2, qwen3")


def test_damaged_files(tmp_path: Path) -> None:
    """Prevents: a traceback of the reader."""
    _, file = make_gguf(tmp_path)
    whole = file.read_bytes()
    for content in (b"", b"GGUF", b"text", whole[: len(whole) // 3]):
        file.write_bytes(content)
        refused(file, r"source.gguf is not a whole GGUF file")
    file.unlink()
    refused(file, "source.gguf: no such file")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: an ImportError that does not say what to install."""
    _, file = make_gguf(tmp_path)
    monkeypatch.setattr(gguf_file, "find_spec", lambda name: None)
    refused(
        file, r"needs gguf, not installed here; pip install 'trimode\[gguf\]'", error=ConfigError
    )


def test_a_tensor_twice(tmp_path: Path) -> None:
    """Prevents: one of two tensors of a name chosen in silence."""
    _, file = make_gguf(tmp_path)
    content = file.read_bytes()
    assert content.count(b"blk.1.attn_norm.weight") == 1
    file.write_bytes(content.replace(b"blk.1.attn_norm.weight", b"blk.0.attn_norm.weight"))
    refused(file, "source.gguf .*blk.0.attn_norm.weight")


def test_a_sliding_window(tmp_path: Path) -> None:
    """Prevents: a window of the file's metadata refused where it never takes effect."""
    source, file = make_gguf(tmp_path, extra={"llama.attention.sliding_window": 64})
    says = "sliding_window is 64, within the context of 512; .*convert --max-context 64` "
    refused(file, f"source.gguf: {says}", error=UnsupportedError)
    record = convert(file, tmp_path / "target", max_context=64)
    assert (record["context"], record["source_context"]) == (64, 512)
    logits = opened(tmp_path / "target")(IDS[None, :64]).logits[0]
    expected = their_logits(source, IDS[:64])
    torch.testing.assert_close(logits[:, : expected.shape[1]], expected, rtol=0, atol=1e-4)


def test_a_context_that_the_file_does_not_have(tmp_path: Path) -> None:
    """Prevents: the temporary folder named in the place of the file."""
    _, file = make_gguf(tmp_path)
    refused(file, "max_context is 600; .*/source.gguf$", error=ConfigError, max_context=600)
