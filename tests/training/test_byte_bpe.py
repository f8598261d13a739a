"""The byte-level BPE tokenizer."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from tests.training.made_documents import make_code
from trimode.training.byte_bpe import SPECIAL_TOKENS, encode_documents, train_tokenizer

AWKWARD_TEXTS = (
    "def f(x):\n    return x\n",
    "\ufeffnot a BOM in the middle \ufeff",
    "CRLF\r\n\tand\rCR\r\n\r\n   trailing   \n \n",
    "emoji 👩‍👩‍👧‍👦 🏳️‍🌈, 日本語, العربية, e\u0301, \u2028, \x0b\x0c\x1f\x7f\x85",
    " 's 'S don't,   a.b  ,( c )!? .;",
    "",
    " ",
    "\n\n\n",
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A learned tokenizer; tests must leave it as it is."""
    return train_tokenizer([make_code(seed) for seed in range(4)], vocab_size=400)


def test_any_text_comes_back(tokenizer: PreTrainedTokenizerFast) -> None:
    """A pre-tokenizer pattern with a gap, or a clean-up of spaces, loses characters."""
    draw = random.Random(0)
    alphabet = [c for text in AWKWARD_TEXTS for c in text] + list("\t\n\r  \x00\U0010ffff")
    mixtures = ["".join(draw.choices(alphabet, k=30)) for _ in range(300)]
    for text in (*AWKWARD_TEXTS, *mixtures):
        ids = tokenizer.encode(text)
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_special_tokens_have_the_first_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    """Checkpoints carry these ids in their config: another order would mislabel them."""
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(16))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id) == (
        0,
        1,
        2,
    )
    assert tokenizer.decode(list(range(16)), skip_special_tokens=True) == ""


def test_special_text_in_a_document_is_text(tokenizer: PreTrainedTokenizerFast) -> None:
    """A document that mentions `<|mask|>` would teach the model to write the mask token."""
    text = "a <|mask|> b<|eos|>"
    (ids,) = encode_documents(tokenizer, [text])
    assert ids[0] == 0
    assert ids[-1] == 1
    assert ids[1:-1].min() >= 16
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert 2 in tokenizer.encode("a <|mask|> b"), "encoding documents changed the tokenizer"


def test_line_breaks_take_the_indentation_along(tokenizer: PreTrainedTokenizerFast) -> None:
    """Cut as `\\n`, three spaces, ` x`, a prompt that ends indented is unlike all training."""
    backend = tokenizer.backend_tokenizer.pre_tokenizer
    pieces = [piece for piece, _ in backend.pre_tokenize_str("a b:\n\n    x = 12\r\n  y")]
    assert pieces == ["a", "Ġb", ":", "ĊĊĠĠĠĠ", "x", "Ġ=", "Ġ", "1", "2", "čĊĠĠ", "y"]
    pieces = [piece for piece, _ in backend.pre_tokenize_str("a  \n    b")]
    assert pieces == ["a", "ĠĠ", "ĊĠĠĠĠ", "b"], "blanks at a line's end join the line break"


def test_opens_as_a_checkpoint_tokenizer(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """A tokenizer class that AutoTokenizer does not find makes the checkpoint useless."""
    tokenizer.save_pretrained(tmp_path)
    LlamaConfig(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.encode("x = 1\n") == tokenizer.encode("x = 1\n")
    assert loaded.mask_token_id == 2
