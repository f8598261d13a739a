"""The training loop: batches in, weights, checkpoints and a log out."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimode.checkpoint.io import load_model, read_model_config
from trimode.checkpoint.model_cache import resolve
from trimode.errors import ConfigError, TriModeError
from trimode.model import NemotronLabsDiffusionConfig, TriModeConfig, TriModeModel
from trimode.model.modeling import MODEL_CLASSES
from trimode.training.anchor_objective import AnchorObjective
from trimode.training.batches import StepBatch, batches, place
from trimode.training.checkpoints import (
    CheckpointInfo,
    RunState,
    environment,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from trimode.training.config import StagePart, TrainConfig
from trimode.training.config_checks import (
    check_against_data,
    check_against_model,
    data_fingerprint,
    data_folder,
)
from trimode.training.drafter import DrafterObjective
from trimode.training.joint import JointObjective
from trimode.training.optim import OptimizerSet, make_optimizer, wsd_ratio
from trimode.training.parallel import Parallel, setup
from trimode.training.precision import Precision, choose_device, choose_precision
from trimode.training.resume import check_identity, check_resumable, locked
from trimode.training.run_log import Log, RunLog
from trimode.training.run_objective import Objective, Report
from trimode.training.shards import TokenShards
from trimode.training.stop_signals import StopSignals

logger = logging.getLogger(__name__)

Evaluate = Callable[[TriModeModel, int], dict[str, Any]]


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

    Under `torchrun` every rank calls this, and rank 0 alone logs and exports.

    Args:
        config: The run.
        evaluate: Called as `evaluate(model, step)` on all ranks beside each held-out evaluation;
            rank 0's numbers are logged.
        log: Called with every record that goes to `output_dir/log.jsonl`, on rank 0.
        is_resumed: False starts afresh and removes older checkpoints of this `output_dir`.

    Raises:
        ConfigError: The config does not fit the data, the ranks, or the checkpoint it would resume;
            or the ranks disagree.
        CapacityError: The disk is full; the last good checkpoint is kept.
        TriModeError: A loss is not finite; the last good checkpoint is kept.
    """
    agreed = json.loads(json.dumps(asdict(config) | {"is_resumed": is_resumed}))
    parallel = setup(config.parallel, device=choose_device(config.device), config=agreed)
    try:
        run = _Run(config, parallel=parallel, log=log)
        with ExitStack() as stack:
            with parallel.together():
                if parallel.is_main:
                    stack.enter_context(locked(run.output_dir))
            stop = stack.enter_context(StopSignals())
            worker = stack.enter_context(ThreadPoolExecutor(1))
            run.start(is_resumed=is_resumed)
            _loop(run, evaluate, stop=stop, worker=worker)
            return run.finish(evaluate)
    finally:
        parallel.close()


def _loop(
    run: _Run, evaluate: Evaluate | None, *, stop: StopSignals, worker: ThreadPoolExecutor
) -> None:
    """Step until all steps are done or it is time to stop."""
    total_steps = run.config.total_steps
    steps = range(run.state.step, total_steps)
    remaining = batches(run.objective.make_batch, steps=steps, worker=worker)
    is_stopping, _ = run.decide(stop)
    while run.state.step < total_steps and not is_stopping:
        run.step(next(remaining))
        if run.is_log_due:
            run.log_step()
        if run.is_evaluation_due:
            run.evaluate(evaluate)
        is_stopping, is_checkpoint_due = run.decide(stop)
        is_over = is_stopping or run.state.step == total_steps  # `finish` writes that one
        if is_checkpoint_due and not is_over:
            run.checkpoint()
    remaining.close()


class _Run:
    """The moving parts of one run. `train` is its only user."""

    def __init__(self, config: TrainConfig, *, parallel: Parallel, log: Log | None) -> None:
        self.config, self.parallel = config, parallel
        self.output_dir = Path(config.output_dir)
        self.precision: Precision = choose_precision(config.precision, parallel.device)
        self._identity: dict[str, str] = {"precision": self.precision.name}
        self.objective: Objective
        self.optimizer: OptimizerSet
        with parallel.together():
            self._build()
        for what, value in self._identity.items():
            parallel.check_alike(f"the {what}", value)
        self.state = RunState(base_checksum=self.objective.base_checksum)
        self.heldout: Report | None = None
        self._records = RunLog(self.output_dir, also=log)
        self._reports: list[StepReport] = []
        self._started = self._last_saved = self._last_logged = self._last_step = time.monotonic()
        self._tokens_logged = 0
        self._stage_ends = list(accumulate(stage.num_steps for stage in config.stages))

    def _build(self) -> None:
        """Data, network and optimiser, all checked; nothing is exchanged with other ranks."""
        config, parallel = self.config, self.parallel
        for stage in config.stages:
            parallel.check_batch(
                batch_sequences=stage.batch_sequences,
                micro_batch_sequences=stage.micro_batch_sequences,
            )
        data = TokenShards.open(data_folder(config), "train")
        check_against_data(config, data)
        self._identity["data"] = data_fingerprint(data)
        torch.manual_seed(config.seed)
        model = _make_model(config, data)
        if config.compile and parallel.is_distributed:  # what gathers a layer stays outside
            for layer in model.encoder.layers:
                layer.forward = torch.compile(layer.forward)
        self.objective = _objective_class(config)(
            config, data, model=model, precision=self.precision, parallel=parallel
        )
        self.optimizer = make_optimizer(
            self.objective.trainable,
            config.optimizer,
            has_fast_bf16=self.precision.name == "bf16",
        )
        if config.compile and not parallel.is_distributed:
            model.encode = torch.compile(model.encode)  # type: ignore[method-assign]

    # Life cycle -------------------------------------------------------------------------------

    def start(self, *, is_resumed: bool) -> None:
        """Resume or start afresh, and write down what is run."""
        with self.parallel.together():
            checkpoint = latest_checkpoint(self.output_dir) if is_resumed else None
            if checkpoint is not None:
                self._check_checkpoint(checkpoint)
        newest = None if checkpoint is None else checkpoint.folder.name
        self.parallel.check_alike(f"the newest checkpoint in {str(self.output_dir)!r}", newest)
        if checkpoint is not None:
            self.state = load_checkpoint(
                checkpoint,
                parallel=self.parallel,
                model=self.objective.trainable,
                optimizer=self.optimizer,
            )
            logger.info("resuming from %s", checkpoint.folder)
        self._tokens_logged = self.state.tokens
        if self.config.compile:
            logger.info("compiling: the first steps of every stage take long")
        if self.parallel.is_main:
            self._write_start(is_fresh=checkpoint is None)
        logger.info(
            "%.2fM parameters, %.2fM trained, %s steps, %s tokens, on %d x %s in %s (%s)",
            sum(p.numel() for p in self.objective.model.parameters()) / 1e6,
            sum(p.numel() for p in self.objective.trainable.parameters()) / 1e6,
            f"{self.config.total_steps:,}",
            f"{self.config.total_tokens:,}",
            self.parallel.num_ranks,
            self.parallel.device,
            self.precision.name,
            self.precision.reason,
        )

    def _check_checkpoint(self, checkpoint: CheckpointInfo) -> None:
        check_resumable(checkpoint, self.config)
        check_identity(checkpoint, self._identity)
        if checkpoint.state.base_checksum != self.objective.base_checksum:
            raise ConfigError(
                f"cannot resume from {str(checkpoint.folder)!r}: the weights of model.init "
                f"{self.config.model.init!r} are not those it was trained on; restore them, "
                "or choose another output_dir, or pass --no-resume"
            )

    def _write_start(self, *, is_fresh: bool) -> None:
        if is_fresh:
            shutil.rmtree(self.output_dir / "checkpoints", ignore_errors=True)
        self._records.trim(self.state.step, is_last=self.state.step == self.config.total_steps)
        record = {"config": asdict(self.config), "environment": environment()}
        (self.output_dir / "config.json").write_text(json.dumps(record, indent=1) + "\n")

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
        stage, parallel = batch.stage, self.parallel
        batch = self.objective.count_on_all_ranks(batch)
        sums: dict[str, Tensor] = {}
        for number, micro_batch in enumerate(batch.micro_batches, start=1):
            is_last = number == len(batch.micro_batches)
            parallel.prepare_backward(self.objective.model, is_last=is_last)
            with self.precision.autocast():
                terms = self.objective.loss(micro_batch.to(parallel.device), batch)
            terms.loss.backward()
            for name, value in terms.reported.items():
                sums[name] = sums[name] + value if name in sums else value
        parallel.sum_gradients(self.objective.trainable.parameters())
        norm = parallel.clip_grad_norm(
            self.objective.trainable.parameters(), self.config.optimizer.max_grad_norm
        )
        values = parallel.sum_numbers([float(value) for value in sums.values()])
        report = StepReport(
            values=dict(zip(sums, values, strict=True)),
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
            drafted_tokens=self.state.drafted_tokens + batch.drafted_tokens,
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
        raise self.parallel.common(
            TriModeError(
                f"the loss or its gradient is not finite at step {self.state.step} ({shown}; "
                f"samples {batch.samples.start} to {batch.samples.stop - 1}); the last good "
                f"checkpoint is kept in {str(self.output_dir / 'checkpoints')!r}"
            )
        )

    # What is due ------------------------------------------------------------------------------

    def decide(self, stop: StopSignals) -> tuple[bool, bool]:
        """Whether to stop and whether to save now: clocks and signals of all ranks, one answer."""
        now, limit = time.monotonic(), self.config.max_seconds
        is_out_of_time = limit is not None and now - self._started >= limit
        is_old = now - self._last_saved >= self.config.checkpoint_every_s
        # Steps that were not logged yet would be missing from the means of a run that goes on.
        is_due = is_old and not self._reports
        is_stopping, is_checkpoint_due = self.parallel.any_rank(
            [stop.is_set or is_out_of_time, is_due]
        )
        return is_stopping, is_checkpoint_due

    @property
    def is_log_due(self) -> bool:
        is_stage_end = any(self.state.step == end for end in self._stage_ends)
        return is_stage_end or self.state.step % self.config.log_every_steps == 0

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
        names, drafted = reports[0].values, self.state.drafted_tokens
        values = {name: sum(r.values[name] for r in reports) / len(reports) for name in names}
        record = {
            "kind": "step",
            "stage": stage.name,
            "step": self.state.step,
            "tokens": self.state.tokens,
            **({"drafted_tokens": drafted} if drafted else {}),
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
        shown += f", {drafted:,} drafted tokens" if drafted else ""
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

    def _log(self, record: dict[str, Any]) -> None:
        if self.parallel.is_main:
            self._records.write(record)

    # What is written --------------------------------------------------------------------------

    def checkpoint(self) -> None:
        """Write a checkpoint now."""
        folder = save_checkpoint(
            self.output_dir,
            parallel=self.parallel,
            model=self.objective.trainable,
            optimizer=self.optimizer,
            state=self.state,
            config=self.config,
            identity=self._identity,
        )
        self._last_saved = time.monotonic()
        logger.info("checkpoint %s", folder)


def _objective_class(
    config: TrainConfig,
) -> type[JointObjective] | type[DrafterObjective] | type[AnchorObjective]:
    if config.lora is not None:
        from trimode.training.lora import LoraObjective  # needs PEFT, which is an extra

        return LoraObjective
    if config.drafter is None:
        return JointObjective
    return DrafterObjective if config.drafter.anchors is None else AnchorObjective


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
