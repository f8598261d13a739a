"""The mask token of a converted checkpoint: found in the source's vocabulary, or added to it.

An unused reserved slot is better than a new token, for it costs no row; so is a marker that the
source never learned. How rows grow is in `convert`; this module decides on the token alone.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from safetensors import safe_open

from trimode.checkpoint import key_maps
from trimode.checkpoint.source import Source
from trimode.errors import CheckpointError, ConfigError


@dataclass(frozen=True, slots=True)
class MaskToken:
    """The mask token and how it was come by; `token` is None without a tokenizer."""

    token: str | None
    token_id: int
    how: str


def choose_mask_token(wanted: str | None, source: Source) -> MaskToken:
    """Find a mask token or make one; the source's tokenizer, if there is one, then knows it.

    In order: the wanted one, the tokenizer's own, a marker that a known model never learned, a
    reserved slot that nothing uses, a new token, which takes a row of the embedding that has no
    token yet or else grows the vocabulary.
    """
    tokenizer, num_rows = source.tokenizer, source.config.vocab_size
    if tokenizer is None:
        return _mask_without_tokenizer(wanted, source)
    vocab = tokenizer.get_vocab()
    if wanted is not None:
        token, how = _wanted_token(wanted, vocab, source), "named"
    elif tokenizer.mask_token is not None:
        token, how = tokenizer.mask_token, "the tokenizer's own"
    elif (marker := _untrained_marker(vocab, source)) is not None:
        token, how = marker, "untrained marker"
    elif (reserved := _reserved_token(vocab, source)) is not None:
        token, how = reserved, "reserved slot"
    else:
        token, how = key_maps.NEW_MASK_TOKEN, "padded row"
    is_new = token not in vocab
    # An added token as the object it is, or it would lose flags such as `lstrip`.
    known = tokenizer.added_tokens_decoder.get(vocab.get(token), token)
    tokenizer.add_special_tokens({"mask_token": known})
    token_id = tokenizer.convert_tokens_to_ids(token)
    if token_id in source.special_ids or (is_new and token_id in vocab.values()):
        raise CheckpointError(
            f"{source.folder}: {token!r} would be token {token_id}, which is in use; name another"
            " mask token"
        )
    return MaskToken(token, token_id, how if token_id < num_rows else "grown vocabulary")


def _mask_without_tokenizer(wanted: str | None, source: Source) -> MaskToken:
    num_rows = source.config.vocab_size
    if wanted is None:
        free = next(i for i in itertools.count(num_rows) if i not in source.special_ids)
        return MaskToken(None, free, "grown vocabulary")
    if not wanted.isdecimal() or int(wanted) >= num_rows or int(wanted) in source.special_ids:
        raise ConfigError(
            f"mask token is {wanted!r}; without a tokenizer allowed: an id of 0 to {num_rows - 1}"
            f" that is not special ({sorted(source.special_ids)})"
        )
    return MaskToken(None, int(wanted), "named")


def _wanted_token(wanted: str, vocab: dict[str, int], source: Source) -> str:
    """The token that the user means; digits are an id."""
    by_id = {token_id: token for token, token_id in vocab.items()}
    token = by_id.get(int(wanted)) if wanted.isdecimal() else wanted
    if token is None or token not in vocab:
        raise ConfigError(
            f"mask token is {wanted!r}; allowed: a token of the vocabulary or its id, 0 to"
            f" {max(by_id)}; left out, a free slot is chosen"
        )
    if vocab[token] in source.special_ids:
        raise ConfigError(
            f"mask token is {wanted!r}, which begins, ends or pads texts, or is the unknown token"
        )
    is_added = vocab[token] in source.tokenizer.added_tokens_decoder
    if not is_added and not (token[0] in "<[|" and token[-1] in ">]|"):
        raise ConfigError(f"mask token is {wanted!r}, an ordinary token of texts; name a reserved")
    return token


def _reserved_token(vocab: dict[str, int], source: Source) -> str | None:
    """The best reserved slot with a row of its own, no role and no place in the chat template."""
    by_id = sorted(vocab, key=vocab.__getitem__)
    for pattern in key_maps.RESERVED_TOKENS:
        for token in filter(pattern.fullmatch, by_id):
            if vocab[token] < source.config.vocab_size and not _is_taken(token, vocab, source):
                return token
    return None


def _untrained_marker(vocab: dict[str, int], source: Source) -> str | None:
    """The marker of a known model that serves, if the model has indeed not learned it."""
    for markers in key_maps.UNTRAINED_MARKERS.values():
        ids = [vocab.get(marker, source.config.vocab_size) for marker in markers]
        is_known = max(ids) < source.config.vocab_size
        if is_known and not _is_taken(markers[0], vocab, source) and _are_same_rows(ids, source):
            return markers[0]
    return None


def _is_taken(token: str, vocab: dict[str, int], source: Source) -> bool:
    """Whether a token has a role, or a place in the chat template."""
    template = str(source.tokenizer.chat_template or "")
    roles = source.tokenizer.special_tokens_map.values()
    return token in roles or token in template or vocab[token] in source.special_ids


def _are_same_rows(ids: list[int], source: Source) -> bool:
    """Whether the embedding has one and the same row for all these tokens."""
    name = source.layout.embedding
    if name not in source.stored:
        return False
    with safe_open(source.stored[name].file, framework="pt") as stored:
        embedding = stored.get_slice(name)
        rows = torch.cat([embedding[i : i + 1] for i in ids]).float()
    length = float(rows[0].norm())
    return length > 0 and float((rows - rows[0]).norm(dim=1).max()) <= key_maps.SAME_ROW * length
