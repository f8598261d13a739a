"""Flags for single tokens: words and files in, what `generate` takes out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from trimode.checkpoint.io import save_checkpoint
from trimode.cli.main import main
from trimode.loading import load
from trimode.model import TriModeModel
from trimode.runtime import Generation

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., TriModeModel],
    byte_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    path = tmp_path_factory.mktemp("control") / "tiny"
    save_checkpoint(tiny_model(torch.float32), path, tokenizer=byte_tokenizer)
    return path


def words(folder: Path, *more: str) -> list[str]:
    return ["generate", "--model", str(folder), "--max-new-tokens", "9", "--seed", "3", "x", *more]


def test_flags_reach_the_law(folder: Path, capsys: Capture) -> None:
    """Prevents: a flag that is read and dropped; numbers of other tokens beside the text's."""
    flags = "--logit-bias 120=9 --logit-bias 97=-2.5 --repetition-penalty 1.2 --logprobs 2"
    flags += " --max-thinking-tokens 4 --end-think-token-id 98 --frequency-penalty 0.5"
    flags += " --presence-penalty -0.25 --min-p 0.03 --top-k -1 --min-tokens 7 --temperature 1.2"
    assert main(words(folder, "--json", *flags.split())) == 0
    record = json.loads(capsys.readouterr().out)
    expected = load(folder).generate(
        "x",
        max_new_tokens=9,
        seed=3,
        logit_bias={120: 9, 97: -2.5},
        repetition_penalty=1.2,
        logprobs=2,
        max_thinking_tokens=4,
        end_think_token_id=98,
        frequency_penalty=0.5,
        presence_penalty=-0.25,
        min_p=0.03,
        min_tokens=7,
        temperature=1.2,
    )
    assert isinstance(expected, Generation)
    assert expected.logprobs is not None
    assert record["token_ids"] == expected.token_ids
    assert [one["token_id"] for one in record["logprobs"]] == expected.token_ids
    for one, found in zip(record["logprobs"], expected.logprobs, strict=True):
        assert one["logprob"] == found.logprob
        assert [(top["token_id"], top["logprob"]) for top in one["top"]] == list(found.top)
        assert len(one["top"]) == 2
    assert main(words(folder, "--json")) == 0
    assert "logprobs" not in json.loads(capsys.readouterr().out)


def test_a_prompt_is_scored(folder: Path, capsys: Capture) -> None:
    """Prevents: a flag that is read and dropped, or numbers of other tokens beside the prompt's."""
    flags = ["--json", "--prompt-logprobs", "1", "--max-new-tokens", "0"]
    assert main(["generate", "--model", str(folder), "def", *flags]) == 0
    record = json.loads(capsys.readouterr().out)
    expected = load(folder).generate("def", max_new_tokens=0, prompt_logprobs=1)
    assert isinstance(expected, Generation)
    assert expected.prompt_logprobs is not None
    assert (record["text"], record["token_ids"], record["new_tokens"]) == ("", [], 0)
    assert [one["token_id"] for one in record["prompt_logprobs"]] == list(b"def")
    assert record["prompt_logprobs"][0] == {"token_id": ord("d"), "logprob": None, "top": []}
    for one, found in zip(record["prompt_logprobs"][1:], expected.prompt_logprobs[1:], strict=True):
        assert found is not None
        assert one["logprob"] == found.logprob
        assert [(top["token_id"], top["logprob"]) for top in one["top"]] == list(found.top)


def test_grammars_from_words_and_files(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    """Prevents: a schema's file taken for a schema, or the other way round."""
    schema = '{"enum": ["abc"]}'
    (tmp_path / "schema.json").write_text(schema)
    (tmp_path / "grammar.lark").write_text('start: "a" "b"*\n')
    for flags, text in (
        (["--json-schema", schema], '"abc"'),
        (["--json-schema", str(tmp_path / "schema.json")], '"abc"'),
        (["--regex", "[a]{3}b"], "aaab"),
    ):
        assert main(words(folder, "--json", *flags)) == 0
        record = json.loads(capsys.readouterr().out)
        assert (record["text"], record["finish_reason"]) == (text, "stop")
    assert main(words(folder, "--grammar", str(tmp_path / "grammar.lark"))) == 0
    text = capsys.readouterr().out
    assert text.startswith("xa")
    assert set(text.strip()) <= set("xab")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--logit-bias", "5"], "--logit-bias is '5'; allowed: ID=X, such as 17=-5"),
        (["--logit-bias", "a=1"], "--logit-bias is 'a=1'; allowed: ID=X"),
        (["--logit-bias", "5=1", "--logit-bias", "5=2"], "--logit-bias is given twice for token 5"),
        (
            ["--logit-bias", "999=1"],
            "a token of logit_bias is 999; allowed: 0 to 258",
        ),
        (["--logprobs", "2"], "--logprobs is 2; allowed: only with --json"),
        (["--prompt-logprobs", "2"], "--prompt-logprobs is 2; allowed: only with --json"),
        (["--json-schema", "none.json"], "--json-schema is 'none.json', which cannot be read: No"),
        (["--grammar", "none.lark"], "--grammar is 'none.lark', which cannot be read: No such"),
        (["--regex", "a", "--mode", "diffusion"], "regex is 'a'; allowed: None in mode"),
        (["--regex", "a", "--ignore-eos"], "regex is 'a'; allowed: None with ignore_eos"),
    ],
)
def test_what_is_wrong_is_one_line(
    folder: Path, capsys: Capture, flags: list[str], says: str
) -> None:
    """Prevents: a traceback, or a word that is ignored."""
    assert main(words(folder, *flags)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert says in err
