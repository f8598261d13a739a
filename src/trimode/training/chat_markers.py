"""ChatML's markers in a tokenizer that lacks them: an unused token is renamed, or a free row taken.

The model's vocabulary never grows here. Where there is no room, the markers are ordinary text.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from trimode.checkpoint.key_maps import RESERVED_TOKENS
from trimode.training.chat_template import CHATML_END, CHATML_START


def with_markers(
    tokenizer: PreTrainedTokenizerFast, *, template: str, folder: Path
) -> tuple[PreTrainedTokenizerFast, dict[str, str]]:
    """A tokenizer in which the markers that a template uses are special tokens, if that can be.

    Args:
        tokenizer: From `folder`; may be changed.
        template: Jinja.
        folder: Of the tokenizer, and perhaps of the checkpoint that it belongs to.

    Returns:
        The tokenizer, and how each marker is spelled, as in `manifest.ChatRecord`.
    """
    markers: dict[str, str] = {}
    for marker in (CHATML_START, CHATML_END):
        if marker not in template:
            continue
        vocab = tokenizer.get_vocab()
        reserved = next(_unused_tokens(tokenizer, template), None)
        free_row = max(vocab.values()) + 1
        if marker in vocab:
            added = tokenizer.added_tokens_decoder.get(vocab[marker])
            if added is None or not added.special:
                tokenizer.backend_tokenizer.add_special_tokens([AddedToken(marker, special=True)])
            markers[marker] = "token"
        elif reserved is not None:
            tokenizer = _renamed(tokenizer, {reserved: marker})
            markers[marker] = f"reserved {reserved}"
        elif free_row < _num_rows(folder) and free_row == len(vocab):
            tokenizer.backend_tokenizer.add_special_tokens([AddedToken(marker, special=True)])
            markers[marker] = f"row {free_row}"
        else:
            markers[marker] = "text"
    return tokenizer, markers


def _unused_tokens(tokenizer: PreTrainedTokenizerFast, template: str) -> Iterator[str]:
    """Special tokens that wait for a use, without a role and not in the template, by id."""
    roles = {str(token) for token in tokenizer.special_tokens_map.values()}
    added = sorted(tokenizer.added_tokens_decoder.items())
    for _, token in added:
        name = token.content
        is_reserved = any(pattern.fullmatch(name) for pattern in RESERVED_TOKENS[1:])
        if token.special and is_reserved and name not in roles and name not in template:
            yield name


def _renamed(tokenizer: PreTrainedTokenizerFast, names: dict[str, str]) -> PreTrainedTokenizerFast:
    """The tokenizer with tokens of other names, wherever its files mention them."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in Path(folder).glob("*.json"):
            tree = json.loads(path.read_text(encoding="utf-8"))
            path.write_text(json.dumps(_replaced(tree, names)), encoding="utf-8")
        return PreTrainedTokenizerFast.from_pretrained(folder)


def _replaced(tree: Any, names: dict[str, str]) -> Any:
    if isinstance(tree, dict):
        return {names.get(key, key): _replaced(value, names) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_replaced(value, names) for value in tree]
    return names.get(tree, tree) if isinstance(tree, str) else tree


def _num_rows(folder: Path) -> int:
    """Rows of the checkpoint beside the tokenizer that may be chosen; 0 if there is none."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return int(config.get("num_valid_tokens") or config.get("vocab_size") or 0)
    except (OSError, ValueError):
        return 0
