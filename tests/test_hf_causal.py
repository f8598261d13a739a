"""`AutoModelForCausalLM`: `generate` and `forward` as transformers has them.

Other libraries on top of it: `tests/test_hf_tools.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
    TextStreamer,
    set_seed,
)
from transformers.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StopStringCriteria,
)

import trimode
from tests.checkpoint.made_sources import make_source
from trimode import hf
from trimode.checkpoint.convert import convert
from trimode.errors import CheckpointError, RequestError, UnsupportedError
from trimode.hf import generation

SMALL = {"vocab_size": 12, "mask_token_id": 11, "eos_token_id": 10, "bos_token_id": 9}
"""A vocabulary so small that a random drafter is often right, and that rows meet EOS."""

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 1, 2], [3], [8, 8, 2, 5]]
MODES = ("ar", "linear", "branching", "quadratic")

Models = Callable[..., hf.TriModeForCausalLM]


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, hf.TriModeForCausalLM]:
    """A random Llama and what `trimode convert` made of it, both in float64."""
    folder = tmp_path_factory.mktemp("llama")
    source = make_source(folder / "source", "llama", head_dim=32)
    convert(source, folder / "target", mask_token="300", block_length=8)
    options = {"dtype": torch.float64}
    theirs = AutoModelForCausalLM.from_pretrained(source, **options).eval()
    return theirs, AutoModelForCausalLM.from_pretrained(folder / "target", **options).eval()


def padded(prompts: list[list[int]] = PROMPTS, *, pad: int = 0) -> dict[str, Tensor]:
    """input_ids and attention_mask [B, longest], padded left."""
    longest = max(map(len, prompts))
    rows = [[pad] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


def their_loop(model: hf.TriModeForCausalLM, input_ids: Tensor, **options: Any) -> Tensor:
    """transformers' own loop over our forward; the mask token is banned, as it always is here."""
    mask_token_id = model.config.mask_token_id
    options = {"suppress_tokens": [mask_token_id], "pad_token_id": 10} | options
    return GenerationMixin.generate(model, input_ids, **options)


# Opening and saving


@pytest.mark.parametrize("model_type", ["trimode", "nemotron_labs_diffusion"])
def test_the_auto_class_opens_and_saves(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, model_type: str
) -> None:
    """Prevents: a saved folder that names a class no other engine knows, or that does not open."""
    classes = (hf.TriModeForCausalLM, hf.NemotronLabsDiffusionForCausalLM)
    expected = next(c for c in classes if c.config_class.model_type == model_type)
    folder = tiny_checkpoint(config_class=expected.config_class)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is expected
    model.save_pretrained(tmp_path / "out")
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (
        content["architectures"]
        == json.loads((folder / "config.json").read_text())["architectures"]
    )
    again = trimode.load(tmp_path / "out", dtype="float32")
    ids = [1, 2, 3]
    text = again.generate(ids, max_new_tokens=6, seed=0).token_ids
    assert model.generate(torch.tensor([ids]), max_new_tokens=6)[0, 3:].tolist() == text
    assert all(torch.equal(t, again.model.state_dict()[n]) for n, t in model.state_dict().items())
    with pytest.raises(UnsupportedError, match="push_to_hub is True"):
        model.save_pretrained(tmp_path / "other", push_to_hub=True)


def test_a_damaged_folder_is_one_error(tiny_checkpoint: Callable[..., Path]) -> None:
    """Prevents: missing tensors filled with random numbers behind a warning."""
    folder = tiny_checkpoint()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match="9 missing tensors"):
        AutoModelForCausalLM.from_pretrained(folder)


# The text


def test_greedy_text_is_the_llamas(llamas: tuple[Any, hf.TriModeForCausalLM]) -> None:
    """Prevents: another text than the model that was converted writes, in any mode, padded too."""
    theirs, ours = llamas
    encoded = padded([[70, 71, 72], [90, 91, 92, 93, 94], [50]], pad=0)
    expected = theirs.generate(**encoded, max_new_tokens=24, do_sample=False, pad_token_id=0)
    for mode in MODES:
        assert ours.generate(**encoded, max_new_tokens=24, pad_token_id=0, mode=mode).equal(
            expected
        )


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")  # of their loop
def test_greedy_text_is_that_of_ar_generate_and_of_their_loop(
    causal_lm: Models, hf_model: Callable[..., Any]
) -> None:
    """Prevents: a default (length, EOS, padding) that differs from transformers'."""
    model, published = causal_lm(**SMALL), hf_model(**SMALL)
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        ours = model.generate(ids, max_new_tokens=16)
        assert ours.equal(published.ar_generate(ids, 16)[0])
        for use_cache in (True, False):
            loop = their_loop(model, ids, max_new_tokens=16, use_cache=use_cache)
            assert ours.equal(loop)
        assert model.generate(ids).equal(their_loop(model, ids))
        assert model.generate(ids, max_length=9).equal(their_loop(model, ids, max_length=9))
        assert model.generate(ids, repetition_penalty=1.7).equal(
            their_loop(model, ids, repetition_penalty=1.7)
        )


def test_a_least_length_is_kept_or_refused(causal_lm: Models) -> None:
    """Prevents: `min_new_tokens` taken and not kept."""
    model = causal_lm(**SMALL)
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        for options in ({"min_new_tokens": 12}, {"min_length": 15}):
            options = {"max_new_tokens": 16} | options
            if generation.HAS_MIN_TOKENS:
                assert model.generate(ids, **options).equal(their_loop(model, ids, **options))
            else:
                with pytest.raises(UnsupportedError, match="min_.* supported: 0"):
                    model.generate(ids, **options)


def test_batches_end_as_theirs(causal_lm: Models) -> None:
    """Prevents: pads attended to, or rows that end early filled with something else."""
    model = causal_lm(**SMALL)
    encoded = padded()
    ours = model.generate(**encoded, max_new_tokens=20, pad_token_id=0)
    rows = ours[:, 7:].tolist()
    assert len({row.index(10) if 10 in row else 20 for row in rows}) > 1
    expected = their_loop(model, **encoded, max_new_tokens=20, pad_token_id=0)
    assert ours.equal(expected)
    assert model.generate(encoded["input_ids"], max_new_tokens=20, pad_token_id=0).equal(ours)
    model.generation_config.pad_token_id = 0
    assert model.generate(**encoded, max_new_tokens=20).equal(ours)


def test_one_seed_one_text_in_every_mode(causal_lm: Models) -> None:
    """Prevents: `set_seed` not fixing the text, modes that differ, rows that share a seed."""
    model = causal_lm(**SMALL)
    encoded = padded([[1, 2, 3]] * 3)

    def draw(seed: int, mode: str, **options: Any) -> Tensor:
        set_seed(seed)
        return model.generate(**encoded, do_sample=True, max_new_tokens=16, mode=mode, **options)

    first = draw(0, "ar")
    assert not first.equal(draw(1, "ar"))
    assert len({tuple(row) for row in first.tolist()}) == 3
    for options in ({}, {"temperature": 0.7, "top_p": 0.8}, {"top_k": 3}):
        texts = [draw(0, mode, **options) for mode in MODES]
        assert all(text.equal(texts[0]) for text in texts)
    assert draw(0, "diffusion").equal(draw(0, "diffusion"))
    before = torch.get_rng_state()
    model.generate(**encoded, max_new_tokens=4)
    assert torch.get_rng_state().equal(before)


def test_sampling_has_their_law(causal_lm: Models) -> None:
    """Prevents: temperature, top-k or top-p, given or by default, that mean something else."""
    model = causal_lm(**SMALL, initializer_range=0.1)
    ids = torch.tensor([[1, 2, 3]])
    num, options = 1000, {"max_new_tokens": 1, "do_sample": True}
    for extra in ({}, {"temperature": 2.0, "top_k": 4}, {"top_p": 0.6}):
        set_seed(0)
        ours = model.generate(ids.expand(num, -1), **options, **extra)[:, -1]
        theirs = their_loop(model, ids.expand(num, -1), **options, **extra)[:, -1]
        counts = [torch.bincount(x, minlength=12) / num for x in (ours, theirs)]
        law = counts[1] * (1 - counts[1]) / num
        is_close = (counts[0] - counts[1]).abs() < 6 * law.sqrt() + 2 / num
        assert bool(is_close[:11].all())


def test_top_k_default_is_theirs(causal_lm: Models) -> None:
    """Prevents: a tail of unlikely tokens where transformers keeps the 50 likeliest."""
    model = causal_lm(torch.float32, initializer_range=0.02)
    ids = torch.tensor([[1, 2, 3]])
    likeliest = set(model(ids).logits[0, -1, :258].topk(50).indices.tolist())
    options = {"do_sample": True, "max_new_tokens": 1, "num_return_sequences": 64}
    assert set(model.generate(ids, **options)[:, -1].tolist()) <= likeliest
    for off in (0, None):
        assert not set(model.generate(ids, **options, top_k=off)[:, -1].tolist()) <= likeliest


def test_several_sequences_and_a_dict(causal_lm: Models) -> None:
    """Prevents: rows of one prompt that are not neighbours, or that are alike."""
    model = causal_lm(**SMALL)
    encoded = padded([[1, 2], [3, 4]])
    set_seed(1)
    out = model.generate(
        **encoded,
        max_new_tokens=8,
        do_sample=True,
        num_return_sequences=3,
        return_dict_in_generate=True,
    )
    assert out.sequences.shape[0] == 6
    assert out.sequences[:, :2].tolist() == [[1, 2]] * 3 + [[3, 4]] * 3
    assert len({tuple(row) for row in out.sequences.tolist()}) == 6
    assert out.scores is None


def test_a_prompt_is_bos_where_none_is_given(causal_lm: Models) -> None:
    """Prevents: an empty prompt of a pipeline that fails."""
    model = causal_lm(**SMALL)
    out = model.generate(max_new_tokens=3)
    assert out[0, 0] == 9
    assert out.equal(model.generate(torch.tensor([[9]]), max_new_tokens=3))


def test_weights_in_training_packed_or_of_no_gradient(causal_lm: Models) -> None:
    """Prevents: a text that depends on the state the weights happen to be in."""
    ids = torch.tensor([[1, 2, 3]])
    model = causal_lm(torch.float32, **SMALL)
    text = model.generate(ids, max_new_tokens=8)
    assert model.train().generate(ids, max_new_tokens=8).equal(text)
    assert model.training
    logits = model.eval()(ids).logits
    model.pack("native")
    assert model.generate(ids, max_new_tokens=8).equal(text)
    torch.testing.assert_close(model(ids).logits, logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(UnsupportedError, match="packed"):
        model(ids, use_cache=True)
    with pytest.raises(UnsupportedError, match="several texts"):
        model(ids, position_ids=torch.tensor([[0, 0, 1]]))


# Generation configs


def test_layers_of_settings(causal_lm: Models) -> None:
    """Prevents: a generation config, the model's or a given one, that is ignored."""
    model = causal_lm(**SMALL)
    ids = torch.tensor([[4, 5, 6, 7, 8, 1, 2]])
    free = {"eos_token_id": []}
    model.generation_config = GenerationConfig(max_new_tokens=5, eos_token_id=10, mode="ar")
    assert model.generate(ids, **free).shape == (1, 12)
    given = GenerationConfig(max_new_tokens=7)
    assert model.generate(ids, given, **free).shape == (1, 14)
    assert model.generate(ids, given, max_new_tokens=9, **free).shape == (1, 16)
    assert model.generate(ids, given, max_length=10, **free).shape == (1, 10)
    assert model.generate(ids, max_new_tokens=40).shape[1] < 47, "EOS of the model's config"
    assert model.generate(ids, max_new_tokens=40, eos_token_id=None).shape[1] == 47
    with pytest.raises(RequestError, match="mode 'ar' has no blocks"):
        model.generate(ids, block_length=4)
    assert model.generate(ids, block_length=4, mode="linear", **free).shape == (1, 12)
    with pytest.raises(RequestError, match="generation_config is a dict"):
        model.generate(ids, {"max_new_tokens": 3})


def test_the_models_own_config_is_read_from_its_folder(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    """Prevents: makers' sampling settings lost on the way in, or refused when they are neutral."""
    folder = tiny_checkpoint()
    settings = {"do_sample": True, "temperature": 0.5, "max_new_tokens": 4, "num_beams": 1}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[1, 2, 3]])
    set_seed(0)
    first = model.generate(ids)
    assert first.shape[1] <= 7
    set_seed(0)
    assert model.generate(ids, do_sample=True, temperature=0.5, max_new_tokens=4).equal(first)
    (folder / "generation_config.json").write_text(json.dumps(settings | {"typical_p": 0.9}))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(UnsupportedError, match=r"typical_p is 0\.9; supported: 1"):
        model.generate(ids)
    assert model.generate(ids, typical_p=1.0).shape[1] <= 7


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_beams": 4}, UnsupportedError, "num_beams is 4; supported: 1"),
        ({"penalty_alpha": 0.6, "top_k": 4}, UnsupportedError, "penalty_alpha is 0.6"),
        ({"no_repeat_ngram_size": 2}, UnsupportedError, "no_repeat_ngram_size is 2"),
        ({"bad_words_ids": [[3]]}, UnsupportedError, "bad_words_ids"),
        ({"prompt_lookup_num_tokens": 3}, UnsupportedError, "lookup=True"),
        ({"output_scores": True}, UnsupportedError, "output_scores is True"),
        ({"output_attentions": True}, UnsupportedError, "output_attentions is True"),
        ({"guidance_scale": 2.0}, UnsupportedError, "guidance_scale is 2.0"),
        ({"cache_implementation": "static"}, UnsupportedError, "cache_implementation"),
        ({"assistant_model": object()}, UnsupportedError, "assistant_model is a object"),
        ({"logits_processor": [print]}, UnsupportedError, "logits_processor is a list"),
        ({"prefix_allowed_tokens_fn": print}, UnsupportedError, "prefix_allowed_tokens_fn"),
        ({"past_key_values": object()}, UnsupportedError, "past_key_values is a object"),
        ({"custom_generate": "x/y"}, UnsupportedError, "custom_generate is x/y"),
        ({"token_type_ids": torch.tensor([[0, 1]])}, UnsupportedError, "token_type_ids"),
        ({"input_ids": torch.tensor([[1]])}, RequestError, "inputs and input_ids are both given"),
        ({"frobnicate": 1}, RequestError, "does not take frobnicate; .*block_length"),
        ({"seed": 1}, RequestError, "does not take seed"),
        ({"mode": "beam"}, RequestError, "mode is 'beam'"),
        ({"max_new_tokens": 0}, RequestError, "max_new_tokens is 0"),
        ({"max_new_tokens": 600}, RequestError, "context of 512"),
        ({"max_length": 2}, RequestError, "max_length is 2; .* 2 tokens of the prompt"),
        ({"do_sample": True, "temperature": 0.0}, RequestError, "do_sample=False is greedy"),
        ({"do_sample": "yes"}, RequestError, "do_sample is 'yes'"),
        ({"do_sample": True, "top_p": 1.5}, RequestError, "top_p is 1.5"),
        ({"num_return_sequences": 2}, RequestError, "num_return_sequences is 2; allowed: 1"),
        ({"stop_strings": "x"}, RequestError, "tokenizer is None"),
        ({"pad_token_id": 999}, RequestError, "pad_token_id is 999"),
        ({"eos_token_id": -1}, RequestError, "eos_token_id is -1"),
    ],
)
def test_refusals(
    causal_lm: Models, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    """Prevents: an argument that is not built, or impossible, ignored in silence."""
    with pytest.raises(error, match=message):
        causal_lm().generate(torch.tensor([[1, 2]]), **arguments)


def test_what_changes_nothing_is_taken(causal_lm: Models) -> None:
    """Prevents: a call that works with every other model refused for a harmless argument."""
    model = causal_lm(**SMALL)
    ids = torch.tensor([[1, 2]])
    expected = model.generate(ids, max_new_tokens=4)
    harmless = {
        "num_beams": 1,
        "use_cache": False,
        "early_stopping": True,
        "logits_processor": LogitsProcessorList(),
        "synced_gpus": False,
        "output_scores": False,
        "no_repeat_ngram_size": 0,
        "temperature": 0.7,
        "token_type_ids": torch.zeros_like(ids),
        "trust_remote_code": None,
    }
    assert model.generate(ids, max_new_tokens=4, **harmless).equal(expected)


# Streamers and stopping criteria


class Recorder:
    """A streamer that remembers what it got."""

    def __init__(self) -> None:
        self.got: list[list[Any]] = []
        self.is_ended = False

    def put(self, value: Tensor) -> None:
        self.got.append(value.tolist())

    def end(self) -> None:
        self.is_ended = True


@pytest.mark.parametrize("mode", ["ar", "linear", "diffusion"])
def test_streamers_get_columns(causal_lm: Models, mode: str) -> None:
    """Prevents: tokens in blocks, rows out of step, or a stream that differs from the result."""
    model, encoded, streamer = causal_lm(**SMALL), padded(), Recorder()
    options = {"max_new_tokens": 20, "pad_token_id": 6, "mode": mode, "block_length": 4}
    if mode == "ar":
        del options["block_length"]
    out = model.generate(**encoded, **options, streamer=streamer)
    assert streamer.is_ended
    assert streamer.got[0] == encoded["input_ids"].tolist()
    assert torch.tensor(streamer.got[1:]).T.equal(out[:, 7:])
    assert out.equal(model.generate(**encoded, **options))


def test_text_streamers(
    causal_lm: Models,
    byte_tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Prevents: text of a streamer that is not the text of the result."""
    model = causal_lm()
    encoded = byte_tokenizer("def f", return_tensors="pt")
    out = model.generate(**encoded, max_new_tokens=12)
    text = byte_tokenizer.decode(out[0, 5:])
    model.generate(**encoded, max_new_tokens=12, streamer=TextStreamer(byte_tokenizer, True))
    assert capsys.readouterr().out == text + "\n"
    streamer = TextIteratorStreamer(byte_tokenizer, timeout=60)
    arguments = {**encoded, "max_new_tokens": 12, "streamer": streamer}
    thread = Thread(target=model.generate, kwargs=arguments)
    thread.start()
    assert "".join(streamer) == "def f" + text
    thread.join()


class Sum(StoppingCriteria):
    """Ends a row whose new tokens sum up to enough; it remembers what it saw."""

    def __init__(self, num_prompt: int, enough: int) -> None:
        self.num_prompt, self.enough = num_prompt, enough
        self.seen: list[list[list[int]]] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        assert scores is None
        self.seen.append(input_ids.tolist())
        return input_ids[:, self.num_prompt :].sum(-1) >= self.enough


@pytest.mark.parametrize("mode", MODES)
def test_criteria_cut_where_theirs_do(causal_lm: Models, mode: str) -> None:
    """Prevents: a text that runs on to the end of a round, or criteria that see other ids."""
    model, encoded = causal_lm(**SMALL), padded()
    options = {"max_new_tokens": 24, "pad_token_id": 6, "eos_token_id": 10}
    for enough in (1, 20, 60, 1000):
        ours, theirs = Sum(7, enough), Sum(7, enough)
        out = model.generate(**encoded, **options, mode=mode, stopping_criteria=[ours])
        expected = their_loop(model, **encoded, **options, stopping_criteria=[theirs])
        assert out.equal(expected)
        assert ours.seen == theirs.seen


def num_fed(model: hf.TriModeForCausalLM, ids: Tensor, **options: Any) -> int:
    """Tokens that one call of `generate` feeds to the network."""
    counts: list[int] = []
    embed = model.encoder.embed_tokens
    handle = embed.register_forward_hook(lambda _, inputs, __: counts.append(inputs[0].numel()))
    model.generate(ids, **options)
    handle.remove()
    return sum(counts)


def test_a_row_that_a_criterion_ended_is_not_fed_on(causal_lm: Models) -> None:
    """Prevents: work for rows whose text has ended."""

    class First(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            return torch.tensor([True, False])

    model, ids = causal_lm(), torch.tensor([[1, 2, 3], [3, 2, 1]])
    options = {"max_new_tokens": 20, "eos_token_id": [], "mode": "ar"}
    assert num_fed(model, ids, **options) == 2 * (3 + 19)
    assert num_fed(model, ids, **options, stopping_criteria=[First()]) <= 3 + 3 + 19 + 1


def test_the_drafter_drafts(causal_lm: Models) -> None:
    """Prevents: an adapter that is attached and never used."""
    model, ids = causal_lm(**SMALL), torch.tensor([[4, 5, 6, 7, 8, 1, 2]])
    options = {"max_new_tokens": 24, "eos_token_id": [], "block_length": 4}
    text, fed = model.generate(ids, **options), num_fed(model, ids, **options)
    hf.load_drafter(model, None)
    assert model.generate(ids, **options).equal(text)
    assert num_fed(model, ids, **options) != fed


def test_their_criteria(causal_lm: Models, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    """Prevents: transformers' own criteria, or the fields they stand for, doing something else."""
    model = causal_lm()
    encoded = byte_tokenizer("def f", return_tensors="pt")
    free = model.generate(**encoded, max_new_tokens=24)[0, 5:].tolist()
    stop = byte_tokenizer.decode(free[9:11])
    end = next(i for i in range(24) if stop in byte_tokenizer.decode(free[: i + 1])) + 1

    def num_new(*criteria: StoppingCriteria, **options: Any) -> int:
        options = {"max_new_tokens": 24} | options
        out = model.generate(**encoded, **options, stopping_criteria=list(criteria))
        assert out[0, 5:].tolist() == free[: out.shape[1] - 5]
        return out.shape[1] - 5

    assert num_new() == 24
    assert num_new(stop_strings=stop, tokenizer=byte_tokenizer) == end
    assert num_new(StopStringCriteria(byte_tokenizer, [stop])) == end
    assert num_new(MaxLengthCriteria(max_length=11)) == 6
    assert num_new(MaxLengthCriteria(max_length=17), max_new_tokens=None) == 12
    eos = free[4]
    assert num_new(EosTokenCriteria(eos)) == free.index(eos) + 1
    assert num_new(eos_token_id=eos) == free.index(eos) + 1
    assert num_new(MaxTimeCriteria(max_time=-1.0)) == 1
    assert num_new(max_time=3600.0) == 24


# forward


def test_logits_and_loss_are_the_llamas(llamas: tuple[Any, hf.TriModeForCausalLM]) -> None:
    """Prevents: labels that are not shifted, or a mean over other tokens than transformers'."""
    theirs, ours = llamas
    ids = torch.randint(0, 256, (3, 17), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :6] = labels[2, 12:] = -100
    mask = torch.ones_like(ids)
    mask[2, 12:] = 0
    for extra in ({}, {"num_items_in_batch": 20}, {"num_items_in_batch": torch.tensor(31)}):
        a, b = (m(ids, attention_mask=mask, labels=labels, **extra) for m in (theirs, ours))
        assert b.loss.item() > 1
        torch.testing.assert_close(a.loss, b.loss, rtol=1e-6, atol=1e-6)
        where = mask.bool()
        # Llama rotates and norms in float32, whatever the dtype.
        torch.testing.assert_close(a.logits[where], b.logits[where], rtol=1e-5, atol=1e-5)
    a, b = (m(ids, attention_mask=mask, labels=labels) for m in (theirs, ours))
    a.loss.backward()
    b.loss.backward()
    pairs = [
        (theirs.model.embed_tokens, ours.encoder.embed_tokens),
        (theirs.model.layers[0].self_attn.k_proj, ours.encoder.layers[0].self_attn.k_proj),
        (theirs.lm_head, ours.diffusion_head),
    ]
    for one, other in pairs:
        torch.testing.assert_close(one.weight.grad, other.weight.grad, rtol=1e-4, atol=1e-6)
    theirs.zero_grad()
    ours.zero_grad()
    assert ours(ids).loss is None
    assert ours(ids, logits_to_keep=2).logits.equal(ours(ids).logits[:, -2:])


def test_a_cache_changes_no_logits(causal_lm: Models) -> None:
    """Prevents: positions or masks that forget what is cached, padding included."""
    model, encoded = causal_lm(), padded()
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    whole = model(**encoded).logits
    first = model(ids[:, :4], attention_mask=mask[:, :4], use_cache=True)
    second = model(ids[:, 4:], attention_mask=mask, past_key_values=first.past_key_values)
    logits = torch.cat((first.logits, second.logits), dim=1)
    torch.testing.assert_close(logits[mask.bool()], whole[mask.bool()], rtol=1e-9, atol=1e-9)
    assert second.past_key_values.get_seq_length() == 7
    assert model(ids).past_key_values is None
    unmasked = model(ids[:, :3], use_cache=True)
    rest = model(ids[:, 3:], past_key_values=unmasked.past_key_values).logits
    torch.testing.assert_close(rest, model(ids).logits[:, 3:], rtol=1e-9, atol=1e-9)
    with pytest.raises(UnsupportedError, match="cached tokens included"):
        model(ids[:, 4:], attention_mask=mask[:, 4:], past_key_values=unmasked.past_key_values)


def test_padding_shifts_no_positions(causal_lm: Models) -> None:
    """Prevents: left padding that counts as text, where YaRN and the query scale would notice."""
    model, encoded = causal_lm(), padded()
    logits = model(**encoded).logits
    for prompt, row in zip(PROMPTS, logits, strict=True):
        alone = model(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(row[-len(prompt) :], alone, rtol=1e-9, atol=1e-9)


def test_packed_texts_do_not_see_each_other(causal_lm: Models) -> None:
    """Prevents: texts that a padding-free collator put into one row leaking into each other."""
    model = causal_lm()
    row = torch.tensor([sum(PROMPTS, [])])
    positions = torch.tensor([[t for prompt in PROMPTS for t in range(len(prompt))]])
    logits = model(row, position_ids=positions).logits[0].split([len(p) for p in PROMPTS])
    for prompt, got in zip(PROMPTS, logits, strict=True):
        alone = model(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(got, alone, rtol=1e-9, atol=1e-9)


def switch(model: Any, verb: str) -> None:
    """Checkpointing, by the name that this transformers has for it."""
    name = f"activation_checkpointing_{verb}"
    getattr(model, name if hasattr(model, name) else f"gradient_checkpointing_{verb}")()


def test_gradient_checkpointing_changes_no_gradient(causal_lm: Models) -> None:
    """Prevents: checkpointing that is switched on and recomputes nothing, or something else."""
    model = causal_lm().train()
    model.requires_grad_(True)
    ids = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))
    weight, calls, grads = model.encoder.layers[0].mlp.up_proj.weight, [0], []
    model.encoder.layers[0].register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    for is_on in (False, True):
        if is_on:
            switch(model, "enable")
            assert model.gradient_checkpointing
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        grads.append(weight.grad.clone())
    assert calls == [3]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)
    switch(model, "disable")
    assert not model.gradient_checkpointing


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs_embeds": torch.zeros(1, 2, 64)}, "inputs_embeds"),
        ({"output_attentions": True}, "forward does not take output_attentions"),
        ({"pattern": "bidirectional"}, "forward does not take pattern"),
        ({"attention_mask": torch.ones(1, 1, 2, 2)}, r"attention_mask is \(1, 1, 2, 2\)"),
    ],
)
def test_forward_refuses(causal_lm: Models, arguments: dict[str, Any], message: str) -> None:
    """Prevents: an output or an input that was asked for and is silently not there."""
    with pytest.raises((RequestError, UnsupportedError), match=message):
        causal_lm()(torch.tensor([[1, 2]]), **arguments)


def test_prompts_have_two_names(hf_model: Callable[..., Any]) -> None:
    """Prevents: `**tokenizer(...)` refused by the published methods, or one prompt lost of two."""
    model, ids = hf_model(**SMALL), torch.tensor([[1, 2, 3]])
    for name in ("ar_generate", "generate", "linear_spec_generate"):
        method = getattr(model, name)
        assert method(input_ids=ids, max_new_tokens=4)[0].equal(method(ids, 4)[0])
        with pytest.raises(RequestError, match="prompt_ids and input_ids are both given"):
            method(ids, 4, input_ids=ids)
        with pytest.raises(RequestError, match="prompt_ids is None"):
            method(max_new_tokens=4)
