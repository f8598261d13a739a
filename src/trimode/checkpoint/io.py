"""Opening and writing checkpoint folders in the Hugging Face layout.

Every defect is one `CheckpointError`. transformers does the reading, writing and sharding; this
file checks first, from the safetensors headers alone, so that a wrong folder is refused before a
byte of weights is read.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, split_state_dict_into_shards_factory
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from trimode.checkpoint import whole_folder
from trimode.errors import CheckpointError, ConfigError, TriModeError
from trimode.model import TriModeModel
from trimode.model.configuration import TriModeConfig
from trimode.model.modeling import MODEL_CLASSES

POCKET_MODEL = Path(__file__).parents[1] / "assets" / "pocket"
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
_OF_RANK = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def resolve(path: str | Path) -> Path:
    """The local folder of a checkpoint: a folder, or a snapshot from the hub."""
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
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a JSON object")
    return content


def read_model_config(folder: Path) -> TriModeConfig:
    """The configuration of a checkpoint folder, of a model type that this package reads."""
    if (folder / "adapter_config.json").exists() and not (folder / CONFIG_NAME).exists():
        raise CheckpointError(
            f"{folder} holds an adapter, not a model; give it as lora or drafter beside its model"
        )
    run = next((one for one in (folder, *folder.parents[:2]) if (one / "log.jsonl").exists()), None)
    if run is not None and (folder == run or folder.parent.name == "checkpoints"):
        raise CheckpointError(
            f"{folder} is of a training run; its model, once finished, is in {run / 'final'}"
        )
    content = read_json(folder / CONFIG_NAME)
    model_type = content.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODEL_CLASSES:
        raise CheckpointError(
            f"{folder / CONFIG_NAME}: model_type is {model_type!r}; "
            f"allowed: {', '.join(MODEL_CLASSES)}; an AR model is made one by `trimode convert`"
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
    stored = read_headers(folder)
    packed = sorted(f"{name} {t.dtype}" for name, t in stored.items() if t.dtype not in _FLOATS)
    if packed:
        raise CheckpointError(
            f"{folder}: {_describe('quantised or integer', packed)}; allowed: {', '.join(_FLOATS)}"
        )
    found = {name: tensor.shape for name, tensor in stored.items()}
    expected = expected_shapes(config)
    if config.tie_word_embeddings and "diffusion_head.weight" not in found:
        del expected["diffusion_head.weight"]
    compare_shapes(folder, found=found, expected=expected)
    if config.tie_word_embeddings and "diffusion_head.weight" in found:
        _check_tied_head(folder, stored)


def _check_tied_head(folder: Path, stored: dict[str, StoredTensor]) -> None:
    """Refuse a tied head that is stored too, and is another matrix than the embedding."""
    both, names = [], ("encoder.embed_tokens.weight", "diffusion_head.weight")
    for name in names:
        with safe_open(stored[name].file, framework="pt") as tensors:
            both.append(tensors.get_tensor(name))
    if not torch.equal(*both):
        files = " and ".join(sorted({stored[name].file.name for name in names}))
        raise CheckpointError(
            f"{folder}: diffusion_head.weight differs from encoder.embed_tokens.weight in {files},"
            " though tie_word_embeddings is true; set it to false, or remove the head"
        )


def read_with(auto: Any, folder: Path, what: str) -> Any:
    """Another family's configuration or tokenizer, by an `Auto...` class; no remote code is run."""
    try:
        return auto.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the readers of many families raise anything on a damaged file
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder}: the {what} cannot be read: {reason}") from error


def expected_shapes(config: TriModeConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the network that a configuration describes."""
    with torch.device("meta"):
        model = MODEL_CLASSES[config.model_type](config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def compare_shapes(
    folder: Path, *, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]
) -> None:
    """Refuse a folder whose tensors are not the expected ones; see `check_weights`."""
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
    dtype = as_dtype(dtype)
    config = read_model_config(folder)
    check_weights(folder, config)
    with quiet():
        model, report = MODEL_CLASSES[config.model_type].from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True
        )
    wrong = {kind: names for kind, names in report.items() if names}
    if wrong:  # the headers were right, so the files have changed, or were read another way
        raise CheckpointError(f"{folder}: the weights did not load as checked: {wrong}")
    return model.to(device).eval()


def load_tokenizer(
    folder: Path, *, config: TriModeConfig | None = None
) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a folder, None if it has none; `config` is the model's if not there too."""
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, config=config or read_model_config(folder))
    except Exception as error:  # the tokenizers library raises plain Exception on a damaged file
        raise CheckpointError(f"{folder}: the tokenizer cannot be read: {error}") from error


def save_checkpoint(
    model: TriModeModel,
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | Path | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Write weights, configuration and tokenizer; the folder appears complete or not at all.

    Args:
        model: In the dtype that is to be written.
        folder: An older one is replaced.
        tokenizer: Of the model, or a folder whose files are copied; None for none.
        max_shard_size: Of one file of weights, such as 5GB.
    """
    partial = whole_folder.start(folder)
    if isinstance(tokenizer, Path):
        shutil.copytree(tokenizer, partial, dirs_exist_ok=True)
    elif tokenizer is not None:
        tokenizer.save_pretrained(partial)
    with quiet():
        model.save_pretrained(partial, max_shard_size=max_shard_size)
    whole_folder.publish(folder)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor on disk: its file, its shape, and its element type in safetensors' words."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Read shape, type and file of every tensor in a folder, without reading weights.

    Read the files that transformers reads: the single file if there is one, else the shards that
    the index names. Other files of the folder do not count.

    Raises:
        CheckpointError: A file is missing or damaged; a tensor is stored twice, or elsewhere than
            the index says, or nowhere; transformers would read other files.
    """
    _check_files(folder)
    index: dict[str, str] = {}
    if (folder / WEIGHTS_NAME).exists():  # transformers reads it even where there is an index
        files = [folder / WEIGHTS_NAME]
    elif (folder / INDEX_NAME).exists():
        index = _read_index(folder)
        files = [folder / name for name in sorted(set(index.values()))]
    else:
        pickles = [path.name for pattern in PICKLES for path in folder.glob(pattern)]
        found = f"only {pickles[0]}, and pickles are not opened" if pickles else "none"
        raise CheckpointError(f"{folder}: expected {WEIGHTS_NAME} or {INDEX_NAME}, found {found}")
    headers: dict[str, StoredTensor] = {}
    for file in files:
        if not file.exists():
            first = min(name for name, shard in index.items() if shard == file.name)
            raise CheckpointError(
                f"{folder}: shard {file.name} named by {INDEX_NAME} is missing, which holds {first}"
            )
        for name, tensor in _read_header(file).items():
            if name in headers:
                raise CheckpointError(
                    f"{folder}: tensor {name} is stored twice, in {headers[name].file.name} and in"
                    f" {file.name}; allowed: one shard"
                )
            headers[name] = tensor
    for name, shard in index.items():
        found = headers[name].file.name if name in headers else "no shard"
        if found != shard:
            raise CheckpointError(
                f"{folder}: {INDEX_NAME} says that tensor {name} is in {shard}, but {found} holds"
                " it; get index and shards of one version"
            )
    return headers


def _read_header(file: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return {
                name: StoredTensor(file, tuple(tensor.get_shape()), tensor.get_dtype())
                for name, tensor in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a whole safetensors file: {error}") from error


def _check_files(folder: Path) -> None:
    """Refuse a folder of which transformers would read other files than we check."""
    if (folder / CONFIG_NAME).is_file():
        other = read_json(folder / CONFIG_NAME).get("transformers_weights")
        if other is not None:
            raise CheckpointError(
                f"{folder / CONFIG_NAME}: transformers_weights is {other!r}; allowed: none, so that"
                f" the weights are {WEIGHTS_NAME} or the shards of {INDEX_NAME}"
            )
        if (folder / "adapter_config.json").exists():  # transformers would load it on top
            raise CheckpointError(
                f"{folder} holds a model and an adapter; move adapter_config.json and"
                " adapter_model.safetensors to a folder of their own"
            )
    ranks = sorted(path.name for path in folder.glob("shard-*") if _OF_RANK.fullmatch(path.name))
    if ranks:
        raise CheckpointError(
            f"{folder} has {ranks[0]}, a part of a distributed checkpoint, which transformers would"
            f" read instead; allowed: {WEIGHTS_NAME}, or the shards of {INDEX_NAME}"
        )


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor -> its shard, which must lie in the folder itself."""
    index = read_json(folder / INDEX_NAME)
    names = index.get("weight_map")
    if not isinstance(names, dict) or not names or not isinstance(index.get("metadata"), dict):
        raise CheckpointError(f"{folder / INDEX_NAME} has no weight_map, or no metadata")
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(
                f"{folder / INDEX_NAME}: weight_map has {name!r}; allowed: a file name"
            )
    return names


@contextmanager
def fresh_folder(target: Path) -> Iterator[Path]:
    """Gives a sibling to write into, which becomes `target` at the end; on an error nothing stays.

    Raises:
        CheckpointError: `target` exists and is not an empty folder, or has no parent folder.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is not an empty folder")
    if not target.parent.is_dir():
        raise CheckpointError(f"{target.parent}: no such folder")
    partial = target.with_name(target.name + ".partial")
    try:
        partial.mkdir()
    except FileExistsError:
        raise CheckpointError(
            f"{partial} exists: another command writes it, or one was killed; remove it then"
        ) from None
    try:
        yield partial
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_tensors(
    folder: Path,
    sizes: dict[str, int],
    *,
    load: Callable[[str], torch.Tensor],
    max_shard_size: str,
) -> None:
    """Write weights shard by shard, so that one shard at most is in memory.

    Args:
        folder: Exists already.
        sizes: Bytes by tensor name, in the order of writing.
        load: Gives a tensor by its name; called once for each.
        max_shard_size: As in `save_checkpoint`.

    Raises:
        ConfigError: `max_shard_size` is not a size.
    """
    try:
        split = split_state_dict_into_shards_factory(
            sizes,
            get_storage_size=lambda size: size,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise ConfigError(f"max_shard_size is {max_shard_size!r}; e.g. 5GB or 500MB") from error
    for file_name, names in split.filename_to_tensors.items():
        shard = {name: load(name) for name in names}
        save_file(shard, folder / file_name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _describe(what: str, names: Iterable[str]) -> str:
    names = list(names)
    if not names:
        return ""
    more = ", ..." if len(names) > 5 else ""
    return f"{len(names)} {what} tensors ({', '.join(names[:5])}{more})"


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A floating-point element type by its name in torch."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ConfigError(f"dtype is {dtype!r}; allowed: float32, bfloat16, float16, float64")
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars from transformers within; they would land in the caller's output."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()
