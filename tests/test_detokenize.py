"""New text behind what stands before it, with a tokenizer that treats a text's beginning in its own
way: everywhere the same, and joined to the prompt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serving.conftest import serving
from trimode.checkpoint.io import save_checkpoint
from trimode.cli.main import main
from trimode.detokenize import GrowingText, decode, text_before
from trimode.loading import load
from trimode.model import TriModeModel
from trimode.runtime import TriModeLM
from trimode.vocabulary import Vocabulary

CAT = " cat"


@pytest.fixture(scope="module")
def lm(tiny_model: Callable[..., TriModeModel], piece_tokenizer: Any) -> TriModeLM:
    size = len(piece_tokenizer)
    model = tiny_model(
        torch.float64,
        vocab_size=size,
        bos_token_id=1,
        eos_token_id=2,
        mask_token_id=piece_tokenizer.mask_token_id,
        initializer_range=0.2,
    )
    return TriModeLM(model, piece_tokenizer)


def only(lm: TriModeLM, *pieces: str) -> dict[int, float]:
    """A bias under which only these are written."""
    return {lm.tokenizer.convert_tokens_to_ids(piece): 1e4 for piece in pieces}


def test_the_tokenizer_is_as_described(lm: TriModeLM) -> None:
    """Prevents: tests of a decoder that strips nothing, with a tokenizer of another kind."""
    ids = lm.encode("the cat")
    assert lm.tokenizer.convert_ids_to_tokens(ids) == ["<s>", "▁the", "▁cat"]
    assert decode(lm.tokenizer, ids[-1:]) == "cat"
    assert decode(lm.tokenizer, ids) == "the cat"
    assert lm.tokenizer.convert_ids_to_tokens(lm.encode("é"))[-2:] == ["<0xC3>", "<0xA9>"]


@pytest.mark.parametrize("mode", ["ar", "linear", "diffusion"])
@pytest.mark.parametrize("prompt", ["", "the", "hi [INST]", "the cat.", "é", "the\n", "x "])
def test_text_joins_the_prompt(lm: TriModeLM, prompt: str, mode: str) -> None:
    """Prevents: a space that is lost between prompt and text, or one too many."""
    for seed in range(6):
        options: dict[str, Any] = {"mode": mode, "seed": seed, "temperature": 1.0, "heal": False}
        found = lm.generate(prompt, max_new_tokens=12, **options)
        whole = decode(lm.tokenizer, [*found.prompt_ids, *found.token_ids])
        if whole.startswith(prompt):  # single bytes behind those of the prompt may change them
            assert whole == prompt + found.text
        else:
            assert prompt == "é"
            after = decode(lm.tokenizer, [lm.vocabulary.letter, *found.token_ids])
            assert found.text == after[1:]
        stream = lm.stream(prompt, max_new_tokens=12, **options)
        assert "".join(stream) == found.text


def test_words_keep_their_spaces(lm: TriModeLM) -> None:
    """Prevents: ` cat cat` that comes as `cat cat`."""
    found = lm.generate("the", max_new_tokens=2, logit_bias=only(lm, "▁cat"), heal=False)
    assert found.text == CAT * 2
    at_start = lm.generate("", max_new_tokens=2, logit_bias=only(lm, "▁cat"))
    assert at_start.text == "cat" + CAT  # as the tokenizer reads a text's beginning
    ids = lm.encode("the")
    assert lm.generate(ids, max_new_tokens=2, logit_bias=only(lm, "▁cat")).text == CAT * 2


@pytest.mark.parametrize("stop", [CAT, "t c", "e", "he"])
def test_a_stop_string_ends_the_text_where_it_first_is(lm: TriModeLM, stop: str) -> None:
    """Prevents: a stop string that is missed at the text's edge, or found in the prompt."""
    bias = only(lm, "▁cat")
    found = lm.generate("the", max_new_tokens=4, logit_bias=bias, stop=stop, heal=False)
    whole = CAT * 4
    assert found.text == whole.partition(stop)[0]
    assert found.finish_reason == ("stop" if stop in whole else "length")
    assert len(found.token_ids) == {CAT: 1, "t c": 2}.get(stop, 4)


def test_a_text_is_of_its_regex(lm: TriModeLM) -> None:
    """Prevents: a constrained text that its own expression does not match."""
    pytest.importorskip("llguidance")
    assert lm.generate("the", regex="( cat){3}", max_new_tokens=9, heal=False).text == CAT * 3


def test_a_character_begun_in_the_prompt_is_new(lm: TriModeLM) -> None:
    """Prevents: half a character shown twice or never."""
    ids = lm.encode("the 😀")
    *before, last = ids
    found = lm.generate(before, max_new_tokens=1, logit_bias={last: 1e4})
    assert found.token_ids == [last]
    assert found.text == "😀"
    stream = lm.stream(before, max_new_tokens=1, logit_bias={last: 1e4})
    assert "".join(stream) == "😀"


def test_a_replacement_character_of_the_prompt_is_not_new(lm: TriModeLM) -> None:
    """Prevents: U+FFFD in a prompt taken for half a character."""
    found = lm.generate("\ufffd", max_new_tokens=1, logit_bias=only(lm, "▁cat"), heal=False)
    assert found.text == CAT


def test_pieces_never_change(lm: TriModeLM) -> None:
    """Prevents: a piece given out that a later token changes."""
    generator = torch.Generator().manual_seed(0)
    assert lm.vocabulary is not None
    for _ in range(60):
        size = len(lm.tokenizer) - 1
        ids = torch.randint(3, size, (14,), generator=generator).tolist()
        before = text_before(lm.vocabulary, ids[:4])
        text = GrowingText(lm.tokenizer, before)
        pieces = [text.push([token_id]) for token_id in ids[4:]]
        assert "".join(pieces) + text.rest == GrowingText(lm.tokenizer, before).whole(ids[4:])


def test_revise_reads_such_a_tokenizer(lm: TriModeLM) -> None:
    """Prevents: a refusal of every text, for the first token's space is not in it."""
    made = lm.revise("cat the cat é.", min_gain=0.0, budget=3)
    assert made.edits
    text = "cat the cat é."
    for edit in reversed(made.edits):
        assert text[edit.start :].startswith(edit.old)
        text = text[: edit.start] + edit.new + text[edit.start + len(edit.old) :]
    assert text == made.text


def test_bytes_of_tokens(piece_tokenizer: Any, byte_tokenizer: Any) -> None:
    """Prevents: healing and log-probabilities by wrong bytes."""
    vocabulary = Vocabulary(piece_tokenizer, mask_token_id=None)
    named = piece_tokenizer.convert_tokens_to_ids
    assert vocabulary.token_bytes[named("▁cat")] == b" cat"
    assert vocabulary.token_bytes[named("<0xC3>")] == b"\xc3"
    assert named("</s>") not in vocabulary.token_bytes
    assert vocabulary.shown(named("</s>")) == ("</s>", b"</s>")
    plain = Vocabulary(byte_tokenizer, mask_token_id=None)
    assert all(plain.token_bytes[byte] == bytes([byte]) for byte in range(256))
    assert plain.shown(0xC3) == ("\ufffd", b"\xc3")


@pytest.mark.parametrize("prompt", ["the cat", "the", "é"])
def test_json_and_stream_say_the_same(
    lm: TriModeLM, prompt: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents: surfaces that decode each in its own way."""
    save_checkpoint(lm.model, tmp_path / "pieces", tokenizer=lm.tokenizer)
    saved = load(tmp_path / "pieces", device="cpu", dtype="float64")
    law: dict[str, Any] = {"mode": "linear", "temperature": 1.0, "seed": 4}
    wanted = saved.generate(prompt, max_new_tokens=24, **law).text
    assert len(wanted) > 4
    assert "".join(saved.stream(prompt, max_new_tokens=24, **law)) == wanted
    words = ["--model", str(tmp_path / "pieces"), "--device", "cpu", "--dtype", "float64"]
    words += [f"--{name}={value}" for name, value in law.items()]
    capsys.readouterr()
    assert main(["generate", prompt, *words, "--max-new-tokens", "24", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == wanted
    assert main(["generate", prompt, *words, "--max-new-tokens", "24"]) == 0
    assert capsys.readouterr().out.removesuffix("\n") == (prompt + wanted).removesuffix("\n")
    with serving(saved, num_rows=1, context_len=64) as server:
        body = {"prompt": prompt, "max_tokens": 24, **law}
        answer = server.post("completions", body).json()
        assert answer["choices"][0]["text"] == wanted
        response = server.post("completions", {**body, "stream": True})
        lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
        assert lines.pop() == "[DONE]"
        pieces = [choice["text"] for line in lines for choice in json.loads(line)["choices"]]
        assert "".join(pieces) == wanted
