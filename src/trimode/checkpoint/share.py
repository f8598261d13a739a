"""Reading one rank's part of a checkpoint: no rank ever holds, or reads, the whole of it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from trimode.checkpoint.io import (
    StoredTensor,
    as_dtype,
    check_weights,
    read_headers,
    read_model_config,
)
from trimode.model import TriModeModel
from trimode.model.modeling import MODEL_CLASSES
from trimode.model.shares import as_share, check_ranks, part_slices, placement_of

HEAD = "diffusion_head.weight"


def load_share(
    folder: Path, *, mesh: DeviceMesh, device: torch.device | str, dtype: str | torch.dtype
) -> TriModeModel:
    """Check a folder and load this rank's part of its network, in evaluation mode.

    Args:
        folder: The checkpoint, the same on every rank.
        mesh: The ranks, in one dimension. On others than the first the head stays on torch's meta
            device, without memory, unless it is the embedding.
        device: Of this rank.
        dtype: Of the weights.

    Raises:
        CheckpointError: it cannot be used, and why.
        ConfigError: the ranks cannot share it out evenly.
    """
    dtype = as_dtype(dtype)
    config = read_model_config(folder)
    check_ranks(config, mesh.size())
    check_weights(folder, config)
    with torch.device("meta"):
        model = MODEL_CLASSES[config.model_type](config)
    stored = read_headers(folder)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if config.tie_word_embeddings or mesh.get_local_rank() != 0:
        names.remove(HEAD)
    with ExitStack() as stack:
        files = {
            file: stack.enter_context(safe_open(file, framework="pt"))
            for file in {tensor.file for tensor in stored.values()}
        }
        for name in names:
            placement = placement_of(name)
            slices = _all(stored[name])
            if isinstance(placement, Shard):
                slices = part_slices(stored[name].shape, placement, mesh)
            part: Tensor = files[stored[name].file].get_slice(name)[slices]
            parent, _, leaf = name.rpartition(".")
            part = part.to(device, dtype).contiguous()
            setattr(model.get_submodule(parent), leaf, as_share(part, placement, mesh))
    if config.tie_word_embeddings:
        model.diffusion_head.weight = model.encoder.embed_tokens.weight
    model.num_ranks = mesh.size()
    return model.eval()


def _all(tensor: StoredTensor) -> tuple[slice, ...]:
    return (slice(None),) * len(tensor.shape)
