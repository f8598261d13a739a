"""What a person sees while `trimode train` runs: a bar on a terminal, TensorBoard, W&B.

All of it is fed by the records that the trainer logs. Where stderr is not a terminal, the trainer's
own log lines say what the bar would.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from trimode.cli.trackers import event_files, wandb_run

if TYPE_CHECKING:
    from trimode.training.config import TrainConfig

Log = Callable[[dict[str, Any]], None]

_NOT_SHOWN = ("kind", "stage", "step", "tokens", "drafted_tokens", "rate_ratio", "seconds")
_SHOWN_APART = ("grad_norm", "tokens_per_second", "eta_s")


@contextmanager
def training_log(
    config: TrainConfig, *, wandb_project: str | None, is_resumed: bool
) -> Iterator[Log]:
    """Gives the `log` of `train`: shows and keeps every record.

    Args:
        config: The run.
        wandb_project: Also log to this project of Weights & Biases; None does not.
        is_resumed: As for `train`.

    Raises:
        ConfigError: W&B was asked for and cannot be used.
    """
    with ExitStack() as stack:
        logs: list[Log] = []
        if wandb_project is not None:
            logs.append(
                stack.enter_context(wandb_run(config, wandb_project, is_resumed=is_resumed))
            )
        logs.append(stack.enter_context(event_files(config)))
        if sys.stderr.isatty():
            logs.append(stack.enter_context(progress_bar(config.total_steps)))

        def log(record: dict[str, Any]) -> None:
            for each in logs:
                each(record)

        yield log


@contextmanager
def progress_bar(total_steps: int) -> Iterator[Log]:
    """A bar on stderr, with log lines above it; those that say what the bar says are left out."""
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    logger = logging.getLogger("trimode")
    bars: list[tqdm] = []

    def log(record: dict[str, Any]) -> None:
        if record["kind"] != "step":
            return
        if not bars:  # not before there is something to show: a run may be refused at its start
            layout = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
            bars.append(
                tqdm(total=total_steps, file=sys.stderr, dynamic_ncols=True, bar_format=layout)
            )
        bar = bars[0]
        bar.n = record["step"]
        bar.set_description_str(record["stage"], refresh=False)
        bar.postfix = bar_text(record)
        bar.refresh()

    with logging_redirect_tqdm([logger]):
        for handler in logger.handlers:
            handler.addFilter(_is_not_a_step)
        try:
            yield log
        finally:
            for handler in logger.handlers:
                handler.removeFilter(_is_not_a_step)
            for bar in bars:
                bar.close()


def bar_text(record: Mapping[str, Any]) -> str:
    """What stands beside the bar, the most wanted first: a narrow terminal cuts the end off."""
    hidden = (*_NOT_SHOWN, *_SHOWN_APART)
    values = [
        f"{name.removesuffix('_loss').removesuffix('_length')} {value:.3f}"
        for name, value in record.items()
        if name not in hidden
    ]
    minutes, seconds = divmod(round(record["eta_s"]), 60)
    hours, minutes = divmod(minutes, 60)
    left = f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
    speed = f"{record['tokens_per_second']:,.0f} tokens/s"
    return f"{' '.join(values)} [{left} left, {speed}, gradient {record['grad_norm']:.2f}]"


def _is_not_a_step(line: logging.LogRecord) -> bool:
    return not (isinstance(line.args, Mapping) and line.args.get("kind") == "step")
