"""How the ranks that share a network meet, who of them leads, and how they part.

Started by torchrun: gloo on CPUs, nccl on CUDA devices, messages always by gloo. A rank that waits
hears from rank 0 a few times per `TIMEOUT_S`, so one that has died, or hangs, ends all others.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from trimode.engine.tensor_parallel import Follower, Leader, leave, line_of
from trimode.errors import ConfigError, TriModeError
from trimode.model import DrafterAdapter, TriModeModel

TIMEOUT_S = 60.0
"""A rank that does not answer for so long (its process hangs, its machine is gone) is lost. One
whose process ends is lost at once."""

LOADING_S = 1800.0
"""Ranks wait so long for one another until all have read their parts."""

_ENVIRONMENT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_ENDING = (signal.SIGINT, signal.SIGTERM)


class Ranks:
    """This rank among those that share a network.

    Args:
        mesh: All of them, in one dimension.
        device: Of this process.
        timeout_s: After which a rank that does not answer is lost.
    """

    def __init__(self, mesh: DeviceMesh, *, device: torch.device, timeout_s: float) -> None:
        self.mesh = mesh
        self.device = device
        self.rank = mesh.get_local_rank()
        self._timeout_s = timeout_s
        self._leader: Leader | None = None
        self._follower: Follower | None = None

    @property
    def is_leader(self) -> bool:
        """Whether this is the rank that decides."""
        return self.rank == 0

    def connect(self, model: TriModeModel, adapter: DrafterAdapter | None) -> None:
        """Wait until all ranks have loaded their parts; from now on rank 0 leads. All call it.

        Raises:
            ConfigError: ranks have loaded different things.
            TriModeError: a rank has ended meanwhile.
        """
        found: list[Any] = [None] * self.mesh.size()
        try:
            dist.all_gather_object(found, _description(model, adapter))
        except RuntimeError as error:
            raise TriModeError(f"a rank ended while others loaded: {line_of(error)}") from error
        for rank, theirs in enumerate(found):
            if theirs != found[0]:
                raise ConfigError(
                    f"rank {rank} has loaded another model, dtype or drafter than rank 0; start"
                    " all ranks with the same command"
                )
        group = self.mesh.get_group()
        if not self.is_leader:
            self._follower = Follower(model, adapter, group=group, device=self.device)
        elif self.mesh.size() > 1:
            self._leader = Leader(adapter, group=group, timeout_s=self._timeout_s)
            model.leader = self._leader

    def follow(self) -> None:
        """Run rank 0's forwards until it closes; for the ranks other than 0.

        Meanwhile the signals that ask a process to end are rank 0's business, which may have texts
        to finish: SIGINT and SIGTERM do nothing here.

        Raises:
            TriModeError: rank 0 or another rank is lost.
        """
        assert self._follower is not None, "rank 0 leads"
        try:
            with _left_to_rank_0():
                self._follower.run()
        except RuntimeError as error:  # of gloo and nccl; out of memory is one too
            raise TriModeError(f"rank {self.rank} ends: {line_of(error)}") from error
        finally:
            leave()

    def close(self) -> None:
        """End the others and leave; nothing of a model shared out may be used afterwards."""
        if self._leader is not None:
            self._leader.close()
        else:
            leave()


def join(device: torch.device, *, timeout_s: float = TIMEOUT_S) -> Ranks:
    """Meet the other ranks that torchrun has started.

    Args:
        device: `cpu` or `cuda`; of several CUDA devices a rank takes that of its local rank.
        timeout_s: After which a rank that does not answer is lost.

    Raises:
        ConfigError: torchrun has not started this process, or there is no device for it.
        TriModeError: the others are not there.
    """
    missing = [name for name in _ENVIRONMENT if name not in os.environ]
    if missing:
        raise ConfigError(
            f"tensor_parallel is on, but {missing[0]} is not in the environment; start the same"
            " command on all ranks by torchrun, e.g. `torchrun --nproc-per-node 2 -m trimode ...`"
        )
    is_cuda = device.type == "cuda"
    if is_cuda:
        device = _own_device(device)
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if is_cuda else "gloo", timeout=timedelta(seconds=LOADING_S)
        )
        group = dist.new_group(timeout=timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise TriModeError(f"the ranks did not meet: {line_of(error)}") from error
    mesh = DeviceMesh.from_group(group, device.type)
    return Ranks(mesh, device=device, timeout_s=timeout_s)


def _own_device(device: torch.device) -> torch.device:
    local_rank, num_devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if device.index is not None:
        raise ConfigError(
            f"device is '{device}'; allowed with tensor_parallel: cuda, of which each rank takes"
            " the one of its local rank"
        )
    if local_rank >= num_devices:
        raise ConfigError(
            f"local rank {local_rank} has no CUDA device; give torchrun a --nproc-per-node of at"
            f" most {num_devices}"
        )
    return torch.device("cuda", local_rank)


def _description(model: TriModeModel, adapter: DrafterAdapter | None) -> str:
    parts: list[object] = []
    if adapter is not None:
        shapes = [(name, list(tensor.shape)) for name, tensor in adapter.named_parameters()]
        parts = [adapter.form, *shapes]
    return json.dumps([model.config.to_dict(), str(model.dtype), parts], default=str)


@contextmanager
def _left_to_rank_0() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_ENDING = (signal.SIGINT, signal.SIGTERM)
