"""Checkpoints of a run: written whole or not at all, found by looking, resumed to the last bit.

A checkpoint is a folder `output_dir/checkpoints/step_00001234` with the weights, the optimiser
state, the state of torch's random generators, and `run.json` (step, tokens, config, versions,
commit). All noise and the order of the data are functions of the step, so nothing else has to be
kept. What is shared out over ranks is written by all of them (`dist_checkpoint`); either kind is
read on any number of ranks.
"""

from __future__ import annotations

import json
import logging
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trimode._version import __version__
from trimode.checkpoint import whole_folder
from trimode.errors import CheckpointError
from trimode.training.config import TrainConfig
from trimode.training.dist_checkpoint import (
    is_distributed_folder,
    load_distributed,
    save_distributed,
)
from trimode.training.distribute import part_of
from trimode.training.optim import OptimizerSet
from trimode.training.parallel import Parallel

logger = logging.getLogger(__name__)

NUM_KEPT = 2


@dataclass(frozen=True, slots=True)
class RunState:
    """How far a run has come. The next global sample index is a function of the step.

    Args:
        step: Optimiser steps done.
        tokens: Tokens of text read.
        seconds: Spent on them.
        best_score: Of the held-out evaluation that chose what is exported (drafter only).
        best_step: Where that was.
        base_checksum: Of the frozen weights under what is trained, None if nothing is frozen.
        drafted_tokens: Masks fed with a gradient (training from anchors only).
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_score: float | None = None
    best_step: int | None = None
    base_checksum: int | None = None
    drafted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A complete checkpoint on disk."""

    folder: Path
    state: RunState
    config: dict[str, Any]
    identity: dict[str, str]
    environment: dict[str, str]


def save_checkpoint(
    output_dir: Path,
    *,
    parallel: Parallel,
    model: nn.Module,
    optimizer: OptimizerSet,
    state: RunState,
    config: TrainConfig,
    identity: dict[str, str],
) -> Path:
    """Write a checkpoint of what is trained beside the others, then drop all but the last two.

    Everything goes to a temporary folder and to the disk before one rename makes it visible, so a
    crash leaves either the whole checkpoint or none. What killed runs left half-written goes first.

    Args:
        output_dir: Of the run.
        parallel: The ranks, which all call this.
        model: What is trained.
        optimizer: Its optimisers.
        state: How far the run is.
        config: The run.
        identity: What must be found again on resume, see `resume.check_identity`.

    Raises:
        CapacityError: The disk is full; the checkpoints before are kept.
        TriModeError: It cannot be written for another reason.
    """
    root = output_dir / "checkpoints"
    folder = root / f"step_{state.step:08d}"
    record = {
        "state": asdict(state),
        "config": asdict(config),
        "identity": identity,
        "environment": environment(),
    }
    if parallel.is_main:
        for stale in root.glob(".step_*"):
            shutil.rmtree(stale, ignore_errors=True)
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        save_distributed(folder, parallel=parallel, model=model, optimizer=optimizer, record=record)
    else:  # every rank has all of it
        with parallel.together():
            if parallel.is_main:
                _save_whole(folder, model=model, optimizer=optimizer, record=record)
    if parallel.is_main:
        for old in list(_complete(root))[:-NUM_KEPT]:
            shutil.rmtree(old.folder, ignore_errors=True)
    return folder


def _save_whole(
    folder: Path, *, model: nn.Module, optimizer: OptimizerSet, record: dict[str, Any]
) -> None:
    with whole_folder.writing(folder, what="checkpoint"):
        temporary = whole_folder.start(folder)
        weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}
        save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
        torch.save(
            {"optimizer": optimizer.state_dict(), "random": _random_state()}, temporary / "state.pt"
        )
        record = record | {"sizes": {p.name: p.stat().st_size for p in temporary.iterdir()}}
        (temporary / "run.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        whole_folder.publish(folder)


def latest_checkpoint(output_dir: Path) -> CheckpointInfo | None:
    """The complete checkpoint with the highest step, or None."""
    found = list(_complete(output_dir / "checkpoints"))
    return found[-1] if found else None


def load_checkpoint(
    checkpoint: CheckpointInfo, *, parallel: Parallel, model: nn.Module, optimizer: OptimizerSet
) -> RunState:
    """Put weights, optimiser and random generators back where they were; returns the run's state.

    All ranks call this; their number need not be that of the run that wrote the checkpoint.

    Raises:
        CheckpointError: A file is damaged or belongs to another network.
    """
    if is_distributed_folder(checkpoint.folder):
        load_distributed(checkpoint.folder, parallel=parallel, model=model, optimizer=optimizer)
        return checkpoint.state
    with parallel.together():
        _load_whole(checkpoint.folder, model=model, optimizer=optimizer)
    return checkpoint.state


def _load_whole(folder: Path, *, model: nn.Module, optimizer: OptimizerSet) -> None:
    try:
        weights = load_file(folder / "model.safetensors")
        rest = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"checkpoint {str(folder)!r} cannot be read: {error}") from error
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    if {n: p.shape for n, p in parameters.items()} != {n: w.shape for n, w in weights.items()}:
        raise CheckpointError(f"checkpoint {str(folder)!r} holds the weights of another network")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(part_of(weights[name], like=parameter))
    optimizer.load_state_dict(rest["optimizer"])
    _set_random_state(rest["random"])


def environment() -> dict[str, str]:
    """Versions, commit and machine, to be kept with a run."""
    return {
        "trimode": __version__,
        "commit": _git_commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _complete(root: Path) -> Iterator[CheckpointInfo]:
    """Complete checkpoints by ascending step; anything else in the folder is passed over."""
    for folder in sorted(root.glob("step_*")):
        try:
            record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            sizes = {name: (folder / name).stat().st_size for name in record.get("sizes", {})}
            if sizes != record.get("sizes", {}):
                raise ValueError(f"sizes {sizes}")
            yield CheckpointInfo(
                folder=folder,
                state=RunState(**record["state"]),
                config=record["config"],
                identity=record.get("identity", {}),
                environment=record.get("environment", {}),
            )
        except (OSError, ValueError, KeyError, TypeError):
            logger.warning("passing over %s: not a complete checkpoint", folder)


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


@cache
def _git_commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()
