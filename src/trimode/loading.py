"""`trimode.load`: from a path or a name to a model that decodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trimode.arguments import as_device
from trimode.checkpoint.adapter import check_use, find_adapter, load_adapter, merge_lora
from trimode.checkpoint.adapter_tokenizer import adapter_tokenizer
from trimode.checkpoint.generation_defaults import read_generation_defaults
from trimode.checkpoint.io import load_model, load_tokenizer, read_model_config
from trimode.checkpoint.model_cache import default_name, resolve
from trimode.checkpoint.names import KNOWN, NO_DRAFTER, POCKET
from trimode.checkpoint.share import load_share
from trimode.engine.ranks import Ranks, join
from trimode.errors import ConfigError
from trimode.model.native.modules import refusal, refusal_of
from trimode.model.shares import share_adapter
from trimode.model.weights import as_weights
from trimode.runtime import TriModeLM


def load(
    path: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    lora: str | Path | None = None,
    drafter: str | Path | None = None,
    weights: str | None = None,
    tensor_parallel: bool = False,
) -> TriModeLM:
    """Open a checkpoint.

    Adapters are PEFT LoRA folders, each given by its path or by its name inside the checkpoint.

    Args:
        path: A name (`pocket`, `smollm2`), a folder, a GGUF file, or an id on the Hugging Face hub;
            None is the default model: `smollm2` where its weights are here or can be fetched, else
            `pocket`, as always with `tensor_parallel`. A folder of a model's name is given as
            `./smollm2`, or as a `Path`. A GGUF file is converted once, into the user's cache.
        device: Default: CUDA where there is one, else the CPU.
        dtype: Default: bfloat16 on CUDA, and on a CPU where the native step runs the model, in half
            of the memory and with no loss of quality that could be measured; else float32, in which
            PyTorch is quick on any CPU, and from which `int8` is rounded.
        lora: Merged into the weights, so that every mode sees it, e.g. `instruct_lora` of the
            default model, or what PEFT trained on the source of a converted one. If a tokenizer or
            a chat template lies beside it, that one is used.
        drafter: On for drafts, or for all that its files say it serves, and never in the AR view;
            e.g. `linear_spec_lora`. None is the one that the model's name brings (`smollm2` has
            one), `none` is none at all.
        weights: `plain`, `native` or `int8`; see `TriModeModel.pack`. Default: native where the
            native step can run the model, else plain; always plain with `tensor_parallel`.
        tensor_parallel: Share the network out over the ranks that torchrun has started; all of them
            load it. Then rank 0 generates and calls `.ranks.close()`, the others `.ranks.follow()`.

    Raises:
        CheckpointError: it cannot be used, and why.
        ConfigError: there is no such device, or no such form of the weights there; torchrun has not
            started this process, or its ranks cannot share the network out.
    """
    if path is None:
        path = POCKET if tensor_parallel else default_name()  # the ranks must not differ
    drafter = _own_drafter(path) if drafter is None else drafter
    drafter = None if drafter == NO_DRAFTER else drafter
    options = {"dtype": dtype, "lora": lora, "drafter": drafter, "weights": weights}
    if not tensor_parallel:
        return _load(resolve(path), None, device=as_device(device), **options)
    if weights not in (None, "plain"):
        raise ConfigError(f"weights is {weights!r}; allowed with tensor_parallel: plain")
    options["weights"] = "plain"
    ranks = join(as_device(device))
    try:
        return _load(resolve(path), ranks, device=ranks.device, **options)
    except BaseException:
        ranks.close()
        raise


def _own_drafter(path: str | Path) -> Path | None:
    known = KNOWN.get(path) if isinstance(path, str) else None
    return None if known is None else known.drafter


def _load(folder: Path, ranks: Ranks | None, *, device: torch.device, **options: Any) -> TriModeLM:
    dtype, lora, drafter, weights = (options[n] for n in ("dtype", "lora", "drafter", "weights"))
    if weights is not None:
        weights = as_weights(weights)  # refused before all is read
    if dtype is None:
        can_native = ranks is None and weights in (None, "native")
        dtype = _default_dtype(folder, device, can_native=can_native)
    if ranks is None:
        model = load_model(folder, device=device, dtype=dtype)
    else:
        model = load_share(folder, mesh=ranks.mesh, device=device, dtype=dtype)
    own = tokenizer = load_tokenizer(folder)
    if lora is not None:
        lora = find_adapter(lora, checkpoint=folder)
        merge_lora(lora, model=model)
        tokenizer = adapter_tokenizer(lora, config=model.config, own=own)
    adapter = None
    if drafter is not None:
        drafter = find_adapter(drafter, checkpoint=folder)
        check_use(drafter, "drafter")
        adapter = load_adapter(drafter, model=model)
    if weights is None:
        weights = "native" if ranks is None and refusal(model) is None else "plain"
    model.pack(as_weights(weights))
    if ranks is not None:
        if adapter is not None:
            share_adapter(adapter, ranks.mesh)
        ranks.connect(model, adapter)
    defaults = read_generation_defaults(folder, model.config)
    if tokenizer is not own and tokenizer is not None:
        defaults = defaults.ended_also_by(tokenizer.eos_token_id, model.config)
    return TriModeLM(model, tokenizer, adapter=adapter, ranks=ranks, generation_defaults=defaults)


def _default_dtype(folder: Path, device: torch.device, *, can_native: bool) -> torch.dtype:
    dtype = torch.bfloat16
    if device.type == "cuda":
        return dtype
    is_quick = can_native and (
        refusal_of(read_model_config(folder), device=device, dtype=dtype) is None
    )
    return dtype if is_quick else torch.float32
