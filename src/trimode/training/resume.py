"""Checkpoints of a run: written whole or not at all, found by looking, resumed to the last bit.

A checkpoint is a folder `output_dir/checkpoints/step_00001234` with the weights, the optimiser
state, the state of torch's random generators, and `run.json` (step, tokens, config, versions,
commit). All noise and the order of the data are functions of the step, so nothing else has to be
kept.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from trimode._version import __version__
from trimode.errors import CheckpointError, ConfigError
from trimode.training.config import TrainConfig
from trimode.training.optim import OptimizerSet

logger = logging.getLogger(__name__)

NUM_KEPT = 2
_FREE_KEYS = (
    "output_dir",
    "max_seconds",
    "checkpoint_every_s",
    "log_every_steps",
    "compile",
    "evaluation",
    "export",
)
"""Keys that may change on resume: they do not change the weights (compile: only by rounding)."""


@dataclass(frozen=True, slots=True)
class RunState:
    """How far a run has come. The next global sample index is a function of the step."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A complete checkpoint on disk."""

    folder: Path
    state: RunState
    config: dict[str, Any]


def save_checkpoint(
    output_dir: Path,
    *,
    model: nn.Module,
    optimizer: OptimizerSet,
    state: RunState,
    config: TrainConfig,
) -> Path:
    """Write a checkpoint beside the others, then drop all but the last two.

    Everything goes to a temporary folder and to the disk before one rename makes it visible, so a
    crash leaves either the whole checkpoint or none.
    """
    root = output_dir / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    folder = root / f"step_{state.step:08d}"
    temporary = root / f".{folder.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
    torch.save(
        {"optimizer": optimizer.state_dict(), "random": _random_state()}, temporary / "state.pt"
    )
    record = {"state": asdict(state), "config": asdict(config), "environment": environment()}
    (temporary / "run.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    for path in (*temporary.iterdir(), temporary):
        _flush(path)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    _flush(root)
    for old in list(_complete(root))[:-NUM_KEPT]:
        shutil.rmtree(old.folder, ignore_errors=True)
    return folder


def latest_checkpoint(output_dir: Path) -> CheckpointInfo | None:
    """The complete checkpoint with the highest step, or None."""
    found = list(_complete(output_dir / "checkpoints"))
    return found[-1] if found else None


def load_checkpoint(
    checkpoint: CheckpointInfo, *, model: nn.Module, optimizer: OptimizerSet
) -> RunState:
    """Put weights, optimiser and random generators back where they were; returns the run's state.

    Raises:
        CheckpointError: A file is damaged or belongs to another network.
    """
    folder = checkpoint.folder
    try:
        weights = load_file(folder / "model.safetensors")
        rest = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"checkpoint {str(folder)!r} cannot be read: {error}") from error
    parameters = dict(model.named_parameters())
    if {n: p.shape for n, p in parameters.items()} != {n: w.shape for n, w in weights.items()}:
        raise CheckpointError(f"checkpoint {str(folder)!r} holds the weights of another network")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    optimizer.load_state_dict(rest["optimizer"])
    _set_random_state(rest["random"])
    return checkpoint.state


def check_resumable(checkpoint: CheckpointInfo, config: TrainConfig) -> None:
    """Refuse to go on under a config that would not have led to this checkpoint.

    Free to change: what only reports, saves or stops, and the tokens of stages that the run has not
    finished (with the decay's share), which is how a stable WSD run is lengthened or brought down.

    Raises:
        ConfigError: Names the first key that differs, with both values.
    """
    old, new = _flatten(checkpoint.config), _flatten(json.loads(json.dumps(asdict(config))))
    free = {*_FREE_KEYS, "schedule.decay_share", "schedule.min_ratio"}
    free |= _open_stage_keys(checkpoint, config)
    missing = object()
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key, missing), new.get(key, missing)
        if before == after or any(key == name or key.startswith(name + ".") for name in free):
            continue
        before_text = "absent" if before is missing else repr(before)
        after_text = "absent" if after is missing else repr(after)
        raise ConfigError(
            f"cannot resume from {str(checkpoint.folder)!r}: {key} was {before_text} and is now "
            f"{after_text}; restore it, or choose another output_dir, or pass --no-resume"
        )


def _open_stage_keys(checkpoint: CheckpointInfo, config: TrainConfig) -> set[str]:
    """Keys of the stage lengths that no step so far depends on."""
    old_end = new_end = 0
    keys = set()
    for index, (old, new) in enumerate(
        zip(checkpoint.config["stages"], config.stages, strict=False)
    ):
        old_end += -(-old["tokens"] // old["batch_tokens"])
        new_end += new.num_steps
        if checkpoint.state.step < old_end and checkpoint.state.step <= new_end:
            keys.add(f"stages.{index}.tokens")
    return keys


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
            yield CheckpointInfo(folder, RunState(**record["state"]), record["config"])
        except (OSError, ValueError, KeyError, TypeError):
            logger.warning("passing over %s: not a complete checkpoint", folder)


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list):
        items = ((str(index), item) for index, item in enumerate(tree))  # type: ignore[assignment]
    else:
        return {prefix[:-1]: tree}
    return {k: v for name, item in items for k, v in _flatten(item, f"{prefix}{name}.").items()}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _git_commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()
