"""Adapters cut to a lower rank: the best approximation, in a folder that loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trimode.checkpoint.adapter import check_use, load_adapter, save_adapter
from trimode.checkpoint.compress import compress_adapter, truncated
from trimode.cli.main import main
from trimode.errors import CheckpointError
from trimode.model import DrafterAdapter, TriModeModel
from trimode.model.adapter import AdapterForm, LoraPair
from trimode.model.corrector import new_corrector

Models = Callable[..., TriModeModel]


@pytest.fixture
def model(tiny_model: Models) -> TriModeModel:
    return tiny_model(torch.float32)


@pytest.fixture
def folder(model: TriModeModel, tmp_path: Path) -> Path:
    """An adapter of rank 6 on two targets, whose singular values fall, with all that may stand
    beside it."""
    generator = torch.Generator().manual_seed(0)
    pairs = {}
    for index, layer in enumerate(model.encoder.layers):
        for target, linear in (("o_proj", layer.self_attn.o_proj), ("up_proj", layer.mlp.up_proj)):
            falling = torch.logspace(0, -2, 6)
            down = torch.randn(6, linear.in_features, generator=generator) * falling[:, None]
            up = torch.randn(linear.out_features, 6, generator=generator)
            pairs[index, target] = LoraPair(down, up, 1.5)
    adapter = DrafterAdapter(
        pairs,
        form=AdapterForm(adapts_clean=False, draft_forms=("skip",), num_masks=3),
        mask_embeddings=torch.randn(2, 64, generator=generator),
        corrector=new_corrector(64, rank=4, num_candidates=5, seed=0),
    )
    save_adapter(adapter, tmp_path / "old", dtype=torch.float32, base="some/base")
    return tmp_path / "old"


def updates(folder: Path, model: TriModeModel) -> list[Tensor]:
    adapter = load_adapter(folder, model=model, dtype=torch.float64)
    return [pair.up @ pair.down * pair.scale for _, _, pair in adapter.items()]


def test_full_rank_changes_nothing(model: TriModeModel, folder: Path, tmp_path: Path) -> None:
    """Prevents a scale applied twice or lost, and factors in each other's place."""
    record = compress_adapter(folder, tmp_path / "new", rank=6)
    assert record["kept"] == pytest.approx(1)
    for old, new in zip(updates(folder, model), updates(tmp_path / "new", model), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_it_is_the_best_of_its_rank(
    model: TriModeModel, folder: Path, tmp_path: Path, rank: int
) -> None:
    """Prevents values kept in the wrong order, and a share that is not that of the norm."""
    record = compress_adapter(folder, tmp_path / "new", rank=rank)
    kept, whole, least = 0.0, 0.0, 1.0
    for old, new in zip(updates(folder, model), updates(tmp_path / "new", model), strict=True):
        left, values, right = torch.linalg.svd(old, full_matrices=False)
        best = left[:, :rank] * values[:rank] @ right[:rank]
        torch.testing.assert_close(new, best, rtol=1e-4, atol=1e-4)
        squares = values.square()
        kept, whole = kept + squares[:rank].sum().item(), whole + squares.sum().item()
        least = min(least, (squares[:rank].sum() / squares.sum()).sqrt().item())
    assert record["kept"] == pytest.approx((kept / whole) ** 0.5, rel=1e-5)
    assert record["least_kept"] == pytest.approx(least, rel=1e-5)
    assert 0.5 < record["kept"] < 1
    assert record["bytes"] * 6 == record["source_bytes"] * rank


def test_what_stands_beside_it_is_kept(model: TriModeModel, folder: Path, tmp_path: Path) -> None:
    """Prevents an adapter that loses its masks, its corrector or its base, or is no longer known
    for a drafter."""
    compress_adapter(folder, tmp_path / "new", rank=2, dtype=torch.bfloat16)
    old, new = (load_adapter(path, model=model) for path in (folder, tmp_path / "new"))
    assert new.form == old.form
    assert new.mask_embeddings is not None
    assert old.mask_embeddings is not None
    assert new.mask_embeddings.equal(old.mask_embeddings.bfloat16().float())
    assert new.corrector is not None
    assert new.corrector.num_candidates == 5
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 3)
    assert config["base_model_name_or_path"] == "some/base"
    with pytest.raises(CheckpointError, match="is a drafter, and was given as lora"):
        check_use(tmp_path / "new", "lora")


def test_an_update_of_zero() -> None:
    """Prevents NaN for an adapter before its first step."""
    down, up, kept, whole = truncated(torch.randn(4, 9), torch.zeros(7, 4), rank=2)
    assert (kept, whole) == (0, 0)
    assert (up @ down).abs().max() == 0


def test_a_rank_beyond_that_of_a_matrix(model: TriModeModel, tmp_path: Path) -> None:
    """Prevents a folder that says a rank which its tensors do not have, and does not load."""
    linear = model.encoder.layers[0].self_attn.k_proj
    pair = LoraPair(torch.randn(100, linear.in_features), torch.randn(linear.out_features, 100), 1)
    adapter = DrafterAdapter({(0, "k_proj"): pair})
    save_adapter(adapter, tmp_path / "old", dtype=torch.float32, base="some/base")
    compress_adapter(tmp_path / "old", tmp_path / "new", rank=80)
    (old,), (new,) = updates(tmp_path / "old", model), updates(tmp_path / "new", model)
    torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_rslora": True}, "use_rslora is True; allowed: False"),
        ({"alpha_pattern": {"o_proj": 3}}, "alpha_pattern is {'o_proj': 3}"),
        ({"r": 8}, "not of r=8"),
    ],
)
def test_other_kinds_of_adapters(
    folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """Prevents an update whose scale changes with its rank, unseen."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message):
        compress_adapter(folder, tmp_path / "new", rank=2)
    assert not (tmp_path / "new").exists()


def test_a_damaged_file(folder: Path, tmp_path: Path) -> None:
    """Prevents an error of a library in place of the file's name."""
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors is not a whole"):
        compress_adapter(folder, tmp_path / "new", rank=2)


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents options of networks that are ignored, and a folder that is written over."""
    new = str(tmp_path / "new")
    assert main(["convert", str(folder), new, "--rank", "2", "--dtype", "bfloat16"]) == 0
    assert "4 pairs of rank 2 (they had 6)" in capsys.readouterr().out
    for words, message in (
        ([str(folder), new, "--rank", "2"], "is in use"),
        ([str(folder), new + "2", "--rank", "7"], "rank is 7; allowed: 1 to 6"),
        ([str(folder), new + "2"], "is an adapter's folder: give --rank"),
        ([str(tmp_path), new + "2", "--rank", "2"], "is no adapter's folder"),
        (
            [str(folder), new + "2", "--rank", "2", "--block-length", "8"],
            "--block-length means nothing to an adapter",
        ),
    ):
        assert main(["convert", *words]) != 0
        assert message in capsys.readouterr().err
