"""The mask token is one that nothing else uses, and the tokenizer knows it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.checkpoint.made_sources import (
    LLAMA_SLOTS,
    SLOTS,
    MakeTokenizer,
    Source,
    edit_json,
    edit_weights,
    opened,
    refused,
)
from trimode.checkpoint.convert import convert
from trimode.checkpoint.io import load_tokenizer
from trimode.checkpoint.key_maps import UNTRAINED_MARKERS
from trimode.errors import ConfigError

SMOLLM2 = UNTRAINED_MARKERS["SmolLM2"]


@pytest.mark.parametrize(
    ("reserved", "options", "rows", "expected"),
    [
        pytest.param(SLOTS, {}, 260, ("<SPECIAL_100>", 259, "reserved slot", 260, None), id="100"),
        pytest.param(
            LLAMA_SLOTS,
            {"pad_token": LLAMA_SLOTS[0], "chat_template": f"a{LLAMA_SLOTS[1]}b"},
            262,
            (LLAMA_SLOTS[2], 260, "reserved slot", 262, None),
            id="slots-in-use",
        ),
        pytest.param(
            ("<mask>", "<x>"),
            {"mask_token": "<x>"},
            260,
            ("<x>", 259, "the tokenizer's own", 260, None),
            id="own",
        ),
        pytest.param((), {}, 300, ("<|mask|>", 258, "padded row", 300, 259), id="padded-row"),
        pytest.param((), {}, 258, ("<|mask|>", 258, "grown vocabulary", 320, 259), id="grown"),
    ],
)
def test_choice_of_the_mask_token(
    source: Source,
    tokenizer: MakeTokenizer,
    tmp_path: Path,
    reserved: tuple[str, ...],
    options: dict[str, Any],
    rows: int,
    expected: tuple[Any, ...],
) -> None:
    """A mask token that has another use already, has no row, or that the tokenizer forgets."""
    before = tokenizer(*reserved, **options)
    folder = source("llama", tokenizer=before, vocab_size=rows)
    record = convert(folder, tmp_path / "target")
    model, after = opened(tmp_path / "target"), load_tokenizer(tmp_path / "target")
    mask, config = record["mask_token"], model.config
    assert (*mask.values(), config.vocab_size, config.num_valid_tokens) == expected
    assert config.mask_token_id == mask["token_id"]
    assert after is not None
    assert (after.mask_token, after.mask_token_id) == (mask["token"], mask["token_id"])
    text = f"a é</s>{''.join(reserved)}b"
    assert after(text)["input_ids"] == before(text)["input_ids"]
    assert after.chat_template == before.chat_template
    roles = before.special_tokens_map | {"mask_token": mask["token"]}
    assert after.special_tokens_map == roles


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_are_the_mean(source: Source, tmp_path: Path, tied: bool) -> None:
    """New rows of zeros or noise, or old rows that move; without a tokenizer too."""
    folder = source("llama", vocab_size=321, tie_word_embeddings=tied)
    record = convert(folder, tmp_path / "target")
    assert record["mask_token"] == {"token": None, "token_id": 321, "how": "grown vocabulary"}
    theirs = load_file(folder / "model.safetensors")
    ours = load_file(tmp_path / "target" / "model.safetensors")
    assert ("lm_head.weight" in theirs) == (not tied)
    heads = {"encoder.embed_tokens.weight": theirs["model.embed_tokens.weight"]}
    if not tied:
        heads["diffusion_head.weight"] = theirs["lm_head.weight"]
    for name, old in heads.items():
        assert ours[name].shape == (384, 64)
        assert torch.equal(ours[name][:321], old)
        torch.testing.assert_close(ours[name][321:], old.mean(0).expand(63, -1))
    assert opened(tmp_path / "target").config.num_valid_tokens == 322


@pytest.mark.parametrize("is_learned", [False, True])
def test_a_marker_that_was_never_learned(
    source: Source, tokenizer: MakeTokenizer, tmp_path: Path, is_learned: bool
) -> None:
    """Prevents: a vocabulary that grows for a frozen base, or a marker in use made the mask."""
    folder = source("llama", tokenizer=tokenizer(*SMOLLM2), vocab_size=258 + len(SMOLLM2))

    def level(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        rows = weights["model.embed_tokens.weight"]
        rows[258:] = rows[258]
        if is_learned:
            rows[260] *= 1.1
        return weights

    edit_weights(folder, level)
    record = convert(folder, tmp_path / "target")
    expected = ("<|mask|>", 258 + len(SMOLLM2)) if is_learned else ("<gh_stars>", 258)
    assert (record["mask_token"]["token"], record["mask_token"]["token_id"]) == expected
    assert record["num_new_rows"] == (52 if is_learned else 0)
    assert expected[1] in opened(tmp_path / "target").config.banned_token_ids


@pytest.mark.parametrize(("wanted", "token_id"), [("<SPECIAL_99>", 258), ("259", 259)])
def test_named_mask_token(
    source: Source,
    tokenizer: MakeTokenizer,
    tmp_path: Path,
    wanted: str,
    token_id: int,
) -> None:
    """The user's choice not taken, or an id read as text."""
    folder = source("llama", tokenizer=tokenizer(*SLOTS), vocab_size=260)
    mask = convert(folder, tmp_path / "target", mask_token=wanted)["mask_token"]
    assert mask == {"token": SLOTS[token_id - 258], "token_id": token_id, "how": "named"}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("<nothing>", "mask token is '<nothing>'; allowed: a token of the vocabulary or its id"),
        ("270", "mask token is '270'; allowed: a token of the vocabulary or its id"),
        ("</s>", "'</s>', which begins, ends or pads texts"),
        ("a", "'a'.* an ordinary token of texts"),
        ("97", "'97'.* an ordinary token of texts"),
    ],
)
def test_mask_tokens_that_cannot_be(
    source: Source,
    tokenizer: MakeTokenizer,
    wanted: str,
    message: str,
) -> None:
    """Texts that can never end, or that lose the letter a."""
    folder = source("llama", tokenizer=tokenizer(*SLOTS), vocab_size=300)
    refused(folder, message, error=ConfigError, mask_token=wanted)


@pytest.mark.parametrize("role", ["eos_token", "pad_token", "unk_token"])
def test_a_token_that_only_the_tokenizer_uses(
    source: Source, tokenizer: MakeTokenizer, role: str
) -> None:
    """A turn's end as the mask token, where the configuration names the end of a text alone."""
    folder = source("llama", tokenizer=tokenizer("<|im_end|>"), vocab_size=300)
    edit_json(folder / "tokenizer_config.json", **{role: "<|im_end|>"})
    message = "'<|im_end|>', which begins, ends or pads texts, or is the unknown token"
    refused(folder, re.escape(message), error=ConfigError, mask_token="<|im_end|>")


def test_a_new_id_that_ends_texts(source: Source, tmp_path: Path) -> None:
    """A mask token that ends texts, since an id without a row was among the ends already."""
    folder = source("llama")
    edit_json(folder / "generation_config.json", eos_token_id=[257, 320])
    assert convert(folder, tmp_path / "target")["mask_token"]["token_id"] == 321


def test_mask_id_without_a_tokenizer(source: Source) -> None:
    """An id beyond the embedding, or the end-of-text id, taken for want of a vocabulary."""
    folder = source("llama")
    for wanted in ("320", "257", "<mask>"):
        refused(folder, "without a tokenizer allowed: an id", error=ConfigError, mask_token=wanted)
