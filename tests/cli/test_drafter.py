"""`--drafter` of the commands that ask the diffusion view: its adapter may serve all passes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trimode.checkpoint.adapter import save_adapter
from trimode.checkpoint.io import load_model
from trimode.cli.main import main
from trimode.model.adapter import AdapterForm, new_adapter

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    """A checkpoint with an adapter in it for each view."""
    folder = tiny_checkpoint()
    model = load_model(folder, device=torch.device("cpu"), dtype=torch.float32)
    for view in ("draft", "denoise"):
        adapter = new_adapter(
            *(model.encoder.layers,),
            rank=4,
            alpha=4.0,
            targets=("o_proj",),
            seed=0,
            form=AdapterForm((view,)),
        )
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
        save_adapter(adapter, folder / view, dtype=torch.float32)
    return folder


def edited(words: list[str], folder: Path, capsys: Capture) -> Any:
    """What a command makes without an adapter and with either."""
    found = []
    for more in ([], ["--drafter", "draft"], ["--drafter", "denoise"]):
        assert main([*words, "--model", str(folder), "--json", *more]) == 0
        found.append(json.loads(capsys.readouterr().out)["text"])
    return found


def test_infill_with_an_adapter(folder: Path, capsys: Capture) -> None:
    """Prevents: an adapter that serves `denoise`, which `infill` has no way to name."""
    bare, drafts, denoises = edited(["infill", "x = <FILL>;", "--lengths", "12"], folder, capsys)
    assert drafts == bare != denoises


def test_revise_with_an_adapter(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    """Prevents: the same in `revise`, which asks the diffusion view for replacements."""
    path = tmp_path / "text.txt"
    path.write_text("for i in range(10):\n    print(i * 2)\n")
    words = ["revise", str(path), "--budget", "3", "--min-gain", "1"]
    bare, drafts, denoises = edited(words, folder, capsys)
    assert drafts == bare != denoises
