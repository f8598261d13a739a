"""Whether a training config fits its data and the checkpoint it goes on from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from trimode.checkpoint.model_cache import resolve
from trimode.errors import ConfigError
from trimode.model import TriModeConfig, TriModeModel
from trimode.training.config import TrainConfig
from trimode.training.shards import TokenShards


def check_against_data(config: TrainConfig, data: TokenShards) -> None:
    """Refuse a run whose data cannot serve it.

    Args:
        config: The run.
        data: The training split.

    Raises:
        ConfigError: A special id outside the vocabulary, or fewer tokens than one row.
    """
    for name in ("mask_token_id", "eos_token_id", "bos_token_id"):
        value = getattr(data, name)
        if value is None and name == "bos_token_id":
            continue
        if not 0 <= value < data.vocab_size:
            raise ConfigError(
                f"{name} of the data {config.data!r} is {value}, but must lie inside its "
                f"vocabulary of {data.vocab_size} tokens"
            )
    if data.mask_token_id in (data.eos_token_id, data.bos_token_id):
        raise ConfigError(
            f"mask_token_id of the data {config.data!r} is {data.mask_token_id}, which is its BOS "
            "or EOS too; it must be a token of its own"
        )
    longest = max(stage.sequence_length for stage in config.stages)
    if data.kind == "text" and data.num_tokens < longest:
        raise ConfigError(
            f"the data {config.data!r} has {data.num_tokens} tokens, but one row of "
            f"sequence_length needs {longest}"
        )


def check_against_model(
    config: TrainConfig, data: TokenShards, model_config: TriModeConfig
) -> None:
    """Refuse to go on from a checkpoint (`model.init`) that the data or the stages do not fit.

    Args:
        config: The run.
        data: The training split.
        model_config: The checkpoint's configuration.

    Raises:
        ConfigError: Tokens outside the vocabulary, another mask token, or too long a row.
    """
    init = config.model.init
    if data.vocab_size > model_config.vocab_size:
        raise ConfigError(
            f"the data {config.data!r} has {data.vocab_size} token ids, but model.init {init!r} "
            f"has {model_config.vocab_size}: prepare the data with that model's tokenizer"
        )
    if data.mask_token_id != model_config.mask_token_id:
        raise ConfigError(
            f"mask_token_id of the data {config.data!r} is {data.mask_token_id}, but that of "
            f"model.init {init!r} is {model_config.mask_token_id}"
        )
    if data.eos_token_id not in model_config.eos_token_ids:
        raise ConfigError(
            f"eos_token_id of the data {config.data!r} is {data.eos_token_id}, but model.init "
            f"{init!r} ends a text with {list(model_config.eos_token_ids) or 'nothing'}: prepare "
            "the data with that model's tokenizer, or put its eos_token_id right"
        )
    check_same_vocabulary(Path(config.data) / "tokenizer", resolve(init))
    longest = max(stage.sequence_length for stage in config.stages)
    context = model_config.max_position_embeddings
    if longest > context:
        raise ConfigError(
            f"sequence_length is {longest}, but must be at most max_position_embeddings of "
            f"model.init {init!r} ({context})"
        )


def check_same_vocabulary(ours: Path, theirs: Path) -> None:
    """Refuse two tokenizers whose ids mean different tokens; special tokens may differ in name.

    Raises:
        ConfigError: Names the first id that differs.
    """
    files = [folder / "tokenizer.json" for folder in (ours, theirs)]
    if not all(file.is_file() for file in files):
        return  # nothing to compare
    one, other = map(_ordinary_tokens, files)
    differing = [i for i in sorted(one.keys() & other.keys()) if one[i] != other[i]]
    if differing:
        i = differing[0]
        raise ConfigError(
            f"the data's tokenizer in {str(ours)!r} is not that of model.init {str(theirs)!r}: id "
            f"{i} is {one[i]!r} there and {other[i]!r} here; prepare the data with "
            f"tokenizer={theirs}"
        )


def _ordinary_tokens(file: Path) -> dict[int, str]:
    """Tokens by id, special and other added ones left out."""
    tree = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = tree["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: pairs of token and score, by id
        vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
    added = {token["id"] for token in tree.get("added_tokens", ())}
    return {i: token for token, i in vocabulary.items() if i not in added}


def open_heldout(config: TrainConfig, model: TriModeModel) -> TokenShards:
    """The split that evaluations look at, checked before the first step.

    Raises:
        ConfigError: It is shorter than one row.
    """
    split, row_len = config.evaluation.split, config.stages[-1].sequence_length
    data = TokenShards.open(Path(config.data), split)
    if data.kind == "text" and data.num_tokens < row_len:
        raise ConfigError(
            f"the {split} split of {config.data!r} has {data.num_tokens} tokens, but one row of the"
            f" last stage needs {row_len}; choose another evaluation.split or hold out more"
        )
    if data.num_documents == 0:
        raise ConfigError(
            f"the {split} split of {config.data!r} is empty: prepare more, hold more out "
            "(held_out_share), or set evaluation.split to train"
        )
    if model.config.block_size > row_len:
        raise ConfigError(
            f"block_size of the model is {model.config.block_size}, but must be at most the last "
            f"stage's sequence_length ({row_len})"
        )
    return data


def data_fingerprint(data: TokenShards) -> str:
    """Hash of all that a run takes from its data: shards, special ids and tokenizer."""
    manifest = data.manifest
    shards = [(s.sha256, s.ends_sha256, s.supervised_sha256) for s in manifest.train.shards]
    digest = hashlib.sha256(repr((shards, manifest.vocab_size)).encode())
    digest.update(repr((data.bos_token_id, data.eos_token_id, data.mask_token_id)).encode())
    for path in sorted((data.folder / "tokenizer").glob("*")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def data_folder(config: TrainConfig) -> Path:
    """The data folder, checked to exist.

    Raises:
        ConfigError: No such folder.
    """
    folder = Path(config.data)
    if not folder.is_dir():
        raise ConfigError(
            f"data folder {config.data!r} does not exist: write it with trimode prepare"
        )
    return folder
