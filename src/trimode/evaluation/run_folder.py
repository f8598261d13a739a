"""What a training run left in its folder, read back: `log.jsonl` and `config.json`.

The log of a run that is still going, or that was killed, is read like any other: a line cut short
is counted and passed over.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from trimode.errors import ConfigError

_ABOUT_THE_RUN = ("kind", "stage", "step")


@dataclass(frozen=True, slots=True)
class LogRow:
    """One record of the log.

    Args:
        kind: `step` or `held_out`.
        step: Optimiser steps done.
        stage: Of a `step` record.
        values: Its numbers, those of nested records as `with_adapter/acceptance_length`, those of a
            list by offset, `agreement_by_offset/1` first.
    """

    kind: str
    step: int
    stage: str | None
    values: dict[str, float]


@dataclass(frozen=True, slots=True)
class Series:
    """One quantity over the steps of a run; both of one length."""

    steps: list[int]
    values: list[float]


@dataclass(frozen=True, slots=True)
class Stage:
    """The steps `start` (exclusive) to `stop` of a run, and whether they train diffusion."""

    name: str
    start: int
    stop: int
    has_diffusion: bool


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A run as far as it has come.

    Args:
        folder: Its `output_dir`.
        config: The resolved config, as saved.
        environment: Versions, commit and device, as saved.
        rows: The log in its order.
        num_unreadable: Lines of the log that are not whole records.
    """

    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    rows: tuple[LogRow, ...]
    num_unreadable: int

    @property
    def is_drafter(self) -> bool:
        """Whether a drafter is trained, not a model."""
        return self.config.get("drafter") is not None

    @property
    def has_anchors(self) -> bool:
        """Whether it is trained from anchors."""
        return (self.config.get("drafter") or {}).get("anchors") is not None

    @property
    def stages(self) -> list[Stage]:
        """The stages with the steps they take."""
        parts = self.config.get("stages", [])
        ends = list(accumulate(-(-part["tokens"] // part["batch_tokens"]) for part in parts))
        return [
            Stage(part["name"], start, stop, part.get("diffusion_weight", 0.3) > 0)
            for part, start, stop in zip(parts, [0, *ends], ends, strict=False)
        ]

    @property
    def num_steps(self) -> int:
        """Steps done, as far as the log knows."""
        return max((row.step for row in self.rows), default=0)

    @property
    def total_steps(self) -> int:
        """Steps of all stages."""
        return self.stages[-1].stop if self.stages else 0

    @property
    def is_finished(self) -> bool:
        """Whether the last step and the evaluation after it are in the log."""
        return any(row.kind == "held_out" and row.step >= self.total_steps for row in self.rows)

    @property
    def evaluations(self) -> list[LogRow]:
        """The held-out records."""
        return [row for row in self.rows if row.kind == "held_out"]

    def steps_of(self, stage: str) -> list[LogRow]:
        """The `step` records of a stage."""
        return [row for row in self.rows if row.kind == "step" and row.stage == stage]

    def train(self, name: str) -> Series:
        """A quantity of the `step` records.

        The diffusion loss is left out where there was none: in the stages without it, and in a mean
        that reaches back into one.
        """
        rows = [row for row in self.rows if row.kind == "step"]
        if name == "diffusion_loss":
            begins = {stage.name: stage.start for stage in self.stages if stage.has_diffusion}
            rows = [
                row
                for before, row in pairwise([LogRow("step", 0, None, {}), *rows])
                if row.stage in begins and before.step >= begins[row.stage]
            ]
        return _series(rows, name)

    def held_out(self, name: str) -> Series:
        """A quantity of the held-out records."""
        return _series(self.evaluations, name)


def read_run(folder: str | Path) -> RunFolder:
    """Read what a run has left so far.

    Raises:
        ConfigError: The folder is not that of a training run.
    """
    folder = Path(folder)
    path = folder / "config.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        config, environment = dict(saved["config"]), dict(saved["environment"])
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}); expected the output_dir of a training run"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not the saved config of a training run") from error
    log = folder / "log.jsonl"
    rows, num_unreadable = read_rows(log) if log.exists() else ([], 0)
    return RunFolder(folder, config, environment, tuple(rows), num_unreadable)


def read_rows(path: Path) -> tuple[list[LogRow], int]:
    """The rows of a log, and the number of its lines that are not whole records."""
    rows, num_unreadable = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rows.append(as_row(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError):
            num_unreadable += 1
    return rows, num_unreadable


def as_row(record: dict[str, Any]) -> LogRow:
    """A record as the trainer hands it out.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: It is none.
    """
    numbers = {key: value for key, value in record.items() if key not in _ABOUT_THE_RUN}
    report = dict(numbers.pop("report", {}))
    report.pop("tokens", None)  # those looked at; the record's own are those trained on
    values = _flat({**numbers, **report})
    return LogRow(str(record["kind"]), int(record["step"]), record.get("stage"), values)


def by_offset(row: LogRow, name: str) -> list[float]:
    """The list that a record held under `name`."""
    count = sum(key.startswith(f"{name}/") for key in row.values)
    return [row.values[f"{name}/{offset}"] for offset in range(1, count + 1)]


def _flat(record: dict[str, Any]) -> dict[str, float]:
    values: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, bool):
            values[key] = float(value)
        elif isinstance(value, int | float):
            values[key] = value
        elif isinstance(value, dict | list | tuple):
            inner = value if isinstance(value, dict) else _numbered(value)
            values |= {f"{key}/{name}": number for name, number in _flat(inner).items()}
    return values


def _numbered(values: Sequence[Any]) -> dict[str, Any]:
    return {str(index): value for index, value in enumerate(values, start=1)}


def _series(rows: list[LogRow], name: str) -> Series:
    found = [row for row in rows if math.isfinite(row.values.get(name, math.nan))]
    return Series([row.step for row in found], [row.values[name] for row in found])
