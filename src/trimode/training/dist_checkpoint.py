"""Checkpoints of a model that is shared out over ranks: each rank writes its part.

A folder holds the parts (torch.distributed.checkpoint) and `run.json`. Tensors are stored under
their place in the whole tensor, so any number of ranks on any mesh reads what any other wrote, one
rank included. All ranks call every function here together, on a folder that all of them see.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from trimode.checkpoint.whole_folder import hidden, publish, start, writing
from trimode.errors import CheckpointError
from trimode.training.distribute import gather_whole
from trimode.training.optim import OptimizerSet
from trimode.training.parallel import Parallel

RECORD = "run.json"
_MODEL, _OPTIMIZER = "model.", "optimizer."


def save_distributed(
    folder: Path,
    *,
    parallel: Parallel,
    model: nn.Module,
    optimizer: OptimizerSet,
    record: Mapping[str, Any],
) -> Path:
    """Write `folder`, whole or not at all.

    Everything goes to a hidden folder and to the disk; once all ranks have written, rank 0 makes it
    visible by one rename. An older folder of this name is there until then.

    Args:
        folder: On a file system that all ranks share.
        parallel: The ranks.
        model: In place.
        optimizer: Its optimiser.
        record: What `run.json` says, of plain JSON types; rank 0's is written.

    Raises:
        CapacityError: On all ranks, when the disk of one is full.
        TriModeError: On all ranks, when one could not write for another reason.
    """
    with parallel.together(), writing(folder, what="checkpoint"):
        if parallel.is_main:
            start(folder)
        tensors = _model_tensors(model) | _optimizer_tensors(model, optimizer)
    with parallel.together(), writing(folder, what="checkpoint"), _plain_errors(parallel):
        dcp.save(tensors, checkpoint_id=hidden(folder), no_dist=not parallel.is_distributed)
    with parallel.together(), writing(folder, what="checkpoint"):
        if parallel.is_main:
            temporary = hidden(folder)
            sizes = {path.name: path.stat().st_size for path in temporary.iterdir()}
            text = json.dumps({**record, "sizes": sizes}, indent=1)
            (temporary / RECORD).write_text(text, encoding="utf-8")
            publish(folder)
    return folder


def is_distributed_folder(folder: Path) -> bool:
    """Whether a checkpoint was written by `save_distributed`."""
    return (folder / ".metadata").exists()


def load_distributed(
    folder: Path, *, parallel: Parallel, model: nn.Module, optimizer: OptimizerSet
) -> dict[str, Any]:
    """Put weights and optimiser back where they were, on this run's ranks.

    Returns:
        The record of `save_distributed`.

    Raises:
        CheckpointError: A file is missing or damaged, or belongs to another network or optimiser.
    """
    with parallel.together(), _reading(folder):
        record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        tensors = _model_tensors(model)
        _check_same_network(tensors, stored)
        tensors |= _empty_optimizer_tensors(model, optimizer, stored)
    with parallel.together(), _reading(folder), _plain_errors(parallel):
        dcp.load(tensors, checkpoint_id=folder, no_dist=not parallel.is_distributed)
    return record


def full_state_dict(model: nn.Module, *, parallel: Parallel) -> dict[str, Tensor]:
    """The whole weights on the CPU of rank 0, for an export; other ranks get an empty dict.

    One tensor at a time is gathered on the device.
    """
    weights = {}
    _parameters(model)  # nothing left gathered
    for name, tensor in model.state_dict().items():
        whole = gather_whole(tensor) if isinstance(tensor, DTensor) else tensor
        if parallel.is_main:
            weights[name] = whole.detach().to("cpu", copy=True)
    return weights


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    """Name -> this rank's part, whether or not the last forward left anything gathered."""
    if isinstance(model, FSDPModule):
        model.reshard()
    return dict(model.named_parameters())


def _model_tensors(model: nn.Module) -> dict[str, Any]:
    return {_MODEL + name: p.detach() for name, p in _parameters(model).items()}


def _named_states(
    model: nn.Module, optimizer: OptimizerSet
) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    """Key prefix, parameter and live state of every parameter that is optimised."""
    names = {id(parameter): name for name, parameter in _parameters(model).items()}
    for parameter, state in optimizer.parameter_states():
        yield f"{_OPTIMIZER}{names[id(parameter)]}.", parameter, state


def _optimizer_tensors(model: nn.Module, optimizer: OptimizerSet) -> dict[str, Any]:
    return {
        prefix + key: value
        for prefix, _, state in _named_states(model, optimizer)
        for key, value in state.items()
    }


def _empty_optimizer_tensors(
    model: nn.Module, optimizer: OptimizerSet, stored: Mapping[str, Any]
) -> dict[str, Any]:
    """Fills the optimiser's states with zeros of what is stored for them; returns them to be read.

    A state of its parameter's shape lies where the parameter lies; any other is whole everywhere.
    """
    tensors: dict[str, Any] = {}
    by_prefix: dict[str, list[tuple[str, Any]]] = {}
    for name, metadata in stored.items():
        if name.startswith(_OPTIMIZER):
            prefix, _, key = name.rpartition(".")
            by_prefix.setdefault(prefix + ".", []).append((key, metadata))
    for prefix, parameter, state in _named_states(model, optimizer):
        state.clear()
        for key, metadata in by_prefix.pop(prefix, []):
            dtype = metadata.properties.dtype
            if metadata.size == parameter.shape:
                state[key] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
            else:
                state[key] = torch.zeros(metadata.size, dtype=dtype, device=parameter.device)
            tensors[prefix + key] = state[key]
    if by_prefix:
        raise ValueError(f"it holds the optimiser's state of {next(iter(by_prefix))[:-1]}")
    return tensors


def _check_same_network(tensors: Mapping[str, Tensor], stored: Mapping[str, Any]) -> None:
    ours = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    theirs = {
        name: tuple(metadata.size)
        for name, metadata in stored.items()
        if name.startswith(_MODEL) and isinstance(metadata, TensorStorageMetadata)
    }
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"it belongs to another network: {name} has the shape "
                f"{theirs.get(name, 'absent')} there and {ours.get(name, 'absent')} here"
            )


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Says in one line which checkpoint cannot be read."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"checkpoint {str(folder)!r} cannot be read: {reason}") from error


@contextmanager
def _plain_errors(parallel: Parallel) -> Iterator[None]:
    """Torch's checkpoint exception, raised on all ranks at once and no `Exception`, as an OSError;
    and without its warning that one rank is what one rank asked for."""
    with warnings.catch_warnings():
        if not parallel.is_distributed:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            rank, (inner, _) = next(iter(error.failures.items()))
            raise OSError(f"rank {rank}: {inner}") from inner
