"""The training loop: batches in, weights, checkpoints and a log out."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trimode.errors import TriModeError
from trimode.model import NemotronLabsDiffusionConfig, TriModeConfig, TriModeModel
from trimode.model.modeling import MODEL_CLASSES
from trimode.training.batches import StepBatch, batches, place
from trimode.training.config import StagePart, TrainConfig, check_against_data, data_folder
from trimode.training.evaluate import HeldOutReport, evaluate_heldout
from trimode.training.export import export_model
from trimode.training.objective import loss_sums
from trimode.training.optim import OptimizerSet, make_optimizer, wsd_ratio
from trimode.training.precision import Precision, choose_device, choose_precision
from trimode.training.resume import (
    RunState,
    check_resumable,
    environment,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from trimode.training.shards import TokenShards
from trimode.training.stop_signals import StopSignals

logger = logging.getLogger(__name__)

Evaluate = Callable[[TriModeModel, int], dict[str, Any]]
Log = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How a run ended.

    Args:
        state: Steps, tokens and seconds.
        is_finished: False if it was stopped by a signal or by `max_seconds`.
        final_dir: The exported folder, None if not finished.
        heldout: The last held-out report, None if there was none.
    """

    state: RunState
    is_finished: bool
    final_dir: Path | None
    heldout: HeldOutReport | None


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one optimiser step did."""

    ar_loss: float
    diffusion_loss: float
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
    run.start(is_resumed=is_resumed)
    with StopSignals() as stop, ThreadPoolExecutor(1) as worker:
        remaining = batches(config, run.data, first_step=run.state.step, worker=worker)
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
        self.data_folder = data_folder(config)
        self.data = TokenShards.open(self.data_folder, "train")
        check_against_data(config, self.data)
        torch.manual_seed(config.seed)
        self.model = _make_model(config, self.data).to(self.device).train()
        self.optimizer: OptimizerSet = make_optimizer(
            self.model, config.optimizer, has_fast_bf16=self.precision.name == "bf16"
        )
        if config.compile:
            self.model.encode = torch.compile(self.model.encode)
        self.state = RunState()
        self.heldout: HeldOutReport | None = None
        self._log_to = log
        self._reports: list[StepReport] = []
        self._started = self._last_saved = self._last_logged = self._last_step = time.monotonic()
        self._tokens_logged = 0

    # Life cycle -------------------------------------------------------------------------------

    def start(self, *, is_resumed: bool) -> None:
        """Resume or start afresh, and write down what is run."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        checkpoint = latest_checkpoint(self.output_dir)
        if checkpoint is not None and is_resumed:
            check_resumable(checkpoint, self.config)
            self.state = load_checkpoint(checkpoint, model=self.model, optimizer=self.optimizer)
            logger.info("resuming from %s", checkpoint.folder)
        elif checkpoint is not None:
            shutil.rmtree(self.output_dir / "checkpoints")
            (self.output_dir / "log.jsonl").unlink(missing_ok=True)
        self._tokens_logged = self.state.tokens
        record = {"config": asdict(self.config), "environment": environment()}
        (self.output_dir / "config.json").write_text(json.dumps(record, indent=1) + "\n")
        logger.info(
            "%.2fM parameters, %s steps, %s tokens, on %s in %s (%s)",
            sum(p.numel() for p in self.model.parameters()) / 1e6,
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
            final_dir = export_model(
                self.model,
                self.output_dir / "final",
                part=self.config.export,
                tokenizer_dir=self.data_folder / "tokenizer",
            )
        else:
            logger.info("stopped at step %d; run again to go on", self.state.step)
        return TrainResult(self.state, is_finished, final_dir, self.heldout)

    # One step ---------------------------------------------------------------------------------

    def step(self, batch: StepBatch) -> None:
        """Forward and backward of every micro-batch, one update."""
        stage, counts = batch.stage, batch.counts
        ar_sum = torch.zeros((), device=self.device)
        diffusion_sum = torch.zeros((), device=self.device)
        for micro_batch in batch.micro_batches:
            with self.precision.autocast():
                sums = loss_sums(self.model, micro_batch.to(self.device))
                loss = sums.total(counts, diffusion_weight=stage.diffusion_weight)
            loss.backward()
            ar_sum += sums.ar.detach()
            diffusion_sum += sums.diffusion.detach()
        norm = nn.utils.clip_grad_norm_(
            self.model.parameters(), self.config.optimizer.max_grad_norm
        )
        report = StepReport(
            ar_loss=float(ar_sum) / max(counts.num_ar_targets, 1),
            diffusion_loss=float(diffusion_sum) / max(counts.num_maskable, 1),
            grad_norm=float(norm),
            rate_ratio=wsd_ratio(self._progress(stage), self.config.schedule),
        )
        self._refuse_non_finite(report, batch)
        self.optimizer.step(report.rate_ratio)
        self._reports.append(report)
        now = time.monotonic()
        self.state = RunState(
            step=self.state.step + 1,
            tokens=self.state.tokens + stage.batch_tokens,
            seconds=self.state.seconds + now - self._last_step,
        )
        self._last_step = now

    def _progress(self, stage: StagePart) -> float:
        """Share of the run behind it after the step in hand."""
        return (self.state.tokens + stage.batch_tokens) / self.config.total_tokens

    def _refuse_non_finite(self, report: StepReport, batch: StepBatch) -> None:
        values = (report.ar_loss, report.diffusion_loss, report.grad_norm)
        if all(value - value == 0 for value in values):
            return
        raise TriModeError(
            f"the loss or its gradient is not finite at step {self.state.step} (AR {values[0]}, "
            f"diffusion {values[1]}, gradient norm {values[2]}; samples {batch.samples.start} to "
            f"{batch.samples.stop - 1}); the last good checkpoint is kept in "
            f"{str(self.output_dir / 'checkpoints')!r}"
        )

    # What is due ------------------------------------------------------------------------------

    @property
    def is_out_of_time(self) -> bool:
        limit = self.config.max_seconds
        return limit is not None and time.monotonic() - self._started >= limit

    @property
    def is_log_due(self) -> bool:
        return self.state.step % self.config.log_every_steps == 0

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
        """Log the mean losses since the last line."""
        now = time.monotonic()
        rate = (self.state.tokens - self._tokens_logged) / (now - self._last_logged)
        reports, self._reports = self._reports, []
        stage, _ = place(self.config, self.state.step - 1)
        record = {
            "kind": "step",
            "stage": stage.name,
            "step": self.state.step,
            "tokens": self.state.tokens,
            "ar_loss": sum(r.ar_loss for r in reports) / len(reports),
            "diffusion_loss": sum(r.diffusion_loss for r in reports) / len(reports),
            "grad_norm": sum(r.grad_norm for r in reports) / len(reports),
            "rate_ratio": reports[-1].rate_ratio,
            "tokens_per_second": rate,
            "seconds": self.state.seconds,
            "eta_s": (self.config.total_tokens - self.state.tokens) / rate,
        }
        self._last_logged, self._tokens_logged = now, self.state.tokens
        self._log(record)
        logger.info(
            "%(stage)s step %(step)d: AR %(ar_loss).3f, diffusion %(diffusion_loss).3f, "
            "gradient %(grad_norm).2f, rate x%(rate_ratio).2f, %(tokens_per_second).0f tokens/s, "
            "%(eta_s).0f s left",
            record,
        )

    def evaluate(self, extra: Evaluate | None) -> None:
        """Held-out losses and draft accuracy, and whatever `extra` measures."""
        report = evaluate_heldout(
            self.model,
            TokenShards.open(self.data_folder, self.config.evaluation.split),
            config=self.config,
            device=self.device,
            precision=self.precision,
        )
        self.heldout = report
        record = {"kind": "held_out", "step": self.state.step, "tokens": self.state.tokens}
        record["report"] = asdict(report)
        if extra is not None:
            self.model.eval()
            record["extra"] = extra(self.model, self.state.step)
            self.model.train()
        self._log(record)
        logger.info("held out at step %d: %s", self.state.step, report.line())

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
            model=self.model,
            optimizer=self.optimizer,
            state=self.state,
            config=self.config,
        )
        self._last_saved = time.monotonic()
        logger.info("checkpoint %s", folder)


def _make_model(config: TrainConfig, data: TokenShards) -> TriModeModel:
    part = config.model
    if part.init is not None:
        return TriModeModel.from_pretrained(part.init, dtype=torch.float32)
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
