"""Opening and writing checkpoint folders in the Hugging Face layout.

Every defect is one `CheckpointError`. transformers does the reading, writing and sharding; this
file checks first, from the safetensors headers alone, so that a wrong folder is refused before a
byte of weights is read.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from trimode.errors import CheckpointError, TriModeError
from trimode.model import TriModeModel
from trimode.model.configuration import TriModeConfig
from trimode.model.modeling import MODEL_CLASSES

DEFAULT_MODEL = Path(__file__).parents[1] / "assets" / "pocket"
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def resolve(path: str | Path | None) -> Path:
    """The local folder of a checkpoint: the default model, a folder, or a snapshot from the hub."""
    if path is None:
        return DEFAULT_MODEL
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{path} is a file; a checkpoint is a folder with {CONFIG_NAME}")
    if str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
        raise CheckpointError(f"{path}: no such folder")
    try:
        return Path(snapshot_download(str(path)))
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{path}: no such folder, and not opened from the hub: {reason}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a JSON object")
    return content


def read_model_config(folder: Path) -> TriModeConfig:
    """The configuration of a checkpoint folder, of a model type that this package reads."""
    content = read_json(folder / CONFIG_NAME)
    model_type = content.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODEL_CLASSES:
        raise CheckpointError(
            f"{folder / CONFIG_NAME}: model_type is {model_type!r}; "
            f"allowed: {', '.join(MODEL_CLASSES)}"
        )
    try:
        return MODEL_CLASSES[model_type].config_class.from_dict(content)
    except (TriModeError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{folder / CONFIG_NAME}: {error}") from error


def check_weights(folder: Path, config: TriModeConfig) -> None:
    """Compare the tensors that a folder holds with those the configuration asks for.

    Raises:
        CheckpointError: with the counts and first names of missing, extra and misshapen tensors.
    """
    found = _read_headers(folder)
    with torch.device("meta"):
        model = MODEL_CLASSES[config.model_type](config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings and "diffusion_head.weight" not in found:
        del expected["diffusion_head.weight"]
    problems = [
        _describe("missing", sorted(expected.keys() - found.keys())),
        _describe("extra", sorted(found.keys() - expected.keys())),
        _describe(
            "misshapen",
            [
                f"{name} {list(found[name])} instead of {list(shape)}"
                for name, shape in expected.items()
                if name in found and found[name] != shape
            ],
        ),
    ]
    if any(problems):
        raise CheckpointError(f"{folder}: {'; '.join(filter(None, problems))}")


def load_model(
    folder: Path, *, device: torch.device | str, dtype: str | torch.dtype
) -> TriModeModel:
    """Check a folder and load its network, in evaluation mode."""
    dtype = _as_dtype(dtype)
    config = read_model_config(folder)
    check_weights(folder, config)
    with _quiet():
        model = MODEL_CLASSES[config.model_type].from_pretrained(folder, config=config, dtype=dtype)
    return model.to(device).eval()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside the weights; None if the folder has none."""
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, config=read_model_config(folder))
    except Exception as error:  # the tokenizers library raises plain Exception on a damaged file
        raise CheckpointError(f"{folder}: the tokenizer cannot be read: {error}") from error


def save_checkpoint(
    model: TriModeModel,
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Write weights, configuration and tokenizer; the folder appears complete or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with _quiet():
        model.save_pretrained(partial, max_shard_size=max_shard_size)
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)


def _read_headers(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the folder's safetensors files."""
    if (folder / INDEX_NAME).exists():
        names = read_json(folder / INDEX_NAME).get("weight_map")
        if not isinstance(names, dict):
            raise CheckpointError(f"{folder / INDEX_NAME} has no weight_map")
        files = [folder / name for name in sorted(set(names.values()))]
    elif (folder / WEIGHTS_NAME).exists():
        files = [folder / WEIGHTS_NAME]
    else:
        pickles = [path.name for pattern in PICKLES for path in folder.glob(pattern)]
        found = f"only {pickles[0]}, and pickles are not opened" if pickles else "none"
        raise CheckpointError(f"{folder}: expected {WEIGHTS_NAME} or {INDEX_NAME}, found {found}")
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        if not file.exists():
            raise CheckpointError(f"{folder}: shard {file.name} named by {INDEX_NAME} is missing")
        try:
            with safe_open(file, framework="pt") as tensors:
                shapes |= {n: tuple(tensors.get_slice(n).get_shape()) for n in tensors.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise CheckpointError(f"{file} is not a whole safetensors file: {error}") from error
    return shapes


def _describe(what: str, names: Iterable[str]) -> str:
    names = list(names)
    if not names:
        return ""
    more = ", ..." if len(names) > 5 else ""
    return f"{len(names)} {what} tensors ({', '.join(names[:5])}{more})"


def _as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise CheckpointError(f"dtype is {dtype!r}; allowed: float32, bfloat16, float16, float64")
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars from transformers within; they would land in the caller's output."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()
