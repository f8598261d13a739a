"""Drafter adapters from PEFT folders: the same arithmetic as PEFT's, and every defect one line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimode.checkpoint.adapter import find_adapter, load_adapter, save_adapter
from trimode.checkpoint.compress import compress_adapter
from trimode.errors import CheckpointError
from trimode.model import AdapterSwitch, DrafterAdapter, TriModeModel
from trimode.model.adapter import TARGETS, AdapterForm, new_adapter
from trimode.model.corrector import new_corrector

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's, of newer transformers

Model = Callable[..., TriModeModel]
Folder = Callable[..., Path]


@pytest.fixture
def peft_folder(tiny_model: Model, tmp_path: Path) -> Folder:
    """`peft_folder(**options)`: a LoRA of random weights, written by PEFT."""

    def write(*, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
        wrapped = wrap(tiny_model(dtype), **options)
        wrapped.save_pretrained(tmp_path / "lora")
        return tmp_path / "lora"

    return write


def wrap(model: TriModeModel, **options: Any) -> Any:
    values = {"r": 4, "lora_alpha": 16, "target_modules": ["o_proj"], "init_lora_weights": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return peft.get_peft_model(model, peft.LoraConfig(**(values | options))).eval()


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    change(weights)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def refused(folder: Path, model: TriModeModel, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_adapter(folder, model=model)
    assert "\n" not in str(caught.value)
    assert folder.name in str(caught.value)


@pytest.mark.parametrize("targets", [["o_proj"], list(TARGETS)])
@pytest.mark.parametrize("pattern", ["causal", "bidirectional"])
def test_logits_equal_pefts(
    tiny_model: Model, tmp_path: Path, targets: list[str], pattern: str
) -> None:
    """A scale forgotten, A and B swapped, or an adapter put on another layer than in training."""
    wrapped = wrap(tiny_model(), target_modules=targets)
    wrapped.save_pretrained(tmp_path / "lora")
    model, ids = tiny_model(), torch.arange(30).reshape(2, 15)
    adapter = load_adapter(tmp_path / "lora", model=model)
    expected = wrapped(ids, pattern=pattern).logits
    got = model(ids, pattern=pattern, adapter=AdapterSwitch(adapter, None)).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    plain = model(ids, pattern=pattern).logits
    assert (got - plain).abs().max() > 0.1
    with wrapped.disable_adapter():
        assert wrapped(ids, pattern=pattern).logits.equal(plain)


def test_device_and_dtype_of_the_model(peft_folder: Folder, tiny_model: Model) -> None:
    """A float32 adapter beside a bfloat16 model, or one that trains by accident."""
    adapter = load_adapter(peft_folder(), model=tiny_model(torch.bfloat16))
    assert {p.dtype for p in adapter.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in adapter.parameters())
    assert len(list(adapter.parameters())) == 2 * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora is True; allowed: False"),
        ({"bias": "lora_only"}, "bias is 'lora_only'; allowed: 'none'"),
        (
            {"modules_to_save": ["norm"]},
            r"modules_to_save is \['norm'\]; allowed: None; merge it .* merge_and_unload, and conv",
        ),
    ],
)
def test_variants_of_lora_are_refused(
    peft_folder: Folder, tiny_model: Model, options: dict[str, Any], message: str
) -> None:
    """A variant with another arithmetic read as plain LoRA."""
    refused(peft_folder(**options), tiny_model(), message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; allowed: 'LORA'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"r": 0}, "r is 0 and lora_alpha 16"),
        ({"r": 2}, r"A \[4, 128\] and B \[64, 4\]; expected \[2, 128\] .* at r=2$"),
        ({"lora_alpha": "16"}, "lora_alpha '16'"),
        ({"lora_alpha": None}, "lora_alpha None"),
        ({"lora_alpha": float("nan")}, "lora_alpha nan"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'; allowed: true, false"),
        ({"rank_pattern": {"o_proj": 0}}, "rank_pattern is .* a rank of at least 1"),
        ({"rank_pattern": ["o_proj"]}, "rank_pattern is .* a rank of at least 1"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern is .*; allowed: regular expressions"),
        ({"rank_pattern": {"(?i)q_proj": 2}}, "rank_pattern is .*; allowed: regular expressions"),
        ({"rank_pattern": {"o_proj": 2}}, r"A \[4, 128\] and B \[64, 4\]; expected .* at r=2$"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"target_modules": ["q_proj"]}, r"target_modules is \['q_proj'\], but .*o_proj"),
    ],
)
def test_config_defects(
    peft_folder: Folder, tiny_model: Model, changes: dict[str, Any], message: str
) -> None:
    """A scale computed from values that do not belong to the tensors."""
    folder = peft_folder()
    edit_config(folder, **changes)
    refused(folder, tiny_model(), message)


def test_config_that_is_not_json(peft_folder: Folder, tiny_model: Model) -> None:
    """A parser's traceback instead of the name of the file."""
    folder = peft_folder()
    (folder / "adapter_config.json").write_text("{")
    refused(folder, tiny_model(), r"adapter_config\.json is not JSON")


def test_missing_files(peft_folder: Folder, tiny_model: Model, tmp_path: Path) -> None:
    """A folder without an adapter drafting with no adapter at all."""
    refused(tmp_path / "nothing", tiny_model(), "no such folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tiny_model(), r"has no adapter_config\.json")
    folder = peft_folder()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    refused(folder, tiny_model(), r"has no adapter_model\.safetensors")


def test_truncated_weights(peft_folder: Folder, tiny_model: Model) -> None:
    """An interrupted download as a traceback from a C extension."""
    folder = peft_folder()
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    refused(folder, tiny_model(), r"adapter_model\.safetensors is not a whole safetensors file")


def test_tensor_defects(peft_folder: Folder, tiny_model: Model) -> None:
    """Half a pair, a pair of the wrong size or an unknown tensor skipped in silence."""
    name = "base_model.model.encoder.layers.{}.self_attn.o_proj.lora_{}.weight"

    def drop(weights: dict[str, Tensor]) -> None:
        del weights[name.format(1, "B")]

    def widen(weights: dict[str, Tensor]) -> None:
        weights[name.format(1, "A")] = torch.zeros(4, 130)

    def rank(weights: dict[str, Tensor]) -> None:
        weights[name.format(1, "A")] = torch.zeros(3, 128)

    def squash(weights: dict[str, Tensor]) -> None:
        weights[name.format(1, "A")] = torch.zeros(512)

    def add(weights: dict[str, Tensor]) -> None:
        weights["base_model.model.diffusion_head.lora_A.weight"] = torch.zeros(4, 64)

    for change, message in (
        (drop, "layer 1 o_proj has lora_A only; expected A and B"),
        (widen, r"layer 1 o_proj has A \[4, 130\] .*; expected \[4, 128\] and \[64, 4\]"),
        (rank, r"layer 1 o_proj has A \[3, 128\]"),
        (squash, r"layer 1 o_proj has A \[512\]"),
        (add, re.escape("unexpected tensor base_model.model.diffusion_head.lora_A.weight")),
        (dict.clear, "holds no tensors"),
    ):
        folder = peft_folder()
        edit_weights(folder, change)
        refused(folder, tiny_model(), message)


def test_a_tensor_under_two_names(peft_folder: Folder, tiny_model: Model, tmp_path: Path) -> None:
    """Prevents: one of two halves chosen by the order of a file, in `load` or in `convert`."""
    folder = peft_folder()
    name = "base_model.model.encoder.layers.0.self_attn.o_proj.lora_A.weight"
    twin = name.replace("lora_A", "lora_A.default")
    edit_weights(folder, lambda weights: weights.update({twin: weights[name] * 2}))
    message = f"adapter_model.safetensors holds one tensor twice, as .*{re.escape(twin)}"
    refused(folder, tiny_model(), message)
    with pytest.raises(CheckpointError, match=message):
        compress_adapter(folder, tmp_path / "small", rank=2)
    edit_weights(folder, lambda weights: weights.pop(twin))
    other = name.replace("encoder.", "model.")
    edit_weights(folder, lambda weights: weights.update({other: weights[name] * 2}))
    refused(folder, tiny_model(), "adapter_model.safetensors holds one tensor twice")


def test_an_adapter_in_shards(peft_folder: Folder, tiny_model: Model) -> None:
    """Prevents: no word of the files that are there."""
    folder = peft_folder()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.safetensors.index.json")
    refused(
        folder,
        tiny_model(),
        "has no adapter_model.safetensors, only adapter_model.safetensors.index.json",
    )


def test_tensors_of_other_parts_of_a_model(peft_folder: Folder, tiny_model: Model) -> None:
    """A vision tower's layer 0 taken for ours, or a projection of the attention in the MLP."""
    folder = peft_folder()
    name = "base_model.model.encoder.layers.0.self_attn.o_proj.lora_A.weight"
    for other in (
        name.replace("encoder.layers", "encoder.vision_tower.layers"),
        name.replace("self_attn", "mlp"),
    ):

        def move(weights: dict[str, Tensor], other: str = other) -> None:
            weights[other] = weights[name].clone()

        edit_weights(folder, move)
        refused(folder, tiny_model(torch.float32), f"unexpected tensor {other}")
        edit_weights(folder, lambda weights, other=other: weights.pop(other))


def test_adapter_of_a_deeper_model(peft_folder: Folder, tiny_model: Model) -> None:
    """An adapter of another size whose extra layers are dropped."""
    refused(peft_folder(), tiny_model(num_hidden_layers=1), "layer 1 o_proj, but the model has 1")


@pytest.mark.parametrize("targets", [["o_proj"], list(TARGETS)])
def test_saved_adapter_is_read_back_and_by_peft(
    tiny_model: Model, tmp_path: Path, targets: list[str]
) -> None:
    """A scale, a name or a half of a pair lost on the way to disk."""
    model, ids = tiny_model(), torch.arange(30).reshape(2, 15)
    adapter = new_adapter(model.encoder.layers, rank=4, alpha=10.0, targets=targets, seed=0)
    unchanged = model(ids, adapter=AdapterSwitch(adapter.double(), None)).logits
    assert unchanged.equal(model(ids).logits)
    for _, _, pair in adapter.items():
        torch.nn.init.normal_(pair.up)
    folder = tmp_path / "linear_spec_lora"
    folder.mkdir()
    (folder / "stale").touch()
    save_adapter(adapter, folder, dtype=torch.float64, base="somewhere")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["linear_spec_lora"]
    assert not (folder / "stale").exists()
    wanted = model(ids, adapter=AdapterSwitch(adapter, None)).logits
    read = load_adapter(folder, model=model)
    assert model(ids, adapter=AdapterSwitch(read, None)).logits.equal(wanted)
    wrapped = peft.PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=False)
    torch.testing.assert_close(wrapped(ids).logits, wanted, rtol=0, atol=1e-10)
    assert wrapped.peft_config["default"].base_model_name_or_path == "somewhere"


def viewed(model: TriModeModel) -> DrafterAdapter:
    """An adapter with all that PEFT has no word for."""
    adapter = new_adapter(
        *(model.encoder.layers,),
        rank=3,
        alpha=6.0,
        targets=TARGETS,
        seed=0,
        form=AdapterForm(
            *(("draft", "denoise"), False, ("skip", "block"), 5), ((0.6, 0.5), (0.75,))
        ),
        mask_embeddings=torch.randn(2, model.config.hidden_size),
        corrector=new_corrector(model.config.hidden_size, rank=4, num_candidates=8, seed=1),
    )
    for parameter in adapter.parameters():
        parameter.data.normal_()
    return adapter


def test_form_mask_embeddings_and_corrector_are_read_back(
    tiny_model: Model, tmp_path: Path
) -> None:
    """Prevents: an adapter decoded otherwise than it was trained; PEFT put off by what is ours."""
    model = tiny_model(torch.float32)
    adapter = viewed(model)
    save_adapter(adapter, tmp_path / "view", dtype=torch.float32)
    found = load_adapter(tmp_path / "view", model=model)
    assert found.form == adapter.form
    expected = dict(adapter.named_parameters())
    assert expected.keys() == dict(found.named_parameters()).keys()
    for name, parameter in found.named_parameters():
        assert parameter.equal(expected[name]), name
        assert not parameter.requires_grad
    assert found.corrector is not None
    assert found.corrector.num_candidates == 8
    wrapped = peft.PeftModel.from_pretrained(model, str(tmp_path / "view"))
    ids = torch.arange(10)[None]
    bare = DrafterAdapter(
        {(i, target): pair for i, target, pair in adapter.items()}, form=adapter.form
    )
    expected_logits = tiny_model(torch.float32)(ids, adapter=AdapterSwitch(bare, None)).logits
    torch.testing.assert_close(wrapped(ids).logits, expected_logits, rtol=1e-4, atol=1e-4)


def test_a_drafter_of_another_width(tiny_model: Model, tmp_path: Path) -> None:
    """Prevents: shapes and types of tensors in the place of what is wrong."""
    model, folder = tiny_model(torch.float32), tmp_path / "view"
    narrow = tiny_model(torch.float32, hidden_size=32)
    save_adapter(viewed(model), folder, dtype=torch.float32)
    refused(folder, narrow, "view is made for another model: width 64, this one 32$")
    save_adapter(viewed(narrow), tmp_path / "narrow", dtype=torch.float32)
    (tmp_path / "narrow" / "trimode_view.safetensors").rename(folder / "trimode_view.safetensors")
    refused(folder, model, "view is made for another model: width 32, this one 64$")


def test_a_published_adapter_has_no_files_of_ours(tiny_model: Model, tmp_path: Path) -> None:
    """Prevents: folders that other engines have not seen; a form invented where none is said."""
    model = tiny_model(torch.float32)
    adapter = new_adapter(model.encoder.layers, rank=2, alpha=4.0, targets=("o_proj",), seed=0)
    save_adapter(adapter, tmp_path / "plain", dtype=torch.float32)
    names = {file.name for file in (tmp_path / "plain").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    assert load_adapter(tmp_path / "plain", model=model).form == AdapterForm(("draft",))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"views": ["draft", "commit"]}, "views is .*; allowed: some of draft, denoise"),
        ({"views": []}, "views is .*; allowed"),
        ({"draft_forms": ["wide"]}, "draft_forms is .*; allowed: some of block, skip"),
        ({"draft_forms": "skip"}, "draft_forms is 'skip'; allowed"),
        ({"adapts_clean": "no"}, "adapts_clean is 'no'; allowed"),
        ({"num_masks": 0}, "num_masks is 0; allowed"),
        ({"acceptance": [[0.5, 2.0], [0.5]]}, "acceptance is .*; allowed: for each of draft_forms"),
        ({"acceptance": [[0.5]]}, "acceptance is .*; allowed: for each of draft_forms"),
        ({"acceptance": [0.5, 0.5]}, "acceptance is .*; allowed: for each of draft_forms"),
        ({"acceptance": "high"}, "acceptance is 'high'; allowed: for each of draft_forms"),
        ({"place": "index in the group"}, "place is 'index in the group'; allowed"),
        ({"format": 2}, "format is 2"),
        ({"colour": "blue"}, "colour"),
        ({"corrector_candidates": None}, "expected"),
        ({"corrector_candidates": -1}, "corrector_candidates is -1; allowed"),
    ],
    ids=str,
)
def test_defects_of_a_view(
    tiny_model: Model, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """Prevents: a field misread, or a newer file read as if it were this version's."""
    model = tiny_model(torch.float32)
    save_adapter(viewed(model), tmp_path / "view", dtype=torch.float32)
    path = tmp_path / "view" / "trimode_view.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refused(tmp_path / "view", model, message)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("corrector.state"),
        lambda tensors: tensors.update(mask_embeddings=torch.zeros(2, 3)),
        lambda tensors: tensors.update(mask_embeddings=torch.zeros(0, 64)),
        lambda tensors: tensors.update(mask_embeddings=torch.zeros(1, 64, dtype=torch.int64)),
        lambda tensors: tensors.update(extra=torch.zeros(1, 64)),
        lambda tensors: tensors.update({"corrector.before": torch.zeros(9, 64)}),
    ],
    ids=["missing", "width", "empty", "integers", "extra", "rank"],
)
def test_defects_of_a_views_tensors(tiny_model: Model, tmp_path: Path, change: Any) -> None:
    """Prevents: tensors of another network taken, or left out in silence."""
    model = tiny_model(torch.float32)
    save_adapter(viewed(model), tmp_path / "view", dtype=torch.float32)
    path = tmp_path / "view" / "trimode_view.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    refused(tmp_path / "view", model, "trimode_view.safetensors")


def test_an_adapter_is_found_by_its_name_inside_the_checkpoint(tmp_path: Path) -> None:
    """A hub id whose adapter has no path that a user could know."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "adapter_config.json").write_text("{}")
    assert find_adapter("mine", checkpoint=tmp_path) == tmp_path / "mine"
    assert find_adapter(tmp_path / "mine", checkpoint=tmp_path / "other") == tmp_path / "mine"
    with pytest.raises(CheckpointError, match="adapter yours: no such folder, .* which has mine"):
        find_adapter("yours", checkpoint=tmp_path)


def test_files_are_for_whom_the_folder_is(tiny_model: Model, tmp_path: Path) -> None:
    """Weights that nobody but their maker can read: safetensors writes them so."""
    model = tiny_model()
    adapter = new_adapter(model.encoder.layers, rank=2, alpha=4.0, targets=("o_proj",), seed=0)
    save_adapter(adapter, tmp_path / "lora", dtype=torch.float32)
    for path in (tmp_path / "lora").iterdir():
        assert path.stat().st_mode & 0o777 == (tmp_path / "lora").stat().st_mode & 0o666, path.name
