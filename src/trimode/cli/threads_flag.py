"""The flag `--threads`: one number for torch, the native step and every child process."""

from __future__ import annotations

import argparse
import os

from trimode.errors import ConfigError


def add_threads_argument(parser: argparse._ActionsContainer) -> None:
    """Declare it."""
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="threads of a forward on the CPU (default: OMP_NUM_THREADS, else the CPUs it may use)",
    )


def use_threads(number: int | None) -> None:
    """Do as the flag says; None leaves everything as it is. Call it before torch is imported.

    Raises:
        ConfigError: it is no number of threads that this machine could run at once.
    """
    if number is None:
        return
    if number > 0:
        os.environ["OMP_NUM_THREADS"] = str(number)  # read when torch loads, and by child processes
    import torch

    from trimode.model.native.threads import num_allowed

    if not 1 <= number <= num_allowed():
        raise ConfigError(f"--threads is {number}; allowed here: 1 to {num_allowed()}")
    torch.set_num_threads(number)  # if torch was there before
