"""A tokenizer as this project reads it: odd ones, and those that disagree with the model."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.conftest import EOS, MASK
from trimode.errors import RequestError
from trimode.infill import _head
from trimode.model import TriModeModel
from trimode.runtime import TriModeLM
from trimode.vocabulary import Vocabulary

Model = Callable[..., TriModeModel]


def text_of(lm: TriModeLM, prompt: str, **options: Any) -> str:
    found = lm.generate(prompt, max_new_tokens=4, seed=0, **options)
    whole = lm.decode([*found.prompt_ids, *found.token_ids])
    assert whole == prompt + found.text
    return found.text


def test_more_tokens_than_the_model_has(tiny_model: Model, byte_tokenizer: Any) -> None:
    """Prevents: a request that ends all others, for a token without a row goes on from its end."""
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.add_tokens([f"abc{number}" for number in range(100)])
    lm = TriModeLM(tiny_model(), tokenizer)
    assert not lm.encode_prompt("x ab").taken_ids
    text_of(lm, "x ab")
    lm.infill("x ab<FILL>c", lengths=[1, 2], seed=0)


def test_a_mask_token_that_is_an_ordinary_one(tiny_model: Model, byte_tokenizer: Any) -> None:
    """Prevents: a prompt that cannot be read, since a sign of it stands for what is masked."""
    lm = TriModeLM(tiny_model(mask_token_id=ord("#")), byte_tokenizer)
    assert lm.encode("a # b") == [*b"a # b"]
    assert ord("#") not in lm.vocabulary.token_bytes


@pytest.mark.parametrize("parse_special", [False, True])
def test_an_added_mask_never_enters(
    tiny_model: Model, byte_tokenizer: Any, parse_special: bool
) -> None:
    """Prevents: a mask token in a prompt, where the tokenizer does not call it special."""
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.add_tokens(["<hole>"])
    lm = TriModeLM(tiny_model(vocab_size=260, mask_token_id=259), tokenizer)
    ids = lm.encode_prompt("a<hole>b<|eos|>", parse_special=parse_special).token_ids
    assert ids[:8] == [*b"a<hole>b"]
    assert (ids[8:] == [EOS]) is parse_special
    assert 259 not in lm.vocabulary.token_bytes


def test_a_spelled_mask_adds_no_space(tiny_model: Model, piece_tokenizer: Any) -> None:
    """Prevents: a space in the prompt that nobody typed."""
    mask = piece_tokenizer.mask_token_id
    model = tiny_model(vocab_size=len(piece_tokenizer), mask_token_id=mask, bos_token_id=1)
    lm = TriModeLM(model, piece_tokenizer)
    for options in ({}, {"parse_special": True}):
        ids = lm.encode_prompt("a<mask>b", **options).token_ids
        assert ids[0] == 1
        assert mask not in ids
        assert lm.decode(ids) == "a<mask>b"


def test_bytes_are_chosen_only_where_no_token_says_them(piece_tokenizer: Any) -> None:
    """Prevents: a healed text that is decoded as something else than was typed."""
    vocabulary = Vocabulary(piece_tokenizer, mask_token_id=None)
    named = piece_tokenizer.convert_tokens_to_ids
    assert vocabulary.token_bytes.spelling(b"a") == [named("a")]
    assert vocabulary.token_bytes.spelling(b"A") == [named("<0x41>")]
    assert vocabulary.token_bytes[named("<0x61>")] == b"a"
    assert vocabulary.letter == named("a")


@pytest.mark.parametrize("behind", [" cat", "cat", "\n  the", "[a]"])
def test_the_text_behind_a_gap_is_read_as_it_is(piece_tokenizer: Any, behind: str) -> None:
    """Prevents: a fill that has to end in the probe's own letter, with sentencepiece's space."""
    vocabulary = Vocabulary(piece_tokenizer, mask_token_id=None)
    head, suffix_ids = _head(vocabulary, behind)
    said = head + vocabulary.bytes_of(suffix_ids)
    assert said in (behind.encode(), b" " + behind.encode())
    assert not head.startswith(b"x")


@pytest.mark.parametrize("seed", range(30))
def test_a_control_token_between_bytes(piece_tokenizer: Any, seed: int) -> None:
    """Prevents: a stream whose pieces are another text than the whole."""
    from trimode.detokenize import GrowingText

    generator = torch.Generator().manual_seed(seed)
    some = [1, 2, *range(3 + 0x40, 3 + 0x46), 3 + 0xC3, 3 + 0xA9, 3 + 0xFF, 262, 270]
    picks = torch.randint(len(some), (12,), generator=generator).tolist()
    ids = [some[pick] for pick in picks]
    text = GrowingText(piece_tokenizer)
    pieces = [text.push([token_id]) for token_id in ids]
    assert "".join(pieces) + text.rest == GrowingText(piece_tokenizer).whole(ids)


@pytest.mark.parametrize("ids", [[*b"a\xef\xbf\xbd", 0xF0, 0x9F], [*b"\xef\xbf\xbd"], [0xF0]])
def test_half_a_character_behind_a_replacement_character(
    tiny_model: Model, byte_tokenizer: Any, ids: list[int]
) -> None:
    """Prevents: a U+FFFD of the prompt's own that is said twice."""
    lm = TriModeLM(tiny_model(), byte_tokenizer)
    found = lm.generate(ids, max_new_tokens=2, logit_bias={98: 1e4})
    whole = lm.decode([*ids, *found.token_ids])
    prompt = bytes(ids).decode(errors="ignore")
    assert prompt + found.text == whole


def test_many_control_tokens_are_found_quickly(byte_tokenizer: Any) -> None:
    """Prevents: seconds for a long text that begins to spell some of thousands of them."""
    tokenizer = copy.deepcopy(byte_tokenizer)
    names = [f"<unused{number}>" for number in range(3000)]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    vocabulary = Vocabulary(tokenizer, mask_token_id=MASK)
    begun = time.process_time()
    assert vocabulary.spelled_control("<unused" * 30_000 + "<unused17>x") == ["<unused17>"]
    assert time.process_time() - begun < 2


def test_a_text_of_all_private_characters(tiny_model: Model, byte_tokenizer: Any) -> None:
    """Prevents: an end of iteration that no caller expects, where no stand-in is left."""
    signs = [*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFD)]
    lm = TriModeLM(tiny_model(), byte_tokenizer)
    with pytest.raises(RequestError, match="use every private character"):
        lm.generate("<|eos|>" + "".join(map(chr, signs)))
