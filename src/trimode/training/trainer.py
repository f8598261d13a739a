"""The training loop: batches in, weights, checkpoints and a log out."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trimode.checkpoint.io import load_model, read_model_config, resolve
from trimode.errors import ConfigError, TriModeError
from trimode.model import NemotronLabsDiffusionConfig, TriModeConfig, TriModeModel
from trimode.model.modeling import MODEL_CLASSES
from trimode.training.batches import LossTerms, StepBatch, batches, place
from trimode.training.config import StagePart, TrainConfig
from trimode.training.config_checks import (
    check_against_data,
    check_against_model,
    data_fingerprint,
    data_folder,
)
from trimode.training.drafter import DrafterObjective
from trimode.training.evaluate import DrafterReport, HeldOutReport
from trimode.training.joint import JointObjective
from trimode.training.optim import OptimizerSet, make_optimizer, wsd_ratio
from trimode.training.precision import Precision, choose_device, choose_precision
from trimode.training.resume import (
    RunState,
    check_identity,
    check_resumable,
    environment,
    latest_checkpoint,
    load_checkpoint,
    locked,
    save_checkpoint,
)
from trimode.training.shards import TokenShards
from trimode.training.stop_signals import StopSignals

logger = logging.getLogger(__name__)

Evaluate = Callable[[TriModeModel, int], dict[str, Any]]
Log = Callable[[dict[str, Any]], None]
Report = HeldOutReport | DrafterReport


class Objective(Protocol):
    """What is trained, and towards what; the loop, the optimiser and the files are the trainer's.

    Attributes:
        model: The network.
        base_checksum: Of its weights, where they are frozen; else None.
    """

    model: TriModeModel
    base_checksum: int | None

    @property
    def trainable(self) -> nn.Module:
        """What the optimiser updates and a checkpoint holds."""

    def make_batch(self, step: int) -> StepBatch:
        """The batch of a step: a function of the config, the data and the step."""

    def loss(self, micro_batch: Any, batch: StepBatch) -> LossTerms:
        """What one micro-batch (on the device) adds to the loss of its step."""

    def evaluate(self, state: RunState) -> tuple[Report, RunState]:
        """Held-out numbers, and the state with them in it if they choose what is exported."""

    def finish(self) -> Path:
        """Called once, after the last step and its evaluation; the folder with the result."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How a run ended.

    Args:
        state: Steps, tokens and seconds.
        is_finished: False if it was stopped by a signal or by `max_seconds`.
        final_dir: The exported folder (a network, or an adapter), None if not finished.
        heldout: The last held-out report, None if there was none.
    """

    state: RunState
    is_finished: bool
    final_dir: Path | None
    heldout: Report | None


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one optimiser step did; `values` are those that the objective reports."""

    values: dict[str, float]
    grad_norm: float
    rate_ratio: float


def train(
    config: TrainConfig,
    *,
    evaluate: Evaluate | None = None,
    log: Log | None = None,
    is_resumed: bool = True,
) -> TrainResult:
    """Train as `config` says, going on from the newest checkpoint in `output_dir` if there is one.

    Args:
        config: The run.
        evaluate: Called as `evaluate(model, step)` beside each held-out evaluation; its numbers
            are logged.
        log: Called with every record that goes to `output_dir/log.jsonl`.
        is_resumed: False starts afresh and removes older checkpoints of this `output_dir`.

    Raises:
        ConfigError: The config does not fit the data, or the checkpoint it would resume.
        TriModeError: A loss is not finite; the last good checkpoint is kept.
    """
    run = _Run(config, log=log)
    with locked(run.output_dir), StopSignals() as stop, ThreadPoolExecutor(1) as worker:
        run.start(is_resumed=is_resumed)
        steps = range(run.state.step, config.total_steps)
        remaining = batches(run.objective.make_batch, steps=steps, worker=worker)
        while run.state.step < config.total_steps and not run.is_out_of_time and not stop.is_set:
            run.step(next(remaining))
            if run.is_log_due:
                run.log_step()
            if run.is_checkpoint_due:
                run.checkpoint()
            if run.is_evaluation_due:
                run.evaluate(evaluate)
        remaining.close()
        return run.finish(evaluate)


class _Run:
    """The moving parts of one run. `train` is its only user."""

    def __init__(self, config: TrainConfig, *, log: Log | None) -> None:
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.device = choose_device(config.device)
        self.precision: Precision = choose_precision(config.precision, self.device)
        data = TokenShards.open(data_folder(config), "train")
        check_against_data(config, data)
        torch.manual_seed(config.seed)
        model = _make_model(config, data).to(self.device)
        make = JointObjective if config.drafter is None else DrafterObjective
        self.objective: Objective = make(config, data, model=model, precision=self.precision)
        self.optimizer: OptimizerSet = make_optimizer(
            self.objective.trainable,
            config.optimizer,
            has_fast_bf16=self.precision.name == "bf16",
        )
        if config.compile:
            model.encode = torch.compile(model.encode)
        self.state = RunState(base_checksum=self.objective.base_checksum)
        self.heldout: Report | None = None
        self._log_to = log
        self._reports: list[StepReport] = []
        self._started = self._last_saved = self._last_logged = self._last_step = time.monotonic()
        self._tokens_logged = 0
        self._identity = {"data": data_fingerprint(data), "precision": self.precision.name}
        self._stage_ends = list(accumulate(stage.num_steps for stage in config.stages))

    # Life cycle -------------------------------------------------------------------------------

    def start(self, *, is_resumed: bool) -> None:
        """Resume or start afresh, and write down what is run."""
        checkpoint = latest_checkpoint(self.output_dir)
        if checkpoint is not None and is_resumed:
            check_resumable(checkpoint, self.config)
            check_identity(checkpoint, self._identity)
            if checkpoint.state.base_checksum != self.objective.base_checksum:
                raise ConfigError(
                    f"cannot resume from {str(checkpoint.folder)!r}: the weights of model.init "
                    f"{self.config.model.init!r} are not those it was trained on; restore them, "
                    "or choose another output_dir, or pass --no-resume"
                )
            self.state = load_checkpoint(
                checkpoint, model=self.objective.trainable, optimizer=self.optimizer
            )
            logger.info("resuming from %s", checkpoint.folder)
        else:
            shutil.rmtree(self.output_dir / "checkpoints", ignore_errors=True)
        self._trim_log()
        self._tokens_logged = self.state.tokens
        record = {"config": asdict(self.config), "environment": environment()}
        (self.output_dir / "config.json").write_text(json.dumps(record, indent=1) + "\n")
        logger.info(
            "%.2fM parameters, %.2fM trained, %s steps, %s tokens, on %s in %s (%s)",
            sum(p.numel() for p in self.objective.model.parameters()) / 1e6,
            sum(p.numel() for p in self.objective.trainable.parameters()) / 1e6,
            f"{self.config.total_steps:,}",
            f"{self.config.total_tokens:,}",
            self.device,
            self.precision.name,
            self.precision.reason,
        )

    def finish(self, evaluate: Evaluate | None) -> TrainResult:
        """Save; export if all steps are done."""
        if self._reports:
            self.log_step()
        self.checkpoint()
        is_finished = self.state.step >= self.config.total_steps
        final_dir = None
        if is_finished:
            self.evaluate(evaluate)
            final_dir = self.objective.finish()
        else:
            logger.info("stopped at step %d; run again to go on", self.state.step)
        return TrainResult(self.state, is_finished, final_dir, self.heldout)

    # One step ---------------------------------------------------------------------------------

    def step(self, batch: StepBatch) -> None:
        """Forward and backward of every micro-batch, one update."""
        stage = batch.stage
        sums: dict[str, Tensor] = {}
        for micro_batch in batch.micro_batches:
            with self.precision.autocast():
                terms = self.objective.loss(micro_batch.to(self.device), batch)
            terms.loss.backward()
            for name, value in terms.reported.items():
                sums[name] = sums[name] + value if name in sums else value
        norm = nn.utils.clip_grad_norm_(
            self.objective.trainable.parameters(), self.config.optimizer.max_grad_norm
        )
        report = StepReport(
            values={name: float(value) for name, value in sums.items()},
            grad_norm=float(norm),
            rate_ratio=wsd_ratio(self._progress(stage), self.config.schedule),
        )
        self._refuse_non_finite(report, batch)
        self.optimizer.step(report.rate_ratio)
        self._reports.append(report)
        now = time.monotonic()
        self.state = replace(
            self.state,
            step=self.state.step + 1,
            tokens=self.state.tokens + stage.batch_tokens,
            seconds=self.state.seconds + now - self._last_step,
        )
        self._last_step = now

    def _progress(self, stage: StagePart) -> float:
        """Share of the run behind it after the step in hand."""
        return (self.state.tokens + stage.batch_tokens) / self.config.total_tokens

    def _refuse_non_finite(self, report: StepReport, batch: StepBatch) -> None:
        values = {**report.values, "grad_norm": report.grad_norm}
        if all(math.isfinite(value) for value in values.values()):
            return
        shown = ", ".join(f"{name} {value}" for name, value in values.items())
        raise TriModeError(
            f"the loss or its gradient is not finite at step {self.state.step} ({shown}; samples "
            f"{batch.samples.start} to {batch.samples.stop - 1}); the last good checkpoint is kept "
            f"in {str(self.output_dir / 'checkpoints')!r}"
        )

    # What is due ------------------------------------------------------------------------------

    @property
    def is_out_of_time(self) -> bool:
        limit = self.config.max_seconds
        return limit is not None and time.monotonic() - self._started >= limit

    @property
    def is_log_due(self) -> bool:
        is_stage_end = any(self.state.step == end for end in self._stage_ends)
        return is_stage_end or self.state.step % self.config.log_every_steps == 0

    @property
    def is_checkpoint_due(self) -> bool:
        return time.monotonic() - self._last_saved >= self.config.checkpoint_every_s

    @property
    def is_evaluation_due(self) -> bool:
        every = self.config.evaluation.every_steps
        is_last = self.state.step == self.config.total_steps  # `finish` does that one
        return every > 0 and self.state.step % every == 0 and not is_last

    # Reports ----------------------------------------------------------------------------------

    def log_step(self) -> None:
        """Log the means of what the objective reports since the last line."""
        now = time.monotonic()
        rate = (self.state.tokens - self._tokens_logged) / (now - self._last_logged)
        reports, self._reports = self._reports, []
        stage, _ = place(self.config, self.state.step - 1)
        names = reports[0].values
        values = {name: sum(r.values[name] for r in reports) / len(reports) for name in names}
        record = {
            "kind": "step",
            "stage": stage.name,
            "step": self.state.step,
            "tokens": self.state.tokens,
            **values,
            "grad_norm": sum(r.grad_norm for r in reports) / len(reports),
            "rate_ratio": reports[-1].rate_ratio,
            "tokens_per_second": rate,
            "seconds": self.state.seconds,
            "eta_s": (self.config.total_tokens - self.state.tokens) / rate,
        }
        self._last_logged, self._tokens_logged = now, self.state.tokens
        self._log(record)
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in values.items())
        logger.info(
            "%(stage)s step %(step)d: %(shown)s, gradient %(grad_norm).2f, rate x%(rate_ratio).2f, "
            "%(tokens_per_second).0f tokens/s, %(eta_s).0f s left",
            {**record, "shown": shown},
        )

    def evaluate(self, extra: Evaluate | None) -> None:
        """The objective's held-out numbers, and whatever `extra` measures."""
        report, self.state = self.objective.evaluate(self.state)
        self.heldout = report
        record = {"kind": "held_out", "step": self.state.step, "tokens": self.state.tokens}
        record["report"] = asdict(report)
        if extra is not None:
            model = self.objective.model
            is_training = model.training
            record["extra"] = extra(model.eval(), self.state.step)
            model.train(is_training)
        self._log(record)
        logger.info("held out at step %d: %s", self.state.step, report.line())

    def _trim_log(self) -> None:
        """Drop what was logged after the step that the run goes on from; it will be once more."""
        path = self.output_dir / "log.jsonl"
        if path.exists():
            kept = []
            for line in path.read_text(encoding="utf-8").splitlines():
                with suppress(ValueError):  # a line that a kill cut short
                    record = json.loads(line)
                    is_last = self.state.step == self.config.total_steps
                    is_repeated = is_last and record["kind"] == "held_out"
                    if record["step"] < self.state.step + (not is_repeated):
                        kept.append(line + "\n")
            path.write_text("".join(kept), encoding="utf-8")

    def _log(self, record: dict[str, Any]) -> None:
        with (self.output_dir / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self._log_to is not None:
            self._log_to(record)

    # What is written --------------------------------------------------------------------------

    def checkpoint(self) -> None:
        """Write a checkpoint now."""
        folder = save_checkpoint(
            self.output_dir,
            model=self.objective.trainable,
            optimizer=self.optimizer,
            state=self.state,
            config=self.config,
            identity=self._identity,
        )
        self._last_saved = time.monotonic()
        logger.info("checkpoint %s", folder)


def _make_model(config: TrainConfig, data: TokenShards) -> TriModeModel:
    part = config.model
    if part.init is not None:
        folder = resolve(part.init)
        check_against_model(config, data, read_model_config(folder))
        return load_model(folder, device="cpu", dtype=torch.float32)
    shape = asdict(part)
    del shape["init"]
    is_published = not (part.tie_word_embeddings or part.use_qk_norm)
    config_class = NemotronLabsDiffusionConfig if is_published else TriModeConfig
    return MODEL_CLASSES[config_class.model_type](
        config_class(
            **shape,
            vocab_size=data.vocab_size,
            mask_token_id=data.mask_token_id,
            bos_token_id=data.bos_token_id,
            eos_token_id=data.eos_token_id,
        )
    )
