"""`trimode train`: run a training config."""

from __future__ import annotations

import argparse
import json
import logging
import os
from contextlib import nullcontext
from dataclasses import asdict

NAME = "train"
HELP = "train a model from a YAML config"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("config", metavar="CONFIG.yaml", help="what to run, e.g. configs/*.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="change the config, e.g. optimizer.learning_rate=1e-3 stages.0.tokens=1000000",
    )
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on from the newest checkpoint in output_dir (default); --no-resume starts afresh "
        "and removes the checkpoints there",
    )
    parser.add_argument(
        "--wandb",
        metavar="PROJECT",
        help="also log to this project of Weights & Biases; TensorBoard's files are always written",
    )
    parser.add_argument(
        "--report",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write output_dir/report.html once the run is finished (default)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Train; 0 if the run ended as planned, stopped runs included."""
    from trimode.cli.config_file import read_config
    from trimode.cli.report import report_finished
    from trimode.cli.train_progress import training_log
    from trimode.errors import CheckpointError, ConfigError, UnsupportedError
    from trimode.training.agreement import is_told_elsewhere
    from trimode.training.config import TrainConfig
    from trimode.training.trainer import train

    is_main = os.environ.get("RANK", "0") == "0"  # torchrun counts the ranks
    logger = logging.getLogger("trimode")  # a run of hours shows its progress without being asked
    logger.setLevel(min(logger.getEffectiveLevel(), logging.INFO) if is_main else logging.ERROR)
    config = read_config(TrainConfig, args.config, args.overrides)
    seen = training_log(config, wandb_project=args.wandb, is_resumed=args.resume)
    try:
        with seen if is_main else nullcontext() as log:
            result = train(config, log=log, is_resumed=args.resume)
    except Exception as error:
        if is_told_elsewhere(error):
            is_bad_input = isinstance(error, (ConfigError, CheckpointError, UnsupportedError))
            raise SystemExit(2 if is_bad_input else 1) from None
        raise
    if not is_main:
        return 0
    if args.report and result.is_finished:
        report_finished(config)
    if args.json:
        record = asdict(result)
        record["final_dir"] = None if result.final_dir is None else str(result.final_dir)
        print(json.dumps(record))
        return 0
    how = f"exported {result.final_dir}" if result.is_finished else "stopped; run again to go on"
    if result.state.best_step is not None and result.is_finished:
        best = f"step {result.state.best_step}, acceptance length {result.state.best_score:.3f}"
        how += f", the best of its evaluations ({best})"
    heldout = "" if result.heldout is None else f"; last held out: {result.heldout.line()}"
    print(f"step {result.state.step}, {result.state.tokens} tokens: {how}{heldout}")
    return 0
