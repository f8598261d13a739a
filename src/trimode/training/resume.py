"""Checkpoints of a run: written whole or not at all, found by looking, resumed to the last bit.

A checkpoint is a folder `output_dir/checkpoints/step_00001234` with the weights, the optimiser
state, the state of torch's random generators, and `run.json` (step, tokens, config, versions,
commit). All noise and the order of the data are functions of the step, so nothing else has to be
kept.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from trimode._version import __version__
from trimode.errors import CheckpointError, ConfigError
from trimode.training.config import SchedulePart, TrainConfig
from trimode.training.optim import OptimizerSet, wsd_ratio

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
    "precision",
)
"""Keys that may change on resume: they do not change the weights (compile: only by rounding;
precision: what it means is compared by `check_identity`)."""


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
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_score: float | None = None
    best_step: int | None = None
    base_checksum: int | None = None


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A complete checkpoint on disk."""

    folder: Path
    state: RunState
    config: dict[str, Any]
    identity: dict[str, str]


def save_checkpoint(
    output_dir: Path,
    *,
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
        model: What is trained.
        optimizer: Its optimisers.
        state: How far the run is.
        config: The run.
        identity: What must be found again on resume, see `check_identity`.
    """
    root = output_dir / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    for stale in root.glob(".step_*"):
        shutil.rmtree(stale, ignore_errors=True)
    folder = root / f"step_{state.step:08d}"
    temporary, aside = root / f".{folder.name}.new", root / f".{folder.name}.old"
    temporary.mkdir()
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
    torch.save(
        {"optimizer": optimizer.state_dict(), "random": _random_state()}, temporary / "state.pt"
    )
    record = {
        "state": asdict(state),
        "config": asdict(config),
        "identity": identity,
        "environment": environment(),
        "sizes": {path.name: path.stat().st_size for path in temporary.iterdir()},
    }
    (temporary / "run.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    for path in (*temporary.iterdir(), temporary):
        _flush(path)
    if folder.exists():  # the same step again: its old checkpoint is there until the new one is
        folder.rename(aside)
    temporary.rename(folder)
    shutil.rmtree(aside, ignore_errors=True)
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


def check_identity(checkpoint: CheckpointInfo, identity: dict[str, str]) -> None:
    """Refuse to go on with other data, another base or in another precision; say what else differs.

    Args:
        checkpoint: What the run would go on from.
        identity: What the run finds now; compared under every key that the checkpoint has.

    Raises:
        ConfigError: Names what differs.
    """
    for name, before in checkpoint.identity.items():
        if identity.get(name) != before:
            raise ConfigError(
                f"cannot resume from {str(checkpoint.folder)!r}: the {name} was {before} and is "
                f"now {identity.get(name)}; restore it, or choose another output_dir, or pass "
                "--no-resume"
            )
    record = json.loads((checkpoint.folder / "run.json").read_text(encoding="utf-8"))
    now = environment()
    for name in ("torch", "threads", "machine", "device"):
        before = record.get("environment", {}).get(name)
        if before != now[name]:
            logger.warning(
                "%s was %s and is now %s: the run goes on, but not to the same bits",
                *(name, before, now[name]),
            )


def check_resumable(checkpoint: CheckpointInfo, config: TrainConfig) -> None:
    """Refuse to go on under a config that would not have led to this checkpoint.

    Free to change: what only reports, saves or stops, and the tokens of stages that the run has not
    finished (with the decay's share), which is how a stable WSD run is lengthened or brought down.

    Raises:
        ConfigError: Names the first key that differs, with both values.
    """
    old, new = _flatten(checkpoint.config), _flatten(json.loads(json.dumps(asdict(config))))
    free = {*_FREE_KEYS, "schedule.decay_share", "schedule.min_ratio"}
    if config.drafter is not None:  # held-out scores choose the adapter, so they must compare
        free = free - {"evaluation"} | {"evaluation.every_steps"}
    free |= _open_stage_keys(checkpoint, config)
    missing = object()
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key, missing), new.get(key, missing)
        is_newer_than_checkpoint = before is missing and after is None
        if (
            before == after
            or is_newer_than_checkpoint
            or any(key == name or key.startswith(name + ".") for name in free)
        ):
            continue
        before_text = "absent" if before is missing else repr(before)
        after_text = "absent" if after is missing else repr(after)
        raise ConfigError(
            f"cannot resume from {str(checkpoint.folder)!r}: {key} was {before_text} and is now "
            f"{after_text}; restore it, or choose another output_dir, or pass --no-resume"
        )
    _check_rate(checkpoint, config)


def _check_rate(checkpoint: CheckpointInfo, config: TrainConfig) -> None:
    """Refuse changed lengths that would let the learning rate rise again."""
    old_tokens = sum(
        -(-stage["tokens"] // stage["batch_tokens"]) * stage["batch_tokens"]
        for stage in checkpoint.config["stages"]
    )
    old_schedule = SchedulePart(**checkpoint.config["schedule"])
    if (old_tokens, old_schedule) == (config.total_tokens, config.schedule):
        return
    tokens = checkpoint.state.tokens
    before = wsd_ratio(tokens / old_tokens, old_schedule)
    after = wsd_ratio(tokens / config.total_tokens, config.schedule)
    if after > before or tokens < config.schedule.warmup_share * config.total_tokens:
        raise ConfigError(
            f"cannot resume from {str(checkpoint.folder)!r}: under the new lengths the learning "
            f"rate would go from {before:.3f} to {after:.3f} of its base or warm up once more; a "
            "run may be lengthened in its stable part only"
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


@contextmanager
def locked(output_dir: Path) -> Iterator[None]:
    """Makes the folder and keeps every other run out of it until the block ends, or dies.

    Raises:
        ConfigError: It is not a folder, or another run has it.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        file = (output_dir / ".lock").open("w")
    except OSError as error:
        raise ConfigError(f"output_dir {str(output_dir)!r} cannot be used: {error}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"output_dir {str(output_dir)!r} is in use by another run; choose another"
            ) from None
        yield


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
                folder, RunState(**record["state"]), record["config"], record.get("identity", {})
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
