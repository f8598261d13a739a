"""Whether a run may go on from a checkpoint, and in a folder."""

from __future__ import annotations

import fcntl
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trimode.errors import ConfigError
from trimode.training.checkpoints import CheckpointInfo, environment
from trimode.training.config import SchedulePart, TrainConfig
from trimode.training.optim import wsd_ratio

logger = logging.getLogger(__name__)

_FREE_KEYS = (
    "output_dir",
    "max_seconds",
    "checkpoint_every_s",
    "log_every_steps",
    "compile",
    "activation_checkpointing",
    "evaluation",
    "export",
    "precision",
    "parallel",
)
"""Keys that may change on resume: they do not change the weights (compile, parallel: only by
rounding; precision: what it means is compared by `check_identity`)."""


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
    now = environment()
    for name in ("torch", "threads", "machine", "device"):
        then = checkpoint.environment.get(name)
        if then != now[name]:
            logger.warning(
                "%s was %s and is now %s: the run goes on, but not to the same bits",
                *(name, then, now[name]),
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


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list):
        items = ((str(index), item) for index, item in enumerate(tree))  # type: ignore[assignment]
    else:
        return {prefix[:-1]: tree}
    return {k: v for name, item in items for k, v in _flatten(item, f"{prefix}{name}.").items()}
