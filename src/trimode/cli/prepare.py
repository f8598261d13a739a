"""`trimode prepare`: documents or conversations to token shards."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from trimode.training.manifest import Manifest

NAME = "prepare"
HELP = "turn documents or conversations into token shards"

_SECONDS_BETWEEN_LINES = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "config", metavar="CONFIG.yaml", help="what to prepare, e.g. configs/*.yaml"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="change the config, e.g. vocab_size=2048 output_dir=data/small overwrite=true",
    )
    parser.add_argument("--json", action="store_true", help="print the manifest as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Prepare; 0 if the whole folder was written."""
    from rich.console import Console

    from trimode.cli.config_file import read_config
    from trimode.training.prepare import prepare
    from trimode.training.prepare_config import PrepareConfig

    config = read_config(PrepareConfig, args.config, args.overrides)
    with _progress(Console(stderr=True)) as progress:
        manifest = prepare(config, progress=progress)
    print(manifest.to_json() if args.json else _summary(manifest), end="")
    return 0


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, int, int | None], None]]:
    """Gives a progress function: a bar for each step on a terminal, else a line now and then."""
    if not console.is_terminal:
        yield _LinesOfProgress(console)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
    )

    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def show(step: str, done: int, total: int | None) -> None:
            if step not in tasks:
                for earlier in tasks.values():
                    bars.stop_task(earlier)
                tasks[step] = bars.add_task(step, total=total)
            bars.update(tasks[step], completed=done, total=total)

        yield show


class _LinesOfProgress:
    """Progress for logs: a line when a step begins and one every ten seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._step = ""
        self._next = 0.0

    def __call__(self, step: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if step == self._step and now < self._next:
            return
        self._step, self._next = step, now + _SECONDS_BETWEEN_LINES
        of_total = "" if total is None else f" of {total}"
        self._console.print(f"{step}: {done}{of_total} documents", highlight=False)


def _summary(manifest: Manifest) -> str:
    """The lines a person wants to see first."""
    train, held_out = manifest.train, manifest.held_out
    lines = [f"wrote {manifest.config['output_dir']}"]
    for name, split in (("train", train), ("held_out", held_out)):
        num_packages = sum(package.split == name for package in manifest.packages)
        lines.append(
            f"{name + ':':<10}{split.num_tokens:>13,} tokens {split.num_documents:>9,} documents "
            f"{split.num_bytes / 1e6:>9.1f} MB {num_packages:>5} packages or files"
        )
    num_bytes, num_tokens = (
        train.num_bytes + held_out.num_bytes,
        train.num_tokens + held_out.num_tokens,
    )
    lines.append(
        f"vocabulary: {manifest.vocab_size} tokens, {num_bytes / num_tokens:.2f} bytes per token"
    )
    skipped = ", ".join(f"{reason} {count}" for reason, count in manifest.skipped.items())
    lines.append(f"skipped: {skipped or 'nothing'}")
    for corrupt in manifest.corrupt:
        lines.append(
            f"corrupt: {corrupt.num_corrupt} of {corrupt.num_records} records of {corrupt.source}"
        )
    if manifest.chat is not None:
        counts = manifest.chat.num_supervised
        learned = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        markers = ", ".join(f"{name} is {how}" for name, how in manifest.chat.markers.items())
        lines.append(f"learned tokens: {learned}")
        lines.append(f"chat template: {manifest.chat.template_source}; {markers or 'no markers'}")
    if manifest.skipped_packages:
        lines.append(f"no permissive licence: {'; '.join(manifest.skipped_packages)}")
    return "\n".join(lines) + "\n"
