"""Checkpoint folders: what is written opens again, and every defect is one line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import HFValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimode.checkpoint import io
from trimode.checkpoint.io import load_model, load_tokenizer, resolve, save_checkpoint
from trimode.errors import CheckpointError, ConfigError
from trimode.loading import load
from trimode.model import NemotronLabsDiffusionConfig, TriModeModel

Model = Callable[..., TriModeModel]
Checkpoint = Callable[..., Path]


def open_folder(folder: Path) -> TriModeModel:
    return load_model(folder, device="cpu", dtype=torch.float64)


def refused(folder: Path, message: str) -> None:
    """Opening fails with one line that matches and names the folder."""
    with pytest.raises(CheckpointError, match=message) as caught:
        open_folder(folder)
    assert "\n" not in str(caught.value)
    assert folder.name in str(caught.value)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# Round trips


@pytest.mark.parametrize("max_shard_size", ["5GB", "100KB"])
@pytest.mark.parametrize("published", [False, True])
def test_round_trip(
    tiny_model: Model, tmp_path: Path, max_shard_size: str, published: bool
) -> None:
    """A tensor, a dtype or a config value that changes on its way through a folder."""
    overrides = {"config_class": NemotronLabsDiffusionConfig} if published else {}
    model = tiny_model(**overrides)
    folder = tmp_path / "saved"
    save_checkpoint(model, folder, max_shard_size=max_shard_size)
    num_files = len(list(folder.glob("*.safetensors")))
    assert (num_files > 1) == (max_shard_size == "100KB")
    again = open_folder(folder)
    assert type(again) is type(model)
    assert not again.training
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())
    kept = {"dtype", "architectures", "transformers_version", "_name_or_path"}
    old, new = (m.config.to_dict() for m in (model, again))
    assert {k: v for k, v in old.items() if k not in kept} == {
        k: v for k, v in new.items() if k not in kept
    }


def test_dtype_asked_for_is_given(tiny_checkpoint: Checkpoint) -> None:
    """Weights opened in the dtype of the file, or norms left behind in another."""
    folder = tiny_checkpoint()
    for dtype in ("bfloat16", torch.float64):
        model = load_model(folder, device="cpu", dtype=dtype)
        assert {str(p.dtype) for p in model.parameters()} == {
            f"torch.{dtype}".replace("torch.torch", "torch")
        }
    with pytest.raises(ConfigError, match="dtype is 'int8'; allowed: float32"):
        load_model(folder, device="cpu", dtype="int8")


def test_tied_head(tiny_model: Model, tmp_path: Path) -> None:
    """A tied head reported as missing, loaded untied, or as random numbers."""
    model = tiny_model(tie_word_embeddings=True)
    assert model.diffusion_head.weight is model.encoder.embed_tokens.weight
    folder = tmp_path / "tied"
    save_checkpoint(model, folder)
    assert "diffusion_head.weight" not in load_file(folder / "model.safetensors")
    again = open_folder(folder)
    assert again.diffusion_head.weight is again.encoder.embed_tokens.weight
    ids = torch.arange(9)[None]
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=1e-10)


def test_tied_head_beside_a_copy_of_it(tiny_model: Model, tmp_path: Path) -> None:
    """A folder that stores the tied head too, as some converters write it, refused."""
    folder = tmp_path / "tied"
    model = tiny_model(tie_word_embeddings=True)
    save_checkpoint(model, folder)
    edit_weights(
        folder,
        lambda w: w.update({"diffusion_head.weight": w["encoder.embed_tokens.weight"].clone()}),
    )
    ids = torch.arange(9)[None]
    logits = open_folder(folder)(ids).logits
    torch.testing.assert_close(logits, model(ids).logits, rtol=0, atol=1e-10)


def test_tokenizer_round_trip(
    tiny_checkpoint: Checkpoint, tiny_model: Model, tmp_path: Path
) -> None:
    """A tokenizer lost, changed, or demanded where there is none."""
    tokenizer = load_tokenizer(tiny_checkpoint())
    assert tokenizer is not None
    text = "def f(x):\n\treturn 'é'"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    save_checkpoint(tiny_model(), tmp_path / "bare")
    assert load_tokenizer(tmp_path / "bare") is None
    lm = load(tmp_path / "bare", device="cpu")
    assert lm.tokenizer is None
    assert len(lm.generate([1, 2, 3], max_new_tokens=2, ignore_eos=True).token_ids) == 2


def test_saving_replaces_the_folder_whole(tiny_model: Model, tmp_path: Path) -> None:
    """Shards of an older save left beside the new weights, or a half-written folder."""
    folder = tmp_path / "saved"
    save_checkpoint(tiny_model(num_hidden_layers=3), folder, max_shard_size="100KB")
    model = tiny_model(seed=5)
    save_checkpoint(model, folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]
    ids = torch.arange(9)[None]
    logits = open_folder(folder)(ids).logits
    torch.testing.assert_close(logits, model(ids).logits, rtol=0, atol=1e-10)


# Defects of the weights


def test_missing_tensors(tiny_checkpoint: Checkpoint) -> None:
    """Missing tensors filled with random numbers; only the first named, or none."""
    folder = tiny_checkpoint()

    def drop_layer(weights: dict[str, Tensor]) -> None:
        for name in [name for name in weights if ".layers.1." in name]:
            del weights[name]

    edit_weights(folder, drop_layer)
    refused(
        folder, r"9 missing tensors \(encoder\.layers\.1\.input_layernorm\.weight, .*, \.\.\.\)$"
    )


def test_extra_tensors(tiny_checkpoint: Checkpoint) -> None:
    """A checkpoint of another network, or with a merged adapter, taken for ours."""
    folder = tiny_checkpoint()
    edit_weights(folder, lambda w: w.update({"encoder.vision.weight": torch.zeros(2)}))
    refused(folder, r"1 extra tensors \(encoder\.vision\.weight\)$")


def test_misshapen_tensors(tiny_checkpoint: Checkpoint) -> None:
    """transformers' table of mismatches over many lines, or the wrong tensor skipped."""
    folder = tiny_checkpoint()
    edit_weights(folder, lambda w: w.update({"encoder.norm.weight": torch.zeros(65)}))
    refused(folder, r"1 misshapen tensors \(encoder\.norm\.weight \[65\] instead of \[64\]\)$")


def test_all_kinds_of_wrong_tensors_in_one_line(tiny_checkpoint: Checkpoint) -> None:
    """One defect found at a time, so that mending takes several tries."""
    folder = tiny_checkpoint()

    def change(weights: dict[str, Tensor]) -> None:
        weights["head"] = weights.pop("diffusion_head.weight")
        weights["encoder.norm.weight"] = torch.zeros(65)

    edit_weights(folder, change)
    refused(folder, "1 missing tensors .*; 1 extra tensors .*; 1 misshapen tensors")


def test_a_head_that_the_config_unties(tiny_model: Model, tmp_path: Path) -> None:
    """A config edited to untie the head opening with a random one."""
    folder = tmp_path / "tied"
    save_checkpoint(tiny_model(tie_word_embeddings=True), folder)
    edit_config(folder, tie_word_embeddings=False)
    refused(folder, r"1 missing tensors \(diffusion_head\.weight\)")


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
def test_truncated_file(tiny_checkpoint: Checkpoint, kept: float) -> None:
    """An interrupted download that opens with zeros, or as a traceback from a C extension."""
    folder = tiny_checkpoint()
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept if kept >= 1 else kept * len(content))])
    refused(folder, "model.safetensors is not a whole safetensors file")


def test_missing_shard(tiny_model: Model, tmp_path: Path) -> None:
    """A shard that was not copied reported as hundreds of missing tensors."""
    folder = tmp_path / "sharded"
    save_checkpoint(tiny_model(), folder, max_shard_size="100KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    refused(
        folder, f"shard {re.escape(shard.name)} named by model.safetensors.index.json is missing"
    )


def sharded(model: TriModeModel, folder: Path) -> dict[str, str]:
    """A checkpoint of several shards; returns the map of its index."""
    save_checkpoint(model, folder, max_shard_size="100KB")
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(weight_map.values())) > 1
    return weight_map


def edit_shard(file: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def test_a_tensor_that_two_shards_hold(tiny_model: Model, tmp_path: Path) -> None:
    """Prevents: the last file wins, in silence, whatever the index says."""
    weight_map = sharded(tiny_model(torch.float32), tmp_path / "many")
    name = "encoder.norm.weight"
    for shard in sorted(set(weight_map.values()) - {weight_map[name]}):
        shutil.copytree(tmp_path / "many", tmp_path / "spoilt")
        edit_shard(tmp_path / "spoilt" / shard, lambda w: w.update({name: torch.zeros(64)}))
        first, second = sorted((shard, weight_map[name]))
        refused(
            tmp_path / "spoilt",
            f"spoilt: tensor {name} is stored twice, in {first} and in {second}; allowed: one",
        )
        shutil.rmtree(tmp_path / "spoilt")


def test_a_tensor_in_another_shard_than_indexed(tiny_model: Model, tmp_path: Path) -> None:
    """Prevents: shards and index of different versions taken for one checkpoint."""
    folder, name = tmp_path / "many", "encoder.norm.weight"
    weight_map = sharded(tiny_model(torch.float32), folder)
    right = weight_map[name]
    wrong = next(shard for shard in weight_map.values() if shard != right)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {"weight_map": weight_map | {name: wrong}}))
    refused(folder, f"says that tensor {name} is in {wrong}, but {right} holds it")
    path.write_text(json.dumps(index))
    edit_shard(folder / right, lambda weights: weights.pop(name))
    refused(folder, f"says that tensor {name} is in {right}, but no shard holds it")


def test_files_that_the_index_does_not_name(tiny_model: Model, tmp_path: Path) -> None:
    """Prevents: Mistral's `consolidated.safetensors` beside the shards taken for one of them."""
    model, folder = tiny_model(torch.float32), tmp_path / "many"
    weight_map = sharded(model, folder)
    others = {name: torch.zeros(3) for name in weight_map}
    for name in ("consolidated.safetensors", "model-00001-of-00099.safetensors"):
        save_file(others, folder / name)
    ids = torch.arange(9)[None]
    assert open_folder(folder)(ids).logits.equal(model.double()(ids).logits)


def test_a_tied_head_that_is_stored_otherwise(tiny_model: Model, tmp_path: Path) -> None:
    """Prevents: a head that is tied on two ranks and untied on one, as transformers decides."""
    save_checkpoint(tiny_model(tie_word_embeddings=True), tmp_path / "tied")
    edit_weights(
        tmp_path / "tied",
        lambda w: w.update({"diffusion_head.weight": w["encoder.embed_tokens.weight"] * 2}),
    )
    refused(tmp_path / "tied", "diffusion_head.weight differs from .* in model.safetensors, though")


def test_weights_that_transformers_would_read_instead(tiny_checkpoint: Checkpoint) -> None:
    """Prevents: one file checked and another one loaded."""
    folder = tiny_checkpoint()
    edit_config(folder, transformers_weights="other.safetensors")
    refused(folder, "transformers_weights is 'other.safetensors'; allowed: none")
    edit_config(folder, transformers_weights=None)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    refused(folder, "holds a model and an adapter; move adapter_config.json")
    (folder / "adapter_config.json").unlink()
    part = folder / "shard-00000-model-00001-of-00001.safetensors"
    part.touch()
    refused(folder, f"has {part.name}, a part of a distributed checkpoint")


def test_single_file_beside_an_index(tiny_model: Model, tmp_path: Path) -> None:
    """The shards checked and the single file loaded, with random numbers for what it lacks."""
    save_checkpoint(tiny_model(torch.float32), tmp_path / "many", max_shard_size="100KB")
    save_checkpoint(tiny_model(torch.float32, seed=1), tmp_path / "one")
    shutil.copy(tmp_path / "one" / "model.safetensors", tmp_path / "many")
    ids = torch.arange(8)[None]
    expected = open_folder(tmp_path / "one")(ids).logits
    torch.testing.assert_close(open_folder(tmp_path / "many")(ids).logits, expected)
    edit_weights(tmp_path / "many", lambda weights: weights.pop("encoder.norm.weight"))
    refused(tmp_path / "many", "1 missing tensors \\(encoder.norm.weight\\)")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_map": {"a": 5}}, "weight_map has 5; allowed: a file name"),
        ({"weight_map": {"a": "../x.safetensors"}}, "weight_map has '../x.safetensors'"),
        ({"metadata": None}, "no weight_map, or no metadata"),
    ],
)
def test_damaged_index(
    tiny_model: Model, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    """A traceback for a damaged index, or a file outside the folder being opened."""
    save_checkpoint(tiny_model(torch.float32), tmp_path / "many", max_shard_size="100KB")
    path = tmp_path / "many" / "model.safetensors.index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(tmp_path / "many", message)


def test_integer_weights(tiny_checkpoint: Checkpoint) -> None:
    """Quantised weights run as if they were the numbers they stand for."""
    folder = tiny_checkpoint()

    def quantise(weights: dict[str, Tensor]) -> None:
        weights["diffusion_head.weight"] = weights["diffusion_head.weight"].to(torch.int8)

    edit_weights(folder, quantise)
    refused(folder, "1 quantised or integer tensors \\(diffusion_head.weight I8\\)")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_folder_in_the_place_of_a_file(tiny_checkpoint: Checkpoint, name: str) -> None:
    """A traceback from the operating system."""
    folder = tiny_checkpoint()
    (folder / name).unlink()
    (folder / name).mkdir()
    refused(folder, name)


def test_index_without_a_map(tiny_model: Model, tmp_path: Path) -> None:
    """A damaged index opening as an empty checkpoint, or as a KeyError."""
    folder = tmp_path / "sharded"
    save_checkpoint(tiny_model(), folder, max_shard_size="100KB")
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')
    refused(folder, r"index\.json has no weight_map")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickle_is_not_opened(tiny_checkpoint: Checkpoint, name: str) -> None:
    """A pickle, which may run code, opened because nothing else was there."""
    folder = tiny_checkpoint()
    (folder / "model.safetensors").rename(folder / name)
    refused(folder, f"found only {re.escape(name)}, and pickles are not opened")


# Defects of the folder and its config


def test_empty_folder(tmp_path: Path) -> None:
    """An empty folder reported as a missing network connection."""
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"empty has no config\.json$")


def test_no_weights(tiny_checkpoint: Checkpoint) -> None:
    """A folder with a config only."""
    folder = tiny_checkpoint()
    (folder / "model.safetensors").unlink()
    refused(folder, r"expected model\.safetensors or model\.safetensors\.index\.json, found none")


@pytest.mark.parametrize("content", [b"", b"{", b"model_type: trimode", b"\xff\xfe{}"])
def test_config_that_is_not_json(tiny_checkpoint: Checkpoint, content: bytes) -> None:
    """A parser's traceback instead of the name of the file."""
    folder = tiny_checkpoint()
    (folder / "config.json").write_bytes(content)
    refused(folder, r"config\.json is not JSON")


def test_config_that_is_not_an_object(tiny_checkpoint: Checkpoint) -> None:
    """A JSON list failing as an AttributeError."""
    folder = tiny_checkpoint()
    (folder / "config.json").write_text("[1, 2]")
    refused(folder, r"config\.json holds a list; expected a JSON object")


@pytest.mark.parametrize("model_type", ["llama", None, 3, ["trimode"]])
def test_wrong_model_type(tiny_checkpoint: Checkpoint, model_type: Any) -> None:
    """Another family's weights opened under our names, or the valid types not named."""
    folder = tiny_checkpoint()
    edit_config(folder, model_type=model_type)
    refused(folder, "model_type is .*; allowed: trimode, nemotron_labs_diffusion; an AR model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_token_id": 999}, "mask_token_id is 999"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "[Mm]issing required keys"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
    ],
)
def test_config_with_an_impossible_value(
    tiny_checkpoint: Checkpoint, changes: dict[str, Any], message: str
) -> None:
    """A bad value surfacing as an error of transformers' validators, without the file's name."""
    folder = tiny_checkpoint()
    edit_config(folder, **changes)
    refused(folder, rf"config\.json: .*{message}")


def test_damaged_tokenizer(tiny_checkpoint: Checkpoint) -> None:
    """The tokenizers library's plain Exception reaching the user."""
    folder = tiny_checkpoint()
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(CheckpointError, match="the tokenizer cannot be read") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


# Finding a checkpoint


@pytest.mark.parametrize("path", ["no/such/folder", "./missing", "nowhere", "/nowhere/at/all"])
def test_path_that_does_not_exist(path: str) -> None:
    """A mistyped path sent to the hub, and reported as a network error."""
    with pytest.raises(CheckpointError, match=rf"^{re.escape(path)}: no such folder$"):
        resolve(path)


def test_file_instead_of_a_folder(tiny_checkpoint: Checkpoint) -> None:
    """The weights file itself given as the checkpoint."""
    path = tiny_checkpoint() / "model.safetensors"
    with pytest.raises(CheckpointError, match="is a file; a checkpoint is a folder"):
        resolve(path)


@pytest.mark.parametrize("failure", [OSError("offline\nand more"), HFValidationError("bad id")])
def test_hub_id_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    """A hub client's traceback over many lines instead of one."""

    def fail(*_: Any, **__: Any) -> str:
        raise failure

    monkeypatch.setattr(io, "snapshot_download", fail)
    with pytest.raises(
        CheckpointError, match="not opened from the hub: (offline|bad id)$"
    ) as caught:
        resolve("someone/something")
    assert "\n" not in str(caught.value)


def test_hub_id_with_forbidden_characters() -> None:
    """An impossible id, which needs no network to refuse, ending in a traceback."""
    with pytest.raises(CheckpointError, match="not opened from the hub"):
        resolve("some one/some?thing")


def test_hub_id_is_downloaded(monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Checkpoint) -> None:
    """A hub id looked for on disk only."""
    folder = tiny_checkpoint()
    monkeypatch.setattr(io, "snapshot_download", lambda name: str(folder))
    assert resolve("someone/something") == folder


@pytest.mark.parametrize("inside", [".", "checkpoints/step_00000103"])
def test_a_training_run_is_named_as_one(inside: str, tmp_path: Path) -> None:
    """Prevents: advice to convert a run's folder, whose model lies elsewhere in it."""
    folder = tmp_path / inside
    folder.mkdir(parents=True, exist_ok=True)
    (tmp_path / "log.jsonl").touch()
    (tmp_path / "config.json").write_text('{"data": []}')
    refused(folder, re.escape(f"its model, once finished, is in {tmp_path / 'final'}"))
