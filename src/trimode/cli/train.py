"""`trimode train`: run a training config."""

from __future__ import annotations

import argparse
import json
import logging
import os
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
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Train; 0 if the run ended as planned, stopped runs included."""
    # Threads that spin at barriers cost a busy machine most of its speed; read when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from trimode.cli.config_file import read_config
    from trimode.training.config import TrainConfig
    from trimode.training.trainer import train

    logger = logging.getLogger("trimode")  # a run of hours shows its progress without being asked
    logger.setLevel(min(logger.getEffectiveLevel(), logging.INFO))
    config = read_config(TrainConfig, args.config, args.overrides)
    result = train(config, is_resumed=args.resume)
    if args.json:
        record = asdict(result)
        record["final_dir"] = None if result.final_dir is None else str(result.final_dir)
        print(json.dumps(record))
        return 0
    how = f"exported {result.final_dir}" if result.is_finished else "stopped; run again to go on"
    heldout = "" if result.heldout is None else f"; held out: {result.heldout.line()}"
    print(f"step {result.state.step}, {result.state.tokens} tokens: {how}{heldout}")
    return 0
