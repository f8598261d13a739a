"""Log-probabilities of a prompt's tokens, from Python: `generate(..., prompt_logprobs=K)`."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.checkpoint.made_sources import make_source
from tests.conftest import BOS, EOS, MASK
from trimode import hf  # registers with transformers
from trimode.checkpoint.convert import convert
from trimode.decoding import GenerationParams, Sequence
from trimode.decoding.params import MODE_NAMES
from trimode.engine import Engine
from trimode.engine.runner import SCORED_ROWS
from trimode.errors import RequestError
from trimode.loading import load
from trimode.model import TriModeModel
from trimode.model.native import library
from trimode.runtime import TriModeLM


@pytest.fixture(scope="module")
def lm(
    tiny_model: Callable[..., TriModeModel], byte_tokenizer: Any, random_adapter: Any
) -> TriModeLM:
    """Float64, with a drafter that disagrees."""
    model = tiny_model()
    return TriModeLM(model, byte_tokenizer, adapter=random_adapter(model))


@pytest.fixture(scope="module")
def native_lm(
    tiny_model: Callable[..., TriModeModel], byte_tokenizer: Any, random_adapter: Any
) -> TriModeLM:
    """Float32, packed for the native step."""
    if library.status().library is None:
        pytest.skip("there is no native step here")
    model = tiny_model(torch.float32)
    adapter = random_adapter(model)
    return TriModeLM(model.pack("native"), byte_tokenizer, adapter=adapter)


def some_ids(num_tokens: int, *, seed: int = 0) -> list[int]:
    """A prompt of random bytes behind BOS."""
    draw = random.Random(seed)
    return [BOS, *(draw.randrange(256) for _ in range(num_tokens - 1))]


def law_of(model: TriModeModel, ids: list[int]) -> torch.Tensor:
    """[T, V] float64: what a dense causal forward without a cache says, after the ban."""
    tokens = torch.tensor([ids])
    logits = model(tokens).logits[0].double()
    logits[:, list(model.config.banned_token_ids)] = -torch.inf
    return logits.log_softmax(dim=-1)


def sequence(lm: TriModeLM, ids: list[int], *, number: int, num_new: int = 3) -> Sequence:
    """In mode `ar`."""
    return lm.prepare(ids, mode="ar", max_new_tokens=num_new, prompt_logprobs=number, seed=0)


@pytest.mark.parametrize("mode", [mode for mode in MODE_NAMES if mode != "auto"])
def test_they_are_the_causal_models(lm: TriModeLM, mode: str) -> None:
    """Prevents: scores of the place before or behind, of the drafter's view, or of a mode's own."""
    ids = some_ids(40)
    options = {"mode": mode, "max_new_tokens": 4, "temperature": 0.8, "seed": 3}
    found = lm.generate(ids, prompt_logprobs=5, **options)
    plain = lm.generate(ids, **options)
    assert found.token_ids == plain.token_ids
    assert plain.prompt_logprobs is None
    assert found.prompt_logprobs is not None
    first, *others = found.prompt_logprobs
    assert first is None
    assert len(others) == len(ids) - 1
    law = law_of(lm.model, ids)
    for place, (token_id, one) in enumerate(zip(ids[1:], others, strict=True)):
        assert one.logprob == pytest.approx(float(law[place, token_id]), abs=1e-9)
        best = law[place].topk(5)
        assert [i for i, _ in one.top] == best.indices.tolist()
        assert [x for _, x in one.top] == pytest.approx(best.values.tolist(), abs=1e-9)


def test_they_are_transformers(tmp_path: Path) -> None:
    """Prevents: scores of a converted model that are not the source model's."""
    source = make_source(tmp_path / "source", "llama", head_dim=32, dtype=torch.float64)
    convert(source, tmp_path / "target", mask_token="300", block_length=8)
    ours = load(tmp_path / "target", dtype="float64")
    ids = [7 * i % 299 for i in range(1, 60)]
    found = ours.generate(ids, max_new_tokens=0, prompt_logprobs=0).prompt_logprobs
    # The source's own code makes norms and angles in float32, whatever the model is.
    for folder, tolerance in ((tmp_path / "target", 1e-9), (source, 1e-5)):
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        with torch.no_grad():
            logits = theirs(torch.tensor([ids])).logits[0]
        assert isinstance(theirs, hf.TriModeForCausalLM) == (folder != source)
        logits[:, list(ours.model.config.banned_token_ids)] = -torch.inf
        law = logits.log_softmax(dim=-1)
        wanted = [float(law[place, token_id]) for place, token_id in enumerate(ids[1:])]
        assert [one.logprob for one in found[1:]] == pytest.approx(wanted, abs=tolerance)


def test_nothing_may_be_asked_for_behind_them(lm: TriModeLM) -> None:
    """Prevents: a token nobody asked for, or a prompt of one token that hangs."""
    for ids in ([BOS], some_ids(20)):
        found = lm.generate(ids, mode="linear", max_new_tokens=0, prompt_logprobs=0)
        assert (found.token_ids, found.text, found.finish_reason) == ([], "", "length")
        assert found.prompt_logprobs is not None
        assert [one is None for one in found.prompt_logprobs] == [True, *[False] * (len(ids) - 1)]
        assert all(one.top == () for one in found.prompt_logprobs if one is not None)


def test_a_token_that_is_never_chosen_is_impossible(lm: TriModeLM) -> None:
    """Prevents: a mask token in a prompt that is scored as if it could be written."""
    found = lm.generate([BOS, 65, 66], max_new_tokens=0, prompt_logprobs=0)
    assert found.prompt_logprobs is not None
    masked = Sequence(
        [BOS, MASK, 66],
        GenerationParams(
            mode="ar", max_new_tokens=0, block_length=8, seed=0, prompt_logprobs=NUM_ALL
        ),
        eos_token_ids=[EOS],
        mask_token_id=MASK,
        form=lm.form,
    )
    lm.engine([masked]).run()
    assert masked.scores is not None
    one = masked.scores.found[1]
    assert one is not None
    assert one.logprob == float("-inf")
    assert MASK not in [i for i, _ in one.top]


NUM_ALL = 258
"""All tokens but the mask token."""


def test_a_tokens_number_is_its_entrys(lm: TriModeLM, native_lm: TriModeLM) -> None:
    """Prevents: a reader who compares the two and finds that the likeliest token is not."""
    for one_lm in (lm, native_lm):
        found = one_lm.generate(some_ids(60), max_new_tokens=1, prompt_logprobs=NUM_ALL, logprobs=3)
        assert found.prompt_logprobs is not None
        for token_id, one in zip(found.prompt_ids[1:], found.prompt_logprobs[1:], strict=True):
            assert one is not None
            assert dict(one.top)[token_id] == one.logprob


def test_they_do_not_depend_on_chunks_nor_on_company(native_lm: TriModeLM) -> None:
    """Prevents: scores that change with the budget of a forward or with who else is in it."""
    prompts = [some_ids(SCORED_ROWS + 50, seed=1), some_ids(33, seed=2), some_ids(90, seed=3)]
    expected = []
    for ids in prompts:
        alone = native_lm.generate(ids, mode="ar", max_new_tokens=3, prompt_logprobs=4)
        expected.append(alone.prompt_logprobs)
    law = law_of(native_lm.model, prompts[0])
    assert expected[0] is not None
    for place, one in enumerate(expected[0][1:]):
        assert one is not None
        assert one.logprob == pytest.approx(float(law[place, prompts[0][place + 1]]), abs=1e-4)
    for budget in (None, 64, 12):
        engine = Engine(
            native_lm.model,
            num_rows=3,
            num_cells=256,
            adapter=native_lm.adapter,
            token_budget=budget,
        )
        seqs = [sequence(native_lm, ids, number=4) for ids in prompts]
        others = [native_lm.prepare(ids, mode="linear", max_new_tokens=9) for ids in prompts]
        for pair in zip(seqs, others, strict=True):
            for seq in pair:
                engine.submit(seq)
        engine.run()
        for seq, scores in zip(seqs, expected, strict=True):
            assert seq.scores is not None
            assert seq.scores.found == scores


def test_a_prefix_that_is_there_is_not_used(lm: TriModeLM) -> None:
    """Prevents: scores that are missing, since their tokens' K/V lay in a row already; and prompts
    that are fed again though nothing asks for their scores."""
    ids = some_ids(50)
    engine = Engine(lm.model, num_rows=1, num_cells=128, adapter=lm.adapter)
    found = []
    for number in (2, 2, None):
        seq = lm.prepare(ids, mode="ar", max_new_tokens=2, prompt_logprobs=number, seed=0)
        engine.submit(seq)
        engine.run()
        found.append(seq)
    assert [seq.stats.reused_tokens for seq in found] == [0, 0, len(ids) - 1]
    assert found[0].scores is not None
    assert found[1].scores is not None
    assert found[0].scores.found == found[1].scores.found
    assert len(found[0].scores.found) == len(ids)


def test_one_that_gives_its_row_away_has_each_score_once(lm: TriModeLM) -> None:
    """Prevents: scores asked for again, and so twice as many, when a text goes on."""
    prompts = [some_ids(40, seed=1), some_ids(40, seed=2)]
    engine = Engine(
        lm.model, num_rows=1, num_cells=128, adapter=lm.adapter, time_slice=2, token_budget=16
    )
    seqs = [sequence(lm, ids, number=1, num_new=12) for ids in prompts]
    for seq in seqs:
        engine.submit(seq)
    engine.run()
    assert sum(seq.stats.num_preemptions for seq in seqs) > 2
    for ids, seq in zip(prompts, seqs, strict=True):
        alone = lm.generate(ids, mode="ar", max_new_tokens=12, prompt_logprobs=1)
        assert seq.new_ids == alone.token_ids
        assert seq.scores is not None
        assert alone.prompt_logprobs is not None
        for mine, its in zip(seq.scores.found[1:], alone.prompt_logprobs[1:], strict=True):
            assert mine is not None
            assert its is not None
            assert mine.logprob == pytest.approx(its.logprob, abs=1e-9)


def test_the_head_never_has_a_long_prompt_at_once(
    lm: TriModeLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents: logits of a whole prompt in memory, which for a large vocabulary are gigabytes."""
    num_rows: list[int] = []
    lm.model.diffusion_head.register_forward_hook(
        lambda module, args, output: num_rows.append(len(args[0]))
    )
    try:
        found = lm.generate(some_ids(3 * SCORED_ROWS + 9), max_new_tokens=0, prompt_logprobs=1)
    finally:
        lm.model.diffusion_head._forward_hooks.clear()
    assert found.prompt_logprobs is not None
    assert len(found.prompt_logprobs) == 3 * SCORED_ROWS + 9
    assert sum(num_rows) == 3 * SCORED_ROWS + 9
    assert max(num_rows) == SCORED_ROWS


def test_healing_is_off(lm: TriModeLM, piece_tokenizer: Any, tiny_model: Any) -> None:
    """Prevents: a prompt whose end was taken back, so that its last tokens are not scored."""
    model = tiny_model(vocab_size=len(piece_tokenizer), mask_token_id=len(piece_tokenizer) - 1)
    pieces = TriModeLM(model, piece_tokenizer)
    healed = pieces.generate("the c", max_new_tokens=2)
    assert healed.healed_bytes
    found = pieces.generate("the c", max_new_tokens=2, prompt_logprobs=0)
    assert not found.healed_bytes
    assert found.prompt_ids == piece_tokenizer("the c")["input_ids"]
    assert found.prompt_logprobs is not None
    assert len(found.prompt_logprobs) == len(found.prompt_ids)


def test_refusals(lm: TriModeLM) -> None:
    """Prevents: a contradiction that is settled in silence."""
    for options, line in (
        ({"heal": True, "prompt_logprobs": 0}, "heal is True; allowed with prompt_logprobs: False"),
        ({"prompt_logprobs": -1}, "prompt_logprobs is -1; allowed: None, or an integer of at"),
        ({"prompt_logprobs": True}, "prompt_logprobs is True; allowed: None, or an integer of at"),
        ({"prompt_logprobs": 259}, "prompt_logprobs is 259; allowed: 0 to 258, the tokens that"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; allowed: an integer of at least 1, or 0 wi"),
        ({"max_new_tokens": -1, "prompt_logprobs": 1}, "max_new_tokens is -1; allowed: an integ"),
        ({"heal": 1}, "heal is 1; allowed: True or False"),
    ):
        with pytest.raises(RequestError, match=line):
            lm.generate("x", **options)
