"""A network on several ranks: rank 0 decides, the others run the same forwards on their parts.

Engine, scheduler, head and choice are rank 0's alone. Before it runs a forward it sends what is fed
(ids, positions, rows and lengths, groups, adapter switches); before it changes whole K/V rows it
sends that. So all ranks' rows hold the K/V of the same tokens, each those of its own heads. Which
part of the weights a rank has is `model.shares`' business, how ranks meet and part that of `ranks`.
"""

from __future__ import annotations

import atexit
import logging
import re
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from trimode.errors import CapacityError, TriModeError
from trimode.model import (
    AdapterSwitch,
    Attend,
    DenseAttention,
    DrafterAdapter,
    KVCache,
    RowAttention,
    TriModeModel,
)
from trimode.model.attention import RowFeed

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Forward:
    """`TriModeModel.encode`, with tensors on the CPU.

    Attributes:
        input_ids, position_ids: As there.
        rows: The cache's number and the feeds of a `RowAttention`; None for a `DenseAttention`.
        attn_mask: Of a `DenseAttention`.
        has_adapter: Whether the adapter is on at all.
        is_on, mask_places: Of its `AdapterSwitch`.
    """

    input_ids: Tensor
    position_ids: Tensor
    rows: tuple[int, Sequence[RowFeed]] | None
    attn_mask: Tensor | None
    has_adapter: bool
    is_on: Tensor | None
    mask_places: Tensor | None


@dataclass(frozen=True, slots=True)
class _NewCache:
    number: int
    num_rows: int
    num_cells: int


@dataclass(frozen=True, slots=True)
class _ChangeRows:
    """A method of a cache, and its arguments."""

    number: int
    method: str
    arguments: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _StillHere:
    pass


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


_Message = _Forward | _NewCache | _ChangeRows | _StillHere | _Stop


class Leader:
    """Rank 0's side: sends what it is about to do. A `trimode.model.modeling.Leader`.

    Several threads may use it; their forwards come one after the other.

    Args:
        adapter: The only one that forwards may have on.
        group: All ranks.
        timeout_s: Of the group.
    """

    def __init__(
        self, adapter: DrafterAdapter | None, *, group: dist.ProcessGroup, timeout_s: float
    ) -> None:
        self._adapter = adapter
        self._group = group
        self._timeout_s = timeout_s
        self._numbers: weakref.WeakKeyDictionary[KVCache, int] = weakref.WeakKeyDictionary()
        self._num_caches = 0
        self._dropped: list[int] = []
        self._ended = ""  # why nothing can be sent any more
        self._lock = threading.RLock()
        self._stop_thread = threading.Event()
        self._thread = threading.Thread(target=self._say_still_here, daemon=True)
        self._thread.start()
        atexit.register(self.close)

    @contextmanager
    def forward(
        self, ids: Tensor, positions: Tensor, attend: Attend, adapter: AdapterSwitch | None
    ) -> Iterator[None]:
        """See `trimode.model.modeling.Leader`."""
        assert adapter is None or adapter.adapter is self._adapter, "others have another adapter"
        rows, attn_mask = None, None
        if isinstance(attend, RowAttention):
            rows = (self._numbers[attend.cache], attend.feeds)
        else:
            assert isinstance(attend, DenseAttention), "others could not make one like it"
            attn_mask = _to_cpu(attend.attn_mask)
        is_on = None if adapter is None else _to_cpu(adapter.is_on)
        places = None if adapter is None else _to_cpu(adapter.mask_places)
        fed = ids.cpu(), positions.cpu()
        with self._told(_Forward(*fed, rows, attn_mask, adapter is not None, is_on, places)):
            yield

    def add_cache(self, cache: KVCache) -> None:
        """See `trimode.model.modeling.Leader`."""
        with self._lock:
            number = self._num_caches
            self._num_caches += 1
            with self._told(_NewCache(number, cache.num_rows, cache.num_cells)):
                is_made = _is_true_on_all(True, self._group)
            if not is_made:
                self._dropped.append(number)
                raise CapacityError(
                    f"{cache.num_rows} rows of {cache.num_cells} cells do not fit into the memory"
                    " of another rank; lower the batch size or the lengths"
                )
            self._numbers[cache] = number
            cache.on_change = lambda method, arguments: self._change(number, method, arguments)
            # What is freed here is freed there with the next message: this may be called anywhere.
            weakref.finalize(cache, self._dropped.append, number).atexit = False

    def close(self) -> None:
        """End the others."""
        with self._lock:
            if not self._ended:
                with suppress(TriModeError), self._told(_Stop()):
                    pass
                self._ended = "it was closed"
                leave()
        self._stop_thread.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        atexit.unregister(self.close)

    def _change(self, number: int, method: str, arguments: tuple[int, ...]) -> None:
        with self._told(_ChangeRows(number, method, arguments)):
            pass

    @contextmanager
    def _told(self, message: _Message) -> Iterator[None]:
        """Send a message, then do here what it says, inside; nobody else sends meanwhile."""
        with self._lock:
            if self._ended:
                raise TriModeError(f"the model shared out over ranks is gone: {self._ended}")
            try:
                dropped = [self._dropped.pop() for _ in range(len(self._dropped))]
                _broadcast([(dropped, message)], self._group)
                yield
            except BaseException as error:
                self._lose(error)

    def _lose(self, error: BaseException) -> NoReturn:
        """The ranks are no longer in step, and never will be again: all must end."""
        self._ended = line_of(error)
        leave()
        if isinstance(error, RuntimeError):  # of gloo and nccl; out of memory is one too
            raise TriModeError(
                f"the ranks of the model have lost one another: {self._ended}; start all of them"
                " again"
            ) from error
        raise error

    def _say_still_here(self) -> None:
        while not (self._stop_thread.wait(self._timeout_s / 4) or self._ended):
            try:
                with self._told(_StillHere()):
                    pass
            except TriModeError as error:
                logger.error("%s", error)
                return


class Follower:
    """Another rank's side: does what it is told.

    Args:
        model, adapter: This rank's parts.
        group: All ranks.
        device: Of this process.
    """

    def __init__(
        self,
        model: TriModeModel,
        adapter: DrafterAdapter | None,
        *,
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        self._model = model
        self._adapter = adapter
        self._group = group
        self._device = device
        self._caches: dict[int, KVCache] = {}

    @torch.inference_mode()
    def run(self) -> None:
        """Do what rank 0 does until it stops."""
        message: _Message = _StillHere()
        while not isinstance(message, _Stop):
            dropped, message = _broadcast([None], self._group)
            for number in dropped:
                self._caches.pop(number, None)
            match message:
                case _Forward():
                    self._forward(message)
                case _ChangeRows():
                    getattr(self._caches[message.number], message.method)(*message.arguments)
                case _NewCache():
                    self._new_cache(message)

    def _forward(self, message: _Forward) -> None:
        device = self._device
        attend: Attend
        if message.rows is None:
            mask = message.attn_mask
            attend = DenseAttention(None if mask is None else mask.to(device))
        else:
            number, feeds = message.rows
            attend = RowAttention(self._caches[number], feeds)
        switch = None
        if message.has_adapter:
            assert self._adapter is not None
            is_on = None if message.is_on is None else message.is_on.to(device)
            places = None if message.mask_places is None else message.mask_places.to(device)
            switch = AdapterSwitch(self._adapter, is_on, places)
        self._model.encode(
            message.input_ids.to(device),
            message.position_ids.to(device),
            attend=attend,
            adapter=switch,
        )

    def _new_cache(self, message: _NewCache) -> None:
        try:
            self._caches[message.number] = self._model.new_cache(
                num_rows=message.num_rows, num_cells=message.num_cells
            )
        except CapacityError as error:
            logger.error("%s", error)
        _is_true_on_all(message.number in self._caches, self._group)


def _broadcast(content: list[Any], group: dist.ProcessGroup) -> Any:
    dist.broadcast_object_list(content, src=0, group=group, device=torch.device("cpu"))
    return content[0]


def _is_true_on_all(flag: bool, group: dist.ProcessGroup) -> bool:
    value = torch.tensor(int(flag))
    dist.all_reduce(value, op=dist.ReduceOp.MIN, group=group)
    return bool(value)


def leave() -> None:
    """Close the connections, which wakes those that wait on them."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _to_cpu(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.cpu()


def line_of(error: BaseException) -> str:
    """What a user can use of its message: the first sentence, without the place in gloo's code."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return re.sub(r"^\[\S*/\S+:\d+\] ", "", line).partition(". ")[0]
