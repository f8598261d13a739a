"""The tokenizer and the chat template that lie beside an adapter.

PEFT's users save the tokenizer that they trained with. It serves if it has no token that the model
has no row for, and means the same by every id. It never heard of the model's mask token.
"""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from trimode.checkpoint.io import load_tokenizer
from trimode.checkpoint.peft_config import REMEDY
from trimode.checkpoint.source import has_tokenizer
from trimode.errors import CheckpointError
from trimode.model import TriModeConfig

_TEMPLATE = "chat_template.jinja"


def adapter_tokenizer(
    folder: Path, *, config: TriModeConfig, own: PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase | None:
    """Choose the tokenizer of a model with an adapter.

    Args:
        folder: The adapter's.
        config: The model's.
        own: The model's tokenizer, which gets the template of a folder that has nothing else.

    Returns:
        The folder's tokenizer if there is one, with the model's mask token, and with the model's
        template where it has none; else the model's.

    Raises:
        CheckpointError: The tokenizer is damaged, or not one for the rows of the model.
    """
    if not has_tokenizer(folder):
        if own is not None and (folder / _TEMPLATE).is_file():
            own.chat_template = (folder / _TEMPLATE).read_text(encoding="utf-8")
        return own
    theirs = load_tokenizer(folder, config=config)
    assert theirs is not None
    _check_vocabulary(folder, theirs, config=config, own=own)
    if own is None:
        return theirs
    theirs.chat_template = theirs.chat_template or own.chat_template
    mask = own.mask_token
    if mask is None or theirs.convert_tokens_to_ids(mask) == config.mask_token_id:
        return theirs
    known = own.added_tokens_decoder.get(config.mask_token_id, mask)
    theirs.add_special_tokens({"mask_token": known})
    if theirs.convert_tokens_to_ids(mask) == config.mask_token_id:
        return theirs
    own.chat_template = theirs.chat_template  # same ids, but the mask token would get another one
    return own


def _check_vocabulary(
    folder: Path,
    theirs: PreTrainedTokenizerBase,
    *,
    config: TriModeConfig,
    own: PreTrainedTokenizerBase | None,
) -> None:
    """Refuse a tokenizer of more tokens than the model has, or of other ones."""
    vocab = {token_id: token for token, token_id in theirs.get_vocab().items()}
    ours = {} if own is None else {i: token for token, i in own.get_vocab().items()}
    num_rows = config.num_valid_tokens or config.vocab_size
    mask_id = config.mask_token_id
    is_mask_free = mask_id in vocab and vocab[mask_id] != ours.get(mask_id, vocab[mask_id])
    new = sorted(i for i in vocab if i >= num_rows or (i == mask_id and is_mask_free))
    if new:
        raise CheckpointError(
            f"{folder}: the tokenizer has {len(new)} tokens that the model has no rows for, first"
            f" {vocab[new[0]]!r}, id {new[0]}; a base with more rows was trained: {REMEDY}; or"
            " remove the tokenizer's files, and the model's own is used"
        )
    for token_id, token in sorted(vocab.items()):
        if ours.get(token_id, token) != token and token_id not in theirs.added_tokens_decoder:
            raise CheckpointError(
                f"{folder}: the tokenizer is another model's: token {token_id} is {token!r}, in"
                f" this model {ours[token_id]!r}"
            )
