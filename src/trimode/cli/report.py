"""`trimode report`: one HTML file about a training run, finished or not."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trimode.training.config import TrainConfig

NAME = "report"
HELP = "write report.html about a training run, finished or not"

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the output_dir of the run")
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="continue this, instead of the starts of held-out documents; may be repeated",
    )
    parser.add_argument(
        "--samples",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="continue some prompts in every mode, if the run is finished (default)",
    )
    parser.add_argument("--device", help="for the samples (default: CUDA where there is one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Write the report; 0 if it is there."""
    path, num_samples = make_report(
        args.run_dir, prompts=args.prompt, device=args.device, is_sampled=args.samples
    )
    record = {"report": str(path), "num_samples": num_samples}
    print(json.dumps(record) if args.json else path)
    return 0


def report_finished(config: TrainConfig) -> None:
    """The report at the end of `trimode train`: if it fails, the run has succeeded all the same."""
    device = None if config.device == "auto" else config.device
    try:
        path, _ = make_report(config.output_dir, device=device)
    except Exception as error:
        logger.warning("no report: %s; `trimode report %s` tries again", error, config.output_dir)
    else:
        logger.info("report %s", path)


def make_report(
    run_dir: str | Path,
    *,
    prompts: Sequence[str] = (),
    device: str | None = None,
    is_sampled: bool = True,
) -> tuple[Path, int]:
    """Write `run_dir/report.html`; returns its path and the number of prompts continued in it.

    Samples that cannot be made are no reason to have no report: it says why, and so does the log.

    Raises:
        ConfigError: The folder is not that of a run, or matplotlib is missing.
    """
    from trimode.errors import TriModeError
    from trimode.evaluation.charts import require_matplotlib
    from trimode.evaluation.report import write_report
    from trimode.evaluation.run_folder import read_run
    from trimode.evaluation.samples import Sample, make_samples

    require_matplotlib()
    found = read_run(run_dir)
    samples: list[Sample] = []
    reason = ""
    if not is_sampled:
        reason = "None were asked for."
    elif not found.is_finished:
        reason = "None yet: they are made once the run is finished."
    else:
        try:
            samples = make_samples(found, prompts=prompts, device=device)
        except (TriModeError, OSError) as error:
            reason = f"None could be made: {error}"
            logger.warning("the report has no samples: %s", error)
    return write_report(found, samples=samples, no_samples=reason), len(samples)
