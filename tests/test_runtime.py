"""`TriModeLM`: what `generate` takes and refuses, and `stream`, whose pieces join to its text."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tests.conftest import BOS, EOS, MASK
from trimode.decoding import GenerationParams
from trimode.detokenize import GrowingText
from trimode.errors import ConfigError, RequestError
from trimode.loading import load
from trimode.model import TriModeModel
from trimode.runtime import MAX_BATCH, TriModeLM

MODES = ("ar", "diffusion", "linear")


@pytest.fixture(scope="module")
def lm(
    tiny_model: Callable[..., TriModeModel], byte_tokenizer: PreTrainedTokenizerFast
) -> TriModeLM:
    """Random bytes: much of what it emits is half a character."""
    return TriModeLM(tiny_model(torch.float32), byte_tokenizer)


@pytest.fixture(scope="module")
def ascii_lm(
    tiny_model: Callable[..., TriModeModel], byte_tokenizer: PreTrainedTokenizerFast
) -> TriModeLM:
    """Chooses ids below 128 only, so every token is one character."""
    return TriModeLM(tiny_model(torch.float32, num_valid_tokens=128), byte_tokenizer)


@pytest.fixture(scope="module")
def agreeing_lm(
    tiny_model: Callable[..., TriModeModel], byte_tokenizer: PreTrainedTokenizerFast
) -> TriModeLM:
    """One embedding for all tokens, so both views have the same law and every draft is accepted."""
    model = tiny_model(torch.float64, num_valid_tokens=128, initializer_range=0.02)
    embedding = model.encoder.embed_tokens.weight
    embedding.copy_(embedding[:1].expand_as(embedding).clone())
    return TriModeLM(model, byte_tokenizer)


def joined(lm: TriModeLM, prompt: str, **options: object) -> str:
    """The pieces of a stream, after checking that its own result is the text of `generate`."""
    stream = lm.stream(prompt, **options)
    text = "".join(stream)
    generation = lm.generate(prompt, **options)
    assert stream.generation is not None
    assert stream.generation.token_ids == generation.token_ids
    assert stream.generation.finish_reason == generation.finish_reason
    assert text == stream.generation.text == generation.text
    return text


class TestStream:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_pieces_join_to_the_text(self, lm: TriModeLM, mode: str, temperature: float) -> None:
        """Prevents: text lost or doubled between pieces, or at the end."""
        for seed in range(4):
            options = {"mode": mode, "temperature": temperature, "seed": seed}
            assert joined(lm, "def ", max_new_tokens=40, **options)

    def test_half_characters_wait(self, lm: TriModeLM) -> None:
        """Prevents: U+FFFD in the middle of a stream where a character was on its way."""
        growing = GrowingText(lm.tokenizer)
        pieces = [growing.push([byte]) for byte in "aé😀\x00€".encode()]
        assert pieces == ["a", "", "é", "", "", "", "😀", "\x00", "", "", "€"]
        assert growing.rest == ""

    def test_broken_bytes_wait_no_longer_than_they_must(self, lm: TriModeLM) -> None:
        """Prevents: a stream that stays silent while a model babbles bytes that are no text."""
        growing = GrowingText(lm.tokenizer)
        pieces = [growing.push([byte]) for byte in (0x41, 0x80, 0x80, 0xF0, 0x9F, 0x42)]
        assert pieces == ["A", "", "\ufffd", "\ufffd", "", "\ufffdB"]
        growing.push([0xE2])
        assert growing.rest == "\ufffd"

    def test_special_tokens_leave_no_trace(self, lm: TriModeLM) -> None:
        """Prevents: `<|eos|>` in the text, or a half character cut in two by a skipped token."""
        growing = GrowingText(lm.tokenizer)
        assert growing.push([EOS]) + growing.push([BOS, 0xC3]) == ""
        assert growing.push([EOS]) == ""
        assert growing.push([0xA9]) == "é"

    @pytest.mark.parametrize("seed", range(6))
    @pytest.mark.parametrize("kind", ["byte level", "sentencepiece"])
    def test_fragments_of_characters(
        self,
        tiny_model: Callable[..., TriModeModel],
        byte_tokenizer: PreTrainedTokenizerFast,
        kind: str,
        seed: int,
    ) -> None:
        """Prevents: a piece that a later token changes; sentencepiece decodes byte runs whole."""
        tokenizer = fragments(byte_tokenizer) if kind == "byte level" else sentencepiece()
        model = tiny_model(
            torch.float32,
            vocab_size=len(tokenizer),
            num_valid_tokens=len(tokenizer) - 3,
            mask_token_id=len(tokenizer) - 1,
            bos_token_id=None,
            eos_token_id=None,
            initializer_range=0.05,
        )
        text = joined(
            TriModeLM(model, tokenizer), [0, 1], temperature=1.0, seed=seed, max_new_tokens=120
        )
        assert "A" in text

    @pytest.mark.parametrize("mode", MODES)
    def test_stop_strings_across_pieces(self, ascii_lm: TriModeLM, mode: str) -> None:
        """Prevents: the first half of a stop string being shown before the second half arrives."""
        options = {"mode": mode, "max_new_tokens": 40, "temperature": 1.0, "seed": 5}
        whole = joined(ascii_lm, "x", **options)
        assert len(whole) == 40
        for start in (0, 1, 7, 17, 36):
            stop = whole[start : start + 4]
            text = joined(ascii_lm, "x", stop=["never\x00", stop], **options)
            assert text == whole[: whole.index(stop)]

    def test_what_only_looks_like_a_stop_string_is_shown(self, ascii_lm: TriModeLM) -> None:
        """Prevents: held back text that is never let go, in the middle or at the end."""
        whole = joined(ascii_lm, "x", max_new_tokens=30)
        stop = [whole[4:7] + "\x7f\x7f", whole[-2:] + "\x7f\x7f", whole[9:10] * 9]
        assert joined(ascii_lm, "x", max_new_tokens=30, stop=stop) == whole

    def test_ended_stream(self, lm: TriModeLM) -> None:
        """Prevents: a stream that starts again, or has no result, after its end."""
        stream = lm.stream("x", max_new_tokens=3, seed=0)
        assert stream.generation is None
        list(stream)
        assert list(stream) == []
        assert stream.stats.new_tokens == len(stream.generation.token_ids) == 3

    @pytest.mark.parametrize("how", ["close", "drop"])
    def test_early_end_frees_everything(self, ascii_lm: TriModeLM, how: str) -> None:
        """Prevents: K/V rows that live on in a cycle after the reader has left."""
        gc.collect()
        gc.disable()
        try:
            stream = ascii_lm.stream("x", max_new_tokens=50)
            next(stream)
            engine = weakref.ref(stream._engine)
            assert engine() is not None
            if how == "close":
                stream.close()
                stream.close()
                assert list(stream) == []
                assert stream.generation.finish_reason == "abort"
                assert stream.generation.text
            del stream
            assert engine() is None
        finally:
            gc.enable()

    def test_error_on_the_way_ends_it(self, lm: TriModeLM) -> None:
        """Prevents: going on with an engine whose step was cut short."""

        def fail(index: int, event: object) -> None:
            raise KeyError("watcher")

        stream = lm.stream("x", on_event=fail)
        with pytest.raises(KeyError, match="watcher"):
            next(stream)
        assert list(stream) == []

    def test_refuses_at_once(self, lm: TriModeLM) -> None:
        """Prevents: a wrong argument that shows only when the first piece is asked for."""
        with pytest.raises(RequestError, match="mode is 'fast'; allowed: ar, diffusion, linear"):
            lm.stream("x", mode="fast")
        with pytest.raises(RequestError, match="one prompt, and got a list of 2"):
            lm.stream(["x", "y"])
        with pytest.raises(TypeError, match="max_tokens"):
            lm.stream("x", max_tokens=3)
        with pytest.raises(RequestError, match="needs a tokenizer"):
            TriModeLM(lm.model, None).stream([1, 2])


class TestPrompts:
    def test_one_or_several(self, lm: TriModeLM) -> None:
        """Prevents: a list of one prompt taken for one prompt, and ragged batches that disagree."""
        one = lm.generate("ab", max_new_tokens=9)
        several = lm.generate(["ab", "abcdefg", [97, 98]], max_new_tokens=9)
        assert [g.token_ids for g in several[::2]] == [one.token_ids] * 2
        assert several[1].prompt_ids == list(b"abcdefg")
        assert lm.generate(["ab"], max_new_tokens=9)[0].token_ids == one.token_ids
        assert lm.generate([[97, 98]], max_new_tokens=9)[0].token_ids == one.token_ids
        assert lm.generate([97, 98], max_new_tokens=9).token_ids == one.token_ids

    def test_arrays_and_tensors(self, lm: TriModeLM) -> None:
        """Prevents: a tensor of ids taken for many prompts, and numpy integers that overflow."""
        expected = lm.generate([97, 98], max_new_tokens=6).token_ids
        for prompt in (np.array([97, 98]), torch.tensor([97, 98]), tuple(np.array([97, 98]))):
            generation = lm.generate(prompt, max_new_tokens=6)
            assert generation.token_ids == expected
            assert [type(i) for i in generation.prompt_ids] == [int, int]
        for batch in (np.array([[97, 98]] * 2), torch.tensor([[97, 98]] * 2)):
            assert [g.token_ids for g in lm.generate(batch, max_new_tokens=6)] == [expected] * 2

    def test_numpy_arguments(self, lm: TriModeLM) -> None:
        """Prevents: refusing a numpy integer, or hashing it into the noise with 64-bit overflow."""
        plain = {"max_new_tokens": 7, "block_length": 4, "temperature": 0.5, "top_k": 9}
        expected = lm.generate("a", seed=2**64 - 1, stop_token_ids=[5], **plain)
        generation = lm.generate(
            "a",
            seed=np.uint64(2**64 - 1),
            max_new_tokens=np.int64(7),
            block_length=np.int32(4),
            temperature=np.float32(0.5),
            top_k=np.int16(9),
            stop_token_ids=np.array([5]),
        )
        assert generation.token_ids == expected.token_ids
        assert type(generation.seed) is int

    def test_empty_prompt_is_bos(
        self, lm: TriModeLM, tiny_model: Callable[..., TriModeModel]
    ) -> None:
        """Prevents: a prefill of no tokens."""
        assert lm.generate("", max_new_tokens=1).prompt_ids == [BOS]
        assert [g.prompt_ids for g in lm.generate(["", "a"], max_new_tokens=1)] == [[BOS], [97]]
        model = tiny_model(torch.float32, bos_token_id=None)
        with pytest.raises(RequestError, match="no BOS"):
            TriModeLM(model, lm.tokenizer).generate("")

    def test_refused_prompts(self, lm: TriModeLM) -> None:
        """Prevents: silent rounding of ids, and errors of the embedding instead of ours."""
        with pytest.raises(RequestError, match="empty list; give ''"):
            lm.generate([])
        for wrong in ([1.5], [True], [-1], [259], np.array([0.5])):
            with pytest.raises(RequestError, match="token id .*; allowed: 0 to 258"):
                lm.generate(wrong)
        with pytest.raises(RequestError, match="needs a tokenizer"):
            TriModeLM(lm.model, None).generate("text")

    def test_without_a_tokenizer(self, lm: TriModeLM) -> None:
        """Prevents: a checkpoint without tokenizer that cannot be used at all."""
        bare = TriModeLM(lm.model, None)
        generation = bare.generate([97], max_new_tokens=5)
        assert generation.token_ids == lm.generate("a", max_new_tokens=5).token_ids
        assert generation.text == ""
        with pytest.raises(RequestError, match="stop strings need a tokenizer"):
            bare.generate([97], stop="x")

    def test_beyond_the_context(self, lm: TriModeLM) -> None:
        """Prevents: positions that the network never saw; both numbers are in the message."""
        fits = lm.generate("x" * 500, max_new_tokens=12, mode="ar", ignore_eos=True)
        assert len(fits.token_ids) == 12
        with pytest.raises(
            RequestError, match=r"500 tokens \+ max_new_tokens=13 .* context of 512"
        ):
            lm.generate("x" * 500, max_new_tokens=13)

    def test_more_prompts_than_run_together(self, lm: TriModeLM) -> None:
        """Prevents: results out of order once prompts have to wait for a row."""
        prompts = [[i] for i in range(MAX_BATCH + 3)]
        together = lm.generate(prompts, max_new_tokens=2, mode="ar")
        assert [g.prompt_ids for g in together] == prompts
        alone = lm.generate(prompts[-1], max_new_tokens=2, mode="ar")
        assert together[-1].token_ids == alone.token_ids


class TestOptions:
    def test_seeds(self, lm: TriModeLM) -> None:
        """Prevents: seeds mixed up between prompts, or drawn and not told."""
        options = {"temperature": 1.0, "max_new_tokens": 8, "ignore_eos": True}
        one, two = (lm.generate("a", seed=seed, **options).token_ids for seed in (1, 2))
        assert one != two
        pair = lm.generate(["a", "a"], seed=[2, 1], **options)
        assert [g.token_ids for g in pair] == [two, one]
        assert [g.seed for g in pair] == [2, 1]
        pair = lm.generate(["a", "a"], seed=np.array([2, 1]), **options)
        assert [g.token_ids for g in pair] == [two, one]
        same = lm.generate(["a", "a"], seed=1, **options)
        assert [g.token_ids for g in same] == [one, one]
        drawn = lm.generate(["a", "a"], **options)
        assert drawn[0].seed != drawn[1].seed
        assert lm.generate("a", seed=drawn[1].seed, **options).token_ids == drawn[1].token_ids
        with pytest.raises(RequestError, match="3 entries for 2 prompts"):
            lm.generate(["a", "b"], seed=[1, 2, 3])
        with pytest.raises(RequestError, match="seed is -1"):
            lm.generate("a", seed=-1)
        with pytest.raises(RequestError, match=r"seed is 1\.5"):
            lm.generate("a", seed=1.5)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"mode": "cubic"}, "mode is 'cubic'; allowed: ar, diffusion, linear, branching"),
            ({"mode": "ar", "block_length": 4}, "block_length is 4; mode 'ar' has no blocks"),
            ({"mode": "ar", "steps": 4}, "steps is 4"),
            ({"mode": "linear", "block_length": 1}, "block_length is 1"),
            ({"max_new_tokens": 0}, "max_new_tokens is 0"),
            ({"max_new_tokens": 2.0}, "max_new_tokens is 2.0"),
            ({"threshold": 1.5}, "threshold is 1.5"),
            ({"mode": "linear", "steps": 9}, "steps is 9; allowed: None, or 1 to block_length=8"),
            ({"temperature": -1}, "temperature is -1"),
            ({"temperature": float("nan")}, "temperature is nan"),
            ({"top_p": 0}, "top_p is 0"),
            ({"top_k": -2}, "top_k is -2"),
            ({"min_p": -0.1}, "min_p is -0.1"),
            (
                {"min_tokens": 129},
                "min_tokens is 129; allowed: an integer of 0 to max_new_tokens=128",
            ),
            ({"stop": ""}, "stop is"),
            ({"stop_token_ids": ["x"]}, "stop_token_ids is"),
        ],
    )
    def test_refused(self, lm: TriModeLM, options: dict[str, object], message: str) -> None:
        """Prevents: an argument without effect, or an error that does not name it."""
        with pytest.raises(RequestError) as raised:
            lm.generate("a", **options)
        assert message in str(raised.value)

    @pytest.mark.parametrize("mode", MODES)
    def test_shorter_is_a_prefix(self, lm: TriModeLM, mode: str) -> None:
        """Prevents: a limit inside a block that changes what comes before it."""
        options = {"mode": mode, "temperature": 1.0, "seed": 3, "ignore_eos": True}
        whole = lm.generate("ab", max_new_tokens=21, **options).token_ids
        for limit in range(1, 21):
            generation = lm.generate("ab", max_new_tokens=limit, **options)
            assert generation.token_ids == whole[:limit]
            assert generation.finish_reason == "length"
        assert MASK not in whole

    @pytest.mark.parametrize("mode", MODES)
    def test_stop_tokens_inside_a_run(self, agreeing_lm: TriModeLM, mode: str) -> None:
        """Prevents: accepted or revealed tokens emitted behind the one that ends the text."""
        options = {"mode": mode, "temperature": 1.0, "seed": 8, "max_new_tokens": 24}
        whole = agreeing_lm.generate("a", **options)
        if mode == "linear":
            assert whole.stats.acceptance_lengths[0] == 8  # so these cuts are inside a run
        for place in (0, 3, 6, 11):
            token_id = whole.token_ids[place]
            cut = agreeing_lm.generate("a", stop_token_ids=[token_id], **options)
            assert cut.token_ids == whole.token_ids[: whole.token_ids.index(token_id) + 1]
            assert cut.finish_reason == "stop"

    def test_eos_inside_an_accepted_run(self, agreeing_lm: TriModeLM) -> None:
        """Prevents: text after EOS; and `ignore_eos` being ignored."""
        config = agreeing_lm.model.config
        options = {"temperature": 1.0, "seed": 8, "max_new_tokens": 16}
        whole = agreeing_lm.generate("a", **options)
        config.eos_token_id = [EOS, whole.token_ids[4]]
        try:
            cut = agreeing_lm.generate("a", **options)
            assert cut.token_ids == whole.token_ids[:5]
            assert cut.finish_reason == "stop"
            going_on = agreeing_lm.generate("a", ignore_eos=True, **options)
            assert going_on.token_ids == whole.token_ids
        finally:
            config.eos_token_id = EOS

    @pytest.mark.parametrize("mode", MODES)
    def test_stop_strings(self, ascii_lm: TriModeLM, mode: str) -> None:
        """Prevents: the stop string, or text behind it in the same block, in the text."""
        options = {"mode": mode, "max_new_tokens": 30}
        whole = ascii_lm.generate("a", **options)
        stop = whole.text[5:8]
        cut = ascii_lm.generate("a", stop=stop, **options)
        assert cut.text == whole.text[: whole.text.index(stop)]
        assert cut.token_ids == whole.token_ids[: whole.text.index(stop) + 3]
        assert cut.finish_reason == "stop"

    @pytest.mark.parametrize("between", [[EOS] * 5, [MASK + 1]])
    def test_stop_strings_across_tokens_without_text(
        self, lm: TriModeLM, between: list[int]
    ) -> None:
        """Prevents: a stop string missed because its bytes lie far apart in tokens."""
        sequence = lm.sequence(
            "x",
            GenerationParams(
                mode="ar", max_new_tokens=40, block_length=8, seed=0, stop=("aé",), ignore_eos=True
            ),
        )
        first, second = "é".encode()
        filler = [i for i in between if i in (EOS, BOS)]
        for token_id in (98, 97, *filler, first, *filler):
            assert sequence.emit([token_id]) == 1
            assert not sequence.is_finished
        sequence.emit([second])
        assert sequence.finish_reason == "stop"

    def test_a_stop_string_that_only_a_part_of_the_text_shows(self, lm: TriModeLM) -> None:
        """Prevents: a text cut where the middle of a character was taken for a stop string."""
        stop = "\ufffd" * 2
        options = {"mode": "ar", "block_length": 8, "seed": 0, "ignore_eos": True}
        params = GenerationParams(max_new_tokens=20, stop=(stop,), **options)
        sequence = lm.sequence("x", params)
        for token_id in "a😀b😀cdefgh".encode():
            sequence.emit([token_id])
        assert not sequence.is_finished
        sequence.finish("abort")
        assert lm.generation(sequence).text == "a😀b😀cdefgh"

    def test_prompts_that_are_not_prompts(self, lm: TriModeLM) -> None:
        """Prevents: the keys of a tokenizer's output decoded as texts, or bytes as token ids."""
        for prompt in ({"input_ids": [1]}, b"def", {1, 2}, None, 5):
            with pytest.raises(RequestError, match="prompt is a"):
                lm.generate(prompt)
        for name, value in {"stop": 5, "stop_token_ids": 5, "ignore_eos": "no"}.items():
            with pytest.raises(RequestError, match=f"{name} is"):
                lm.generate("a", **{name: value})

    def test_blocks_beyond_the_context(self, lm: TriModeLM) -> None:
        """Prevents: a block of a million masks fed for three tokens."""
        context = lm.model.config.max_position_embeddings
        with pytest.raises(RequestError, match=f"block_length is {context + 1}, beyond"):
            lm.generate("a", max_new_tokens=3, block_length=context + 1)

    @pytest.mark.parametrize("mode", MODES)
    def test_stop_strings_end_one_row_of_a_batch(self, ascii_lm: TriModeLM, mode: str) -> None:
        """Prevents: a stop string of one row ending or cutting another."""
        options = {"mode": mode, "max_new_tokens": 20, "temperature": 1.0, "seed": [4, 5]}
        whole = ascii_lm.generate(["a", "b"], **options)
        stop = whole[0].text[6:9]
        assert stop not in whole[1].text
        cut = ascii_lm.generate(["a", "b"], stop=[stop], **options)
        assert cut[0].text == whole[0].text[: whole[0].text.index(stop)]
        assert [g.finish_reason for g in cut] == ["stop", "length"]
        assert cut[1].token_ids == whole[1].token_ids

    def test_no_stop_may_be_none(self, ascii_lm: TriModeLM) -> None:
        """Prevents: a TypeError for what other libraries take as "no stop strings"."""
        plain = ascii_lm.generate("a", max_new_tokens=4)
        found = ascii_lm.generate("a", max_new_tokens=4, stop=None, stop_token_ids=None)
        assert found.token_ids == plain.token_ids

    @pytest.mark.parametrize("stop", [5, "", b"x", 0.5])
    def test_wrong_stop_is_shown_as_given(self, ascii_lm: TriModeLM, stop: object) -> None:
        """Prevents: `stop=""` shown as a tuple, and a string not named among what is allowed."""
        said = f"stop is {stop!r}; allowed: a non-empty string or a list of these"
        with pytest.raises(RequestError, match=said):
            ascii_lm.generate("a", stop=stop)

    @pytest.mark.parametrize("prompts", [["a", None], ["a", 5], [[1], None], [None, "a"], [3, "a"]])
    def test_wrong_prompt_of_several_is_named(
        self, ascii_lm: TriModeLM, prompts: list[object]
    ) -> None:
        """Prevents: `["a", None]` read as token ids, and "a" blamed."""
        place = next(i for i, prompt in enumerate(prompts) if not hasattr(prompt, "__len__"))
        said = f"prompt has {prompts[place]!r} at place {place} of a list of prompts"
        with pytest.raises(RequestError, match=said):
            ascii_lm.generate(prompts)

    def test_events_name_their_prompt(self, lm: TriModeLM) -> None:
        """Prevents: all events carrying the index of the last prompt."""
        emitted: dict[int, list[int]] = {0: [], 1: []}

        def note(index: int, event: object) -> None:
            if event.kind == "emit":
                emitted[index] += event.token_ids

        generations = lm.generate(["a", "bc"], max_new_tokens=12, on_event=note)
        assert [emitted[0], emitted[1]] == [g.token_ids for g in generations]


def test_load_refuses_devices_that_are_not_there(tiny_checkpoint: Callable[..., object]) -> None:
    """Prevents: torch's own errors, which do not say what is allowed."""
    folder = tiny_checkpoint()
    with pytest.raises(ConfigError, match="device is 'gpu'; allowed: cpu, cuda"):
        load(folder, device="gpu")
    with pytest.raises(ConfigError, match="device is 'meta'; allowed: cpu, cuda"):
        load(folder, device="meta")
    with pytest.raises(ConfigError, match="device is 'cuda:99'; this machine has"):
        load(folder, device="cuda:99")
    assert load(folder, device="cpu").model.device.type == "cpu"


def fragments(byte_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Tokens that are pieces of a few characters, so that random text is full of whole ones."""
    pieces = [b"\xf0\x9f", b"\x98\x80", b"\xf0", b"\xc3", b"\xa9", b"A", b"b "]
    names = ["".join(byte_tokenizer.convert_ids_to_tokens(list(piece))) for piece in pieces]
    vocab = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return with_specials(tokenizer)


def sentencepiece() -> PreTrainedTokenizerFast:
    """Decoding as in Llama 2: bytes are tokens, and a run of them is text as a whole or not."""
    names = ["<unk>", "<0x41>", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "<0x0A>", "\u2581A", "b"]
    vocab = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return with_specials(tokenizer)


def with_specials(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    specials = ["<|bos|>", "<|eos|>", "<|mask|>"]
    tokenizer.add_special_tokens(specials)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
