"""Fixtures of the tests of conversion."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from tests.checkpoint.made_sources import MakeTokenizer, Source, make_source


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """`source(family, *, tokenizer=None, dtype=torch.float32, **config)`: a random checkpoint."""
    return partial(make_source, tmp_path / "source")


@pytest.fixture
def tokenizer(byte_tokenizer: PreTrainedTokenizerFast) -> MakeTokenizer:
    """`tokenizer(*reserved, **options)`: bytes, `<s>` 256, `</s>` 257, then the reserved slots."""

    def make(*reserved: str, **options: Any) -> PreTrainedTokenizerFast:
        content = json.loads(byte_tokenizer.backend_tokenizer.to_str()) | {"added_tokens": []}
        raw = Tokenizer.from_str(json.dumps(content))
        raw.add_special_tokens(["<s>", "</s>", *reserved])
        return PreTrainedTokenizerFast(
            tokenizer_object=raw,
            bos_token="<s>",
            eos_token="</s>",
            clean_up_tokenization_spaces=False,
            **options,
        )

    return make
