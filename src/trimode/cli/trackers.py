"""Training records to TensorBoard's event files and to Weights & Biases, both optional packages."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from trimode.errors import ConfigError
from trimode.evaluation.run_folder import LogRow, as_row, read_rows

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from trimode.training.config import TrainConfig

Log = Callable[[dict[str, Any]], None]

logger = logging.getLogger(__name__)

_NOT_TRACKED = ("tokens", "seconds", "eta_s", "block_length")


@contextmanager
def event_files(config: TrainConfig) -> Iterator[Log]:
    """Gives a log that writes `output_dir/tensorboard`; one line and nothing without the package.

    The event files are a copy of `log.jsonl`. They are written anew from it at the first record, by
    when the trainer has cut off what is trained again: so no step is there twice.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.warning("no TensorBoard events are written: pip install 'trimode[train]'")
        yield lambda record: None
        return
    events = _EventFiles(config, SummaryWriter)
    try:
        yield events.write
    finally:
        events.close()


class _EventFiles:
    """Opened at the first record. A disk that is full ends the events, not the run."""

    def __init__(self, config: TrainConfig, make_writer: type[SummaryWriter]) -> None:
        self._config = config
        self._make_writer = make_writer
        self._writer: SummaryWriter | None = None
        self._is_off = False

    def write(self, record: dict[str, Any]) -> None:
        """Add a record that is in the log already."""
        if self._is_off:
            return
        try:
            if self._writer is None:
                self._writer = self._open()
            else:
                _write(self._writer, as_row(record), self._config, at=time.time())
        except OSError as error:
            self._is_off = True
            logger.warning("no more TensorBoard events: %s", error)

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None and not self._is_off:
            with suppress(OSError):
                self._writer.close()

    def _open(self) -> SummaryWriter:
        output_dir = Path(self._config.output_dir)
        folder = output_dir / "tensorboard"
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        writer = self._make_writer(str(folder), purge_step=0, flush_secs=30)
        _copy_log(writer, output_dir / "log.jsonl", self._config)
        return writer


def _copy_log(writer: SummaryWriter, path: Path, config: TrainConfig) -> None:
    """Everything logged so far, at the times at which an unbroken run would have logged it."""
    text = yaml.safe_dump(_as_plain(asdict(config)), sort_keys=False)
    writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()))
    rows, _ = read_rows(path)
    seconds = [row.values.get("seconds", 0.0) for row in rows]
    started = time.time() - max(seconds, default=0.0)
    at = started
    for row in rows:
        at = started + row.values.get("seconds", at - started)
        _write(writer, row, config, at=at)


def _write(writer: SummaryWriter, row: LogRow, config: TrainConfig, *, at: float) -> None:
    for name, value in tracked(row, config).items():
        writer.add_scalar(name, value, row.step, walltime=at)


def tracked(row: LogRow, config: TrainConfig) -> dict[str, float]:
    """The numbers of a record under the names they have in TensorBoard and W&B."""
    group = "train" if row.kind == "step" else row.kind
    found = {
        f"{group}/{name}": value for name, value in row.values.items() if name not in _NOT_TRACKED
    }
    if "rate_ratio" in row.values:
        rate = row.values["rate_ratio"] * config.optimizer.learning_rate
        found[f"{group}/learning_rate"] = rate
    return found


@contextmanager
def wandb_run(config: TrainConfig, project: str, *, is_resumed: bool) -> Iterator[Log]:
    """Gives a log that goes to a run of Weights & Biases, the same one on resume.

    W&B itself drops steps that it has seen, so what is trained again after a kill is not there
    twice.

    Raises:
        ConfigError: The package is missing, or W&B refuses to start.
    """
    try:
        import wandb
    except ImportError as error:
        raise ConfigError("--wandb needs a package that is missing: pip install wandb") from error
    output_dir = Path(config.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    id_path = output_dir / "wandb_run_id"
    is_known = is_resumed and id_path.exists()
    run_id = id_path.read_text(encoding="utf-8").strip() if is_known else secrets.token_hex(4)
    try:
        run = wandb.init(
            project=project,
            id=run_id,
            resume="allow",
            name=output_dir.name,
            dir=str(output_dir),
            config=asdict(config),
            settings=wandb.Settings(console="off"),
        )
    except wandb.Error as error:
        raise ConfigError(f"W&B does not start: {error}") from error
    id_path.write_text(run_id + "\n", encoding="utf-8")

    def log(record: dict[str, Any]) -> None:
        row = as_row(record)
        run.log(tracked(row, config), step=row.step)

    is_ended = False
    try:
        yield log
        is_ended = True
    finally:
        run.finish(exit_code=0 if is_ended else 1)


def _as_plain(value: Any) -> Any:
    """Tuples as lists, which is how YAML knows them."""
    if isinstance(value, dict):
        return {key: _as_plain(item) for key, item in value.items()}
    return [_as_plain(item) for item in value] if isinstance(value, list | tuple) else value
