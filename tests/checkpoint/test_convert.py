"""Converted checkpoints compute what their sources compute, and nothing doubtful is kept."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Ministral3Config, Ministral3ForCausalLM

from tests.checkpoint.made_sources import (
    LLAMA3,
    SHAPE,
    YARN,
    Source,
    edit_weights,
    opened,
    refused,
    their_logits,
)
from trimode.checkpoint import convert as convert_module
from trimode.checkpoint import whole_folder
from trimode.checkpoint.convert import convert
from trimode.errors import CapacityError, CheckpointError, ConfigError, UnsupportedError


@pytest.mark.parametrize(
    ("family", "config", "published"),
    [
        pytest.param("llama", {"head_dim": 32}, True, id="llama"),
        pytest.param("llama", {"tie_word_embeddings": True}, False, id="llama-tied"),
        pytest.param("llama", {"rope_parameters": LLAMA3}, True, id="llama-3-rope"),
        pytest.param("llama", {"attention_bias": True, "mlp_bias": True}, False, id="llama-biases"),
        pytest.param("mistral", {"sliding_window": None}, True, id="mistral"),
        pytest.param("mistral", {"sliding_window": 512}, True, id="mistral-idle-window"),
        pytest.param("ministral3", {"rope_parameters": YARN, "head_dim": 32}, True, id="ministral"),
        pytest.param("qwen2", {}, False, id="qwen2"),
        pytest.param("qwen2", {"tie_word_embeddings": True}, False, id="qwen2-tied"),
        pytest.param("qwen3", {"head_dim": 32}, False, id="qwen3"),
        pytest.param("qwen3", {"attention_bias": True}, False, id="qwen3-biases"),
        pytest.param("mistral3", {"rope_parameters": YARN}, True, id="vision"),
        pytest.param(
            "mistral3",
            {"rope_parameters": YARN, "tie_word_embeddings": True},
            False,
            id="vision-tied",
        ),
    ],
)
def test_every_family(
    source: Source, tmp_path: Path, family: str, config: dict[str, Any], published: bool
) -> None:
    """A family converted into a network that computes something else, or under the wrong type."""
    folder = source(family, **config)
    record = convert(folder, tmp_path / "target", mask_token="300", block_length=16)
    assert record == json.loads((tmp_path / "target" / "conversion.json").read_text())
    model = opened(tmp_path / "target")
    assert model.config.model_type == ("nemotron_labs_diffusion" if published else "trimode")
    assert type(model).__name__ in model.config.architectures
    assert (model.config.block_size, model.config.mask_token_id) == (16, 300)
    assert model.config.eos_token_ids == (257,)
    is_tied = config.get("tie_word_embeddings", False)
    assert model.config.tie_word_embeddings == is_tied
    assert record["head"] == ("tied to the embedding" if is_tied else "its own")
    assert record["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    ids = torch.randint(320, (100,), generator=torch.Generator().manual_seed(1))
    expected = their_logits(folder, ids)
    assert expected.std() > 1
    torch.testing.assert_close(model(ids[None]).logits[0], expected, rtol=0, atol=1e-4)
    assert record["proof"]["max_difference"] < 1e-4 < record["proof"]["allowed_difference"]
    assert all("vision" in name or "multi_modal" in name for name in record["ignored"])
    assert bool(record["ignored"]) == (family == "mistral3")
    stored = {tensor["name"] for tensor in record["tensors"]}
    assert stored == model.state_dict().keys() - ({"diffusion_head.weight"} if is_tied else set())


def test_untied_on_demand(source: Source, tmp_path: Path) -> None:
    """Prevents: no way to the published type for a source whose head is tied."""
    folder = source("llama", tie_word_embeddings=True)
    record = convert(folder, tmp_path / "target", mask_token="300", untie=True)
    assert (record["model_type"], record["head"]) == (
        "nemotron_labs_diffusion",
        "a copy of the embedding",
    )
    weights = load_file(tmp_path / "target" / "model.safetensors")
    head, embedding = weights["diffusion_head.weight"], weights["encoder.embed_tokens.weight"]
    assert torch.equal(head, embedding)
    ids = torch.arange(50)
    logits = opened(tmp_path / "target")(ids[None]).logits[0]
    torch.testing.assert_close(logits, their_logits(folder, ids), rtol=0, atol=1e-4)


def test_generation_defaults_are_kept(source: Source, tmp_path: Path) -> None:
    """Prevents: a chat model that forgets how its makers sample."""
    folder = source("llama")
    defaults = {"temperature": 0.6, "top_p": 0.9, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(defaults))
    convert(folder, tmp_path / "target")
    assert json.loads((tmp_path / "target" / "generation_config.json").read_text()) == defaults


LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize("rope", [SHAPE["rope_parameters"], LINEAR, LLAMA3])
def test_the_published_type_in_another_engine(
    source: Source, tmp_path: Path, rope: dict[str, Any]
) -> None:
    """A network without a query scale that engines built for Ministral 3 cannot compute."""
    folder = source("llama", rope_parameters=rope, head_dim=32)
    convert(folder, tmp_path / "target", mask_token="300")
    content = json.loads((tmp_path / "target" / "config.json").read_text())
    assert content.pop("model_type") == "nemotron_labs_diffusion"
    weights = load_file(tmp_path / "target" / "model.safetensors")
    model = Ministral3ForCausalLM(Ministral3Config(**content))
    model.load_state_dict(
        {
            name.replace("encoder.", "model.").replace("diffusion_head.", "lm_head."): tensor
            for name, tensor in weights.items()
        }
    )
    ids = torch.randint(320, (300,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model.eval()(ids[None]).logits[0]
    torch.testing.assert_close(logits, their_logits(folder, ids), rtol=0, atol=1e-4)


def test_names_that_transformers_5_has_in_memory(source: Source, tmp_path: Path) -> None:
    """The text part not found under `model.language_model`, where newer files keep it."""
    folder = source("mistral3", rope_parameters=YARN)

    def rename(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name.replace("language_model.model.", "model.language_model.")
            .replace("language_model.lm_head.", "lm_head.")
            .replace("vision_tower.", "model.vision_tower.")
            .replace("multi_modal_projector.", "model.multi_modal_projector."): tensor
            for name, tensor in weights.items()
        }

    edit_weights(folder, rename)
    record = convert(folder, tmp_path / "target", mask_token="300")
    sources = {tensor["source"] for tensor in record["tensors"]}
    assert "model.language_model.layers.1.mlp.up_proj.weight" in sources
    assert "lm_head.weight" in sources
    assert any(name.startswith("model.vision_tower.") for name in record["ignored"])


def test_old_buffers_are_left_behind(source: Source, tmp_path: Path) -> None:
    """A Llama 2 checkpoint refused for the rotary constants that old writers stored."""
    folder = source("llama")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(folder, lambda weights: weights | {name: torch.zeros(8)})
    assert convert(folder, tmp_path / "target")["ignored"] == [name]


def test_source_dtype_is_kept(source: Source, tmp_path: Path) -> None:
    """Weights rounded or blown up on the way, or a tensor of another type levelled."""
    folder = source("qwen3", dtype=torch.bfloat16, tie_word_embeddings=True)
    edit_weights(folder, lambda w: w | {"model.norm.weight": w["model.norm.weight"].float() * 1.01})
    convert(folder, tmp_path / "target", mask_token="300")
    theirs = load_file(folder / "model.safetensors")
    ours = load_file(tmp_path / "target" / "model.safetensors")
    assert json.loads((tmp_path / "target" / "config.json").read_text())["dtype"] == "bfloat16"
    for name, tensor in ours.items():
        key = name.replace("diffusion_head", "encoder.embed_tokens").replace("encoder.", "model.")
        assert tensor.dtype == theirs[key].dtype
        assert torch.equal(tensor, theirs[key])


@pytest.mark.parametrize("proof_dtype", ["float32", "bfloat16"])
def test_asked_for_dtype(source: Source, tmp_path: Path, proof_dtype: str) -> None:
    """Rounding that was asked for taken for a wrong conversion."""
    folder = source("llama")
    record = convert(folder, tmp_path / "target", dtype="bfloat16", proof_dtype=proof_dtype)
    weights = load_file(tmp_path / "target" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert record["proof"]["dtype"] == proof_dtype
    ids = torch.arange(50)
    expected = their_logits(folder, ids, torch.bfloat16)
    logits = opened(tmp_path / "target")(ids[None]).logits[0, :, :320]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_shards(source: Source, tmp_path: Path) -> None:
    """Shards read or written as if there were one file."""
    folder = source("qwen2", max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    convert(folder, tmp_path / "target", max_shard_size="150KB")
    files = list((tmp_path / "target").glob("*.safetensors"))
    assert len(files) > 1
    assert all(file.stat().st_size < 160_000 for file in files)


@pytest.mark.parametrize("is_moved", [True, False])
def test_a_tensor_that_two_shards_hold(source: Source, is_moved: bool) -> None:
    """Prevents: a proof that reads the same wrong tensor on both sides."""
    folder, name = source("llama", max_shard_size="100KB"), "model.norm.weight"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    right = index["weight_map"][name]
    other = min(set(index["weight_map"].values()) - {right})
    for file in (folder / other, *([folder / right] if is_moved else [])):
        weights = load_file(file)
        if file.name == right:
            del weights[name]
        else:
            weights[name] = torch.zeros(64)
        save_file(weights, file, metadata={"format": "pt"})
    first, second = sorted((right, other))
    twice = f"source: tensor {name} is stored twice, in {first} and in {second}"
    refused(folder, f"{name} is in {right}, but {other} holds it" if is_moved else twice)


def without(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in weights.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: without(w, "lm_head.weight"), r"1 missing tensors \(lm_head.weight\)$"),
        (lambda w: without(w, "model.embed_tokens.weight"), "1 missing tensors"),
        (
            lambda w: w | {"vision_tower.x": torch.zeros(2)},
            r"1 extra tensors \(vision_tower.x\)$",
        ),
        (lambda w: w | {"model.norm.weight": torch.zeros(65)}, r"\[65\] instead of \[64\]"),
        (lambda w: w | {"lm_head.weight": torch.zeros(319, 64)}, r"\[319, 64\] instead of"),
    ],
)
def test_wrong_tensors(source: Source, change: Callable[..., Any], message: str) -> None:
    """Missing tensors made up by transformers on both sides of the proof, or extra ones dropped."""
    folder = source("llama")
    edit_weights(folder, change)
    refused(folder, message)


def test_tensors_that_are_not_floats(source: Source) -> None:
    """Integer or 8-bit weights cast as if they were numbers of their own."""
    folder = source("llama")
    edit_weights(folder, lambda w: w | {"model.norm.weight": torch.ones(64, dtype=torch.int8)})
    refused(folder, "model.norm.weight is of type I8; allowed: F64", error=UnsupportedError)


def test_destinations(source: Source, tmp_path: Path) -> None:
    """A folder overwritten, the source itself most of all."""
    folder = source("llama")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    (tmp_path / "busy.partial").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for target, message in (
        (folder, "is the source itself"),
        (folder / ".." / "source", "is the source itself"),
        (tmp_path / "full", "full exists and is not an empty folder"),
        (tmp_path / "full" / "thesis.tex", "exists and is not an empty folder"),
        (tmp_path / "no" / "where", "no: no such folder"),
        (tmp_path / "busy", "busy.partial exists: another command writes it"),
    ):
        with pytest.raises(CheckpointError, match=message):
            convert(folder, target)
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "empty").mkdir()
    convert(folder, tmp_path / "empty")
    assert opened(tmp_path / "empty").config.mask_token_id == 320


def test_dtypes_that_cannot_be(source: Source) -> None:
    """A type that cannot hold weights, found out after minutes of copying."""
    folder = source("llama")
    for name in ("dtype", "proof_dtype"):
        options = {name: "float8_e4m3fn"}
        refused(folder, "dtype is 'float8_e4m3fn'; allowed: fl", error=ConfigError, **options)


def test_a_head_stored_beside_a_tied_embedding(source: Source, tmp_path: Path) -> None:
    """The embedding taken for the head, or the stored head for an extra tensor."""
    folder = source("llama", tie_word_embeddings=True)
    head = torch.randn(320, 64, generator=torch.Generator().manual_seed(1))
    edit_weights(folder, lambda weights: weights | {"lm_head.weight": head})
    convert(folder, tmp_path / "target", mask_token="300")
    ids = torch.arange(50)
    logits = opened(tmp_path / "target")(ids[None]).logits[0]
    torch.testing.assert_close(logits, their_logits(folder, ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_element_types(source: Source, tmp_path: Path, dtype: torch.dtype) -> None:
    """A type other than float32 and bfloat16 rounded, or named wrongly in the configuration."""
    folder = source("llama", dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    convert(folder, tmp_path / "target", mask_token="300", proof_dtype=name)
    theirs = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    ours = load_file(tmp_path / "target" / "model.safetensors")["encoder.embed_tokens.weight"]
    assert ours.dtype == dtype
    assert torch.equal(ours, theirs)
    assert json.loads((tmp_path / "target" / "config.json").read_text())["dtype"] == name


@pytest.mark.parametrize("writer", ["weights", "conversion.json"])
def test_a_full_disk(source: Source, monkeypatch: pytest.MonkeyPatch, writer: str) -> None:
    """A traceback of a library, or half a checkpoint that fills the disk for good."""

    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = source("llama")
    if writer == "weights":
        monkeypatch.setattr(convert_module.io, "save_file", full)
    else:
        monkeypatch.setattr(Path, "write_text", full)
    refused(folder, "target' cannot be written: the disk is full", error=CapacityError)


def test_all_is_on_the_disk_before_the_folder_has_its_name(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut that leaves a folder of the right name with empty files."""
    flushed: list[Path] = []
    monkeypatch.setattr(whole_folder, "flush", flushed.append)
    convert(source("llama"), tmp_path / "target")
    assert {path.parent.name for path in flushed[:-1]} == {"target.partial"}
    written = {path.name for path in (tmp_path / "target").iterdir()}
    assert {path.name for path in flushed} == {*written, "target.partial"}
