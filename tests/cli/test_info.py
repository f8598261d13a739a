"""`trimode info`: what it says is what the files and the network say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from trimode import __version__
from trimode.checkpoint.io import save_checkpoint
from trimode.cli.main import main
from trimode.model import TriModeModel
from trimode.model.native import library
from trimode.model.native.threads import num_threads

Capture = pytest.CaptureFixture[str]


def test_json(
    tiny_checkpoint: Callable[..., Path], tiny_model: Callable[..., TriModeModel], capsys: Capture
) -> None:
    """Prevents: counts that differ from the network's own."""
    folder = tiny_checkpoint(torch.float16)
    (folder / "README.md").write_text("# card")
    assert main(["info", str(folder), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    model = tiny_model(torch.float16)
    assert record["path"] == str(folder)
    assert record["model_type"] == "trimode"
    assert record["config"]["hidden_size"] == 64
    assert record["config"]["rope_parameters"]["factor"] == 16.0
    assert record["weights"] == {
        "parameters": sum(p.numel() for p in model.parameters()),
        "embedding_parameters": 2 * 259 * 64,
        "tensors": len(model.state_dict()),
        "files": 1,
        "bytes": (folder / "model.safetensors").stat().st_size,
        "dtypes": ["F16"],
    }
    assert record["tokenizer"]["size"] == 259
    assert record["special_token_ids"] == {"bos": 256, "eos": [257], "mask": 258}
    assert record["modes"] == {
        "ar": {"block_length": None, "threshold": None, "branches": None, "temperature": 0.0},
        "diffusion": {"block_length": 8, "threshold": 0.9, "branches": None, "temperature": 0.0},
        "linear": {"block_length": 8, "threshold": None, "branches": None, "temperature": 0.0},
        "branching": {"block_length": 8, "threshold": None, "branches": 4, "temperature": 0.0},
        "quadratic": {"block_length": 8, "threshold": None, "branches": 8, "temperature": 0.0},
        "auto": {"block_length": 8, "threshold": None, "branches": 8, "temperature": 0.0},
    }
    assert record["adapters"] == []
    assert record["has_model_card"]
    here = record["environment"]
    assert here["trimode"] == __version__
    assert here["torch"] == torch.__version__
    assert here["transformers"] == transformers.__version__
    assert here["threads"] == torch.get_num_threads()
    found = library.load()
    native = here["native"]
    assert native["source_hash"] == library.source_hash()
    assert native["threads"] == num_threads()
    assert native["why"] == library.status().why
    assert native["instruction_set"] == (None if found is None else found.name)
    assert native["compiler"] == (None if found is None else found.compiler)
    assert native["path"] == (None if found is None else str(found.path))


def test_text_of_shards_without_tokenizer(
    tmp_path: Path, tiny_model: Callable[..., TriModeModel], capsys: Capture
) -> None:
    """Prevents: counting the first shard only, or a tied head twice."""
    folder = tmp_path / "sharded"
    model = tiny_model(torch.float32, tie_word_embeddings=True)
    save_checkpoint(model, folder, max_shard_size="100KB")
    (folder / "linear_spec_lora").mkdir()
    (folder / "linear_spec_lora" / "adapter_config.json").write_text("{}")
    save_file({}, folder / "linear_spec_lora" / "adapter_model.safetensors")
    (folder / "other").mkdir()
    (folder / "other" / "adapter_config.json").write_text("{}")
    num_files = len(list(folder.glob("*.safetensors")))
    num_parameters = sum(p.numel() for p in model.parameters())
    assert num_files > 1
    assert main(["info", str(folder)]) == 0
    lines = {line[:16].strip(): line[16:] for line in capsys.readouterr().out.splitlines()}
    assert lines["parameters"].startswith(f"{num_parameters:,}, of them {259 * 64:,} in")
    assert f" tensors in {num_files} files, " in lines["on disk"]
    assert lines["tokenizer"] == "none"
    assert lines["mode linear"] == "block length 8, temperature 0.0"
    assert lines["mode auto"] == "block length up to 8, branches up to 8, temperature 0.0"
    drafter = "linear_spec_lora (serves draft, drafts as block)"
    assert lines["adapters"] == f"{drafter}; other (no word of its use)"


def test_says_why_there_is_no_native_step(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Prevents: a slow machine whose owner cannot find out what it lacks."""
    folder = str(tiny_checkpoint())
    monkeypatch.setenv("TRIMODE_NATIVE", "off")
    assert main(["info", folder]) == 0
    assert "\nnative step     not in use: TRIMODE_NATIVE is off\n" in capsys.readouterr().out
    monkeypatch.setenv("TRIMODE_NATIVE", "mmx")
    assert main(["info", folder]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("trimode: error: TRIMODE_NATIVE is 'mmx'; allowed: off, generic")


def test_loads_no_weights(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents: minutes and gigabytes for a question that the headers answer."""

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(TriModeModel, "from_pretrained", fail)
    assert main(["info", str(tiny_checkpoint())]) == 0


def test_a_damaged_folder_is_one_line(
    tiny_checkpoint: Callable[..., Path], capsys: Capture
) -> None:
    """Prevents: describing a checkpoint that cannot be loaded as if it could."""
    folder = tiny_checkpoint()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert main(["info", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("trimode: error: ")
    assert err.count("\n") == 1
    assert "model.safetensors is not a whole safetensors file" in err
