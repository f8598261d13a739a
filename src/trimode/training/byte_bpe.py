"""The byte-level BPE tokenizer: how text is cut, which special tokens exist, how texts are encoded.

Nothing here knows about shards or sources.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from trimode.checkpoint.model_cache import named_folder
from trimode.errors import ConfigError

BOS, EOS, MASK = "<|bos|>", "<|eos|>", "<|mask|>"
SPECIAL_TOKENS = (BOS, EOS, MASK, "<|im_start|>", "<|im_end|>") + tuple(
    f"<|reserved_{number}|>" for number in range(11)
)
MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256

# A word takes one preceding space or sign along, digits stand alone, and line breaks take the whole
# indentation of the next line along: the first word of a line is then the same token at every
# depth, and a prompt that ends with an indentation ends, as in training, where a token does.
SPLIT_PATTERN = (
    r"(?:\r?\n)+[ \t]*"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+"
    r"|[ \t]+(?!\S)"
    r"|\s"
)
_ENCODE_BATCH = 256


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, num_texts: int | None = None
) -> PreTrainedTokenizerFast:
    """Learns a byte-level BPE vocabulary.

    Special tokens take the first ids, the 256 bytes the next, then come the merges. A small corpus
    may not have enough repeated pairs: the vocabulary is then smaller than asked for.

    Args:
        texts: What to learn from; read once.
        vocab_size: Size with special tokens and bytes, at least `MIN_VOCAB_SIZE`.
        num_texts: Their number, if known.

    Returns:
        A tokenizer that prepends `<|bos|>` and gives any text back unchanged when it decodes.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer, length=num_texts)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        mask_token=MASK,
        pad_token=EOS,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(folder: str | Path, *, mask_token: str | None) -> PreTrainedTokenizerFast:
    """Loads an existing tokenizer folder and checks that it names the tokens that shards need.

    Args:
        folder: A folder with `tokenizer.json`, one of prepared data, or the name of a model.
        mask_token: Token to use as the mask where the tokenizer declares none (or another one).

    Raises:
        ConfigError: Not a tokenizer folder, or no end or mask token.
    """
    folder = tokenizer_folder(folder)
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(f"tokenizer: {folder} has no tokenizer.json; give a tokenizer's folder")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # the library's readers raise bare Exception for damaged files
        raise ConfigError(f"tokenizer: {folder} cannot be read ({error})") from error
    if mask_token is not None:
        if mask_token not in tokenizer.get_vocab():
            raise ConfigError(f"mask_token: {mask_token!r} is not a token of {folder}")
        tokenizer.mask_token = mask_token
    for name in ("eos_token", "mask_token"):
        if getattr(tokenizer, name) is None:
            raise ConfigError(
                f"tokenizer: {folder} declares no {name}; shards need eos and mask "
                f"(the mask may be named by `mask_token`)"
            )
    return tokenizer


def tokenizer_folder(folder: str | Path) -> Path:
    """The tokenizer's own folder in one of prepared data, else the folder itself."""
    outer = named_folder(folder)
    inner = outer / "tokenizer"
    return inner if (inner / "tokenizer.json").is_file() else outer


def special_token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Returns all special tokens of a tokenizer and their ids, by id."""
    added = sorted(tokenizer.added_tokens_decoder.items())
    return {token.content: number for number, token in added if token.special}


def encode_documents(
    tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]
) -> Iterator[np.ndarray]:
    """Yields each text as `[bos] + tokens + [eos]`, without the first if there is no such token.

    The text of a special token inside a document is text like any other and gets ordinary tokens.

    Returns:
        An iterator over [T] int64.
    """
    backend = tokenizer.backend_tokenizer
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    before = backend.encode_special_tokens
    backend.encode_special_tokens = True
    try:
        remaining = iter(texts)
        while batch := list(islice(remaining, _ENCODE_BATCH)):
            for encoding in backend.encode_batch_fast(batch, add_special_tokens=False):
                ids = [*first, *encoding.ids, tokenizer.eos_token_id]
                yield np.array(ids, dtype=np.int64)
    finally:
        backend.encode_special_tokens = before
