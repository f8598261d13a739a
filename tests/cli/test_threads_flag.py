"""`--threads`: one number for torch, the native step and child processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from trimode.cli.main import main
from trimode.cli.threads_flag import use_threads
from trimode.errors import ConfigError
from trimode.model.native.threads import num_allowed, num_threads

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def same_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Torch's threads and the variable are afterwards as they were."""
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("number", [*{1, num_allowed()}])
def test_all_go_by_it(number: int) -> None:
    """Prevents: a flag that bounds torch and leaves the native step or a replica unbounded."""
    torch.set_num_threads(1)
    use_threads(number)
    assert torch.get_num_threads() == number
    assert num_threads() == number
    assert os.environ["OMP_NUM_THREADS"] == str(number)


@pytest.mark.parametrize("number", [-1, 0, num_allowed() + 1])
def test_other_numbers_are_refused(number: int) -> None:
    """Prevents: more threads than CPUs, which only wait for each other."""
    with pytest.raises(ConfigError, match=f"--threads is {number}; allowed here: 1 to "):
        use_threads(number)


def test_without_it_nothing_changes() -> None:
    """Prevents: a default that overrides what the environment says."""
    use_threads(None)
    assert os.environ["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize("command", ["generate", "chat", "selfgen", "infill", "revise", "serve"])
def test_every_command_that_runs_a_model_has_it(
    command: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: Capture
) -> None:
    """Prevents: a command that takes all cores of a shared machine."""
    folder = str(tiny_checkpoint())
    words = {
        "generate": ["text", "--model", folder],
        "chat": ["text", "--model", folder],
        "selfgen": ["--output", str(tmp_path / "out.jsonl"), "--model", folder],
        "infill": ["a <FILL> b", "--model", folder],
        "revise": [str(tmp_path / "file.txt"), "--model", folder],
        "serve": [folder],
    }
    (tmp_path / "file.txt").write_text("some text\n")
    assert main([command, *words[command], "--threads", "0"]) == 2
    assert "--threads is 0; allowed here: 1 to " in capsys.readouterr().err
