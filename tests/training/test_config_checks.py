"""Data and a model that do not belong together are refused before a weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.training.fake_stream import write_data
from trimode.errors import ConfigError
from trimode.model import NemotronLabsDiffusionConfig
from trimode.training.config import ModelPart, StagePart, TrainConfig
from trimode.training.config_checks import check_against_model, check_same_vocabulary, open_heldout
from trimode.training.shards import TokenShards


def write_tokenizer(folder: Path, vocabulary: Any, added: dict[int, str]) -> Path:
    folder.mkdir(parents=True)
    tree = {
        "model": {"vocab": vocabulary},
        "added_tokens": [{"id": i, "content": token} for i, token in added.items()],
    }
    (folder / "tokenizer.json").write_text(json.dumps(tree), encoding="utf-8")
    return folder


def test_another_tokenizer_of_the_same_size_is_refused(tmp_path: Path) -> None:
    """Ids that mean other tokens train without a word, and the model is lost."""
    model = write_tokenizer(tmp_path / "model", {"a": 0, "b": 1, "[X]": 2}, {2: "[X]"})
    renamed = write_tokenizer(tmp_path / "renamed", {"a": 0, "b": 1, "[Y]": 2}, {2: "[Y]"})
    unigram = write_tokenizer(tmp_path / "unigram", [["a", 0.0], ["b", 0.0]], {})
    for same in (model, renamed, unigram, tmp_path / "none"):
        check_same_vocabulary(same, model)
    other = write_tokenizer(tmp_path / "other", {"a": 0, "c": 1, "[X]": 2}, {2: "[X]"})
    with pytest.raises(ConfigError, match=r"id 1 is 'c' there and 'b' here; prepare the data with"):
        check_same_vocabulary(other, model)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    stage = StagePart(name="a", tokens=64, sequence_length=32, batch_tokens=256)
    init = tmp_path / "model"
    init.mkdir()
    data = str(write_data(tmp_path / "data"))
    return TrainConfig(data=data, output_dir="x", stages=(stage,), model=ModelPart(init=str(init)))


@pytest.mark.parametrize("eos", [5, [5, 6], None])
def test_another_end_of_text_is_refused(config: TrainConfig, eos: Any) -> None:
    """A model tuned to end with a token at which decoding does not stop."""
    shape = {"vocab_size": 64, "mask_token_id": 2, "bos_token_id": 0}
    data = TokenShards.open(Path(config.data), "train")
    check_against_model(config, data, NemotronLabsDiffusionConfig(**shape, eos_token_id=[1, 5]))
    with pytest.raises(ConfigError, match="eos_token_id of the data .* is 1, but model.init"):
        check_against_model(config, data, NemotronLabsDiffusionConfig(**shape, eos_token_id=eos))


def test_empty_held_out_split_is_refused_at_the_start(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too few conversations to hold any out, found at the first evaluation, hours later."""
    empty = SimpleNamespace(kind="chat", num_documents=0, num_tokens=0)
    monkeypatch.setattr(TokenShards, "open", lambda folder, split: empty)
    model: Any = SimpleNamespace(config=SimpleNamespace(block_size=4))
    with pytest.raises(ConfigError, match=r"held_out split of .* is empty: prepare more"):
        open_heldout(config, model)
