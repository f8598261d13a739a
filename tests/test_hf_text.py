"""What the published methods write and count: against slow loops, in batches, padded, seeded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference import greedy_ar, greedy_diffusion, greedy_linear
from trimode import hf

METHODS = ("ar_generate", "generate", "linear_spec_generate")

SMALL = {"vocab_size": 12, "mask_token_id": 11, "eos_token_id": 10, "bos_token_id": 9}
"""A vocabulary so small that a random drafter is often right, and that rows meet EOS."""

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 1, 2], [3], [8, 8, 2, 5]]

Models = Callable[..., hf.TriModeModel]


def padded(prompts: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
    """ids and attention_mask [B, longest], padded with 0."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for b, prompt in enumerate(prompts):
        where = slice(longest - len(prompt), None) if side == "left" else slice(len(prompt))
        ids[b, where] = torch.tensor(prompt)
        mask[b, where] = 1
    return ids, mask


def new_tokens(ids: Tensor, width: int, *, eos: int) -> list[list[int]]:
    """New tokens of each row, up to and with its first EOS; what follows must be padding."""
    rows = []
    for row in ids[:, width:].tolist():
        end = row.index(eos) + 1 if eos in row else len(row)
        assert row[end:] == [eos] * (len(row) - end)
        rows.append(row[:end])
    return rows


# Text and counts


@pytest.mark.parametrize("max_new_tokens", [1, 8, 12])
def test_ar_text_and_count(hf_model: Models, max_new_tokens: int) -> None:
    """nfe counting the prefill, or text that differs from a loop without a cache."""
    model = hf_model()
    for prompt in PROMPTS:
        want = greedy_ar(model, prompt, max_new_tokens=max_new_tokens, stops=(257,))
        ids, nfe = model.ar_generate(torch.tensor([prompt]), max_new_tokens)
        assert ids.tolist() == [prompt + want.new_ids]
        assert nfe == want.nfe


@pytest.mark.parametrize(
    ("threshold", "steps"), [(0.9, None), (0.3, None), (None, None), (None, 3), (0.3, 2)]
)
def test_diffusion_text_and_count(
    hf_model: Models, threshold: float | None, steps: int | None
) -> None:
    """nfe without the last block's commit, or a reveal policy other than the published one."""
    model = hf_model()
    for prompt in PROMPTS:
        want = greedy_diffusion(
            model,
            prompt,
            max_new_tokens=16,
            block_length=8,
            threshold=threshold,
            steps=8 if threshold is None and steps is None else steps,
            stops=(257,),
        )
        ids, nfe = model.generate(
            torch.tensor([prompt]), 16, block_length=8, threshold=threshold, steps=steps
        )
        assert ids.tolist() == [prompt + want.new_ids]
        assert nfe == want.nfe


def test_diffusion_count_by_hand(hf_model: Models) -> None:
    """`steps` not turning the default threshold off, or `threshold=None` leaving it on.

    A network this sure of itself passes any threshold at once, so only the schedule makes passes.
    """
    model, prompt = hf_model(initializer_range=30.0), torch.tensor([[1, 2, 3]])
    never = {"eos_token_id": 255}
    assert model.generate(prompt, 16, 8, steps=2, **never)[1] == 2 * (2 + 1)
    assert model.generate(prompt, 16, 8, steps=1, **never)[1] == 2 * (1 + 1)
    assert model.generate(prompt, 16, 8, threshold=None, **never)[1] == 2 * (7 + 1)
    assert model.generate(prompt, 16, 8, threshold=0.0, **never)[1] == 2 * (1 + 1)
    assert model.generate(prompt, 16, 8, **never)[1] == 2 * (1 + 1)
    assert model.generate(prompt, 16, 8, threshold=0.9, steps=2, **never)[1] == 2 * (1 + 1)
    # 20 = 8 + 8 + 4: the last block is denoised whole, then cut.
    assert model.generate(prompt, 20, 8, steps=2, **never)[1] == 3 * (2 + 1)
    # 17 = 8 + 8 + 1: the token that begins the third block is the last, so only its commit counts.
    assert model.generate(prompt, 17, 8, steps=2, **never)[1] == 2 * (2 + 1) + 1
    assert model.generate(prompt, 1, 8, steps=2, **never)[1] == 1


@pytest.mark.parametrize("max_new_tokens", [1, 2, 9, 16, 40])
def test_linear_text_and_count(hf_model: Models, max_new_tokens: int) -> None:
    """nfe without the prefill, or without the draft that the engine skips before the last token."""
    model = hf_model(**SMALL)
    for prompt in PROMPTS:
        want = greedy_linear(
            model,
            prompt,
            max_new_tokens=max_new_tokens,
            block_length=4,
            adapter=model.drafter,
            stops=(10,),
        )
        ids, nfe = model.linear_spec_generate(torch.tensor([prompt]), max_new_tokens, 4)
        assert ids.tolist() == [prompt + want.new_ids]
        assert nfe == want.nfe
        assert ids.equal(model.ar_generate(torch.tensor([prompt]), max_new_tokens)[0])


def test_linear_count_by_hand(hf_model: Models) -> None:
    """A draft that nobody makes counted where EOS ends the text early."""
    model, prompt = hf_model(), torch.tensor([[1, 2, 3]])
    free = model.ar_generate(prompt, 8, eos_token_id=[])[0][0, 3:].tolist()
    assert len(set(free[:5])) == 5
    # This drafter is never right, so a round emits one token: the prefill, then two forwards each.
    assert model.linear_spec_generate(prompt, 8, 4, eos_token_id=[])[1] == 1 + 2 * 7
    assert model.linear_spec_generate(prompt, 8, 4, eos_token_id=free[4])[1] == 1 + 2 * 4
    assert model.linear_spec_generate(prompt, 8, 4, eos_token_id=free[0])[1] == 1
    assert model.linear_spec_generate(prompt, 1, 4)[1] == 1


def test_linear_count_with_a_threshold(hf_model: Models) -> None:
    """Drafts of several passes counted as one."""
    model, prompt = hf_model(), torch.tensor([[1, 2, 3]])
    once = model.linear_spec_generate(prompt, 8, 4, eos_token_id=255)[1]
    often = model.linear_spec_generate(prompt, 8, 4, eos_token_id=255, threshold=1.0)[1]
    assert often > once


def test_block_length_defaults_to_the_config(hf_model: Models) -> None:
    """A block of 32 for a model that was trained with another."""
    model, prompt = hf_model(block_size=5), torch.tensor([[1, 2, 3]])
    one_pass = {"threshold": 0.0, "eos_token_id": 255}
    assert model.generate(prompt, 10, **one_pass)[1] == 2 * (1 + 1)
    assert model.generate(prompt, 10, 2, **one_pass)[1] == 5 * (1 + 1)


# Batches, padding, seeds, state


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", METHODS)
def test_padding_and_batch_do_not_change_results(
    hf_model: Models, name: str, temperature: float
) -> None:
    """Pads attended to, positions counted over pads, or rows of a batch coupled."""
    model = hf_model(**SMALL)
    decode = getattr(model, name)
    results = []
    for side in ("left", "right"):
        ids, attention_mask = padded(PROMPTS, side)
        torch.manual_seed(3)
        out, nfe = decode(ids, 24, temperature=temperature, attention_mask=attention_mask)
        assert out[:, : ids.shape[1]].equal(ids)
        results.append((new_tokens(out, ids.shape[1], eos=10), nfe))
    assert results[0] == results[1]
    rows, nfe = results[0]
    assert len({len(row) for row in rows}) > 1, "rows should end at different times"
    assert model.config.mask_token_id not in sum(rows, [])
    if temperature == 0.0:
        alone = [decode(torch.tensor([prompt]), 24) for prompt in PROMPTS]
        assert rows == [
            new_tokens(out, len(prompt), eos=10)[0]
            for (out, _), prompt in zip(alone, PROMPTS, strict=True)
        ]
        assert nfe == max(count for _, count in alone)


def test_seeds_come_from_torch(hf_model: Models) -> None:
    """Rows sharing a seed, `torch.manual_seed` not reproducing a call, greedy that draws."""
    model = hf_model()
    prompt = torch.tensor([[1, 2, 3]] * 3)

    def draw(seed: int, name: str) -> list[list[int]]:
        torch.manual_seed(seed)
        return getattr(model, name)(prompt, 12, temperature=1.5)[0].tolist()

    for name in METHODS:
        assert draw(0, name) == draw(0, name)
        assert draw(0, name) != draw(1, name)
        rows = draw(0, name)
        assert rows[0] != rows[1] != rows[2]
    assert draw(5, "ar_generate") == draw(5, "linear_spec_generate")
    before = torch.get_rng_state()
    model.generate(prompt, 4)
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("name", METHODS)
def test_calls_leave_no_state_behind(hf_model: Models, name: str) -> None:
    """A cache, a mode flag or evaluation mode left on the model, so that the next call differs."""
    model = hf_model().train()

    def attributes() -> dict[str, Any]:
        return {
            f"{where}.{key}": value
            for where, module in model.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, (bool, int, float, str, type(None)))
        }

    weights, plain = copy.deepcopy(model.state_dict()), attributes()
    prompt = torch.tensor([[1, 2, 3], [9, 8, 7]])
    first, count = getattr(model, name)(prompt, 10)
    for other in METHODS:
        getattr(model, other)(prompt + 1, 5, temperature=1.0)
    again, count_again = getattr(model, name)(prompt, 10)
    assert first.equal(again)
    assert count == count_again
    assert all(torch.equal(weights[n], t) for n, t in model.state_dict().items())
    assert weights.keys() == model.state_dict().keys()
    assert attributes() == plain


def test_eos_given_replaces_the_configs(hf_model: Models) -> None:
    """`eos_token_id` added to the config's instead of replacing it, or only its first id used."""
    model = hf_model(**SMALL)
    prompt = torch.tensor([[4, 5, 6, 7, 8, 1, 2]])
    free = model.ar_generate(prompt, 24, eos_token_id=[])[0][0, 7:].tolist()
    assert len(free) == 24
    assert 10 in free, "the config's EOS should come up by itself"
    other = next(i for i in free[3:] if i != 10)
    for eos in (other, [other, 8]):
        wanted = {other} if isinstance(eos, int) else set(eos)
        end = next(i for i, token_id in enumerate(free) if token_id in wanted)
        for name in ("ar_generate", "linear_spec_generate"):
            ids, _ = getattr(model, name)(prompt, 24, eos_token_id=eos)
            assert ids[0, 7:].tolist() == free[: end + 1]


def test_pad_token_of_the_config_fills_short_rows(hf_model: Models) -> None:
    """Short rows padded with EOS although the config names a pad token; or with the mask token."""
    ids, attention_mask = padded(PROMPTS, "left")
    for pad, expected in ((0, 0), (11, 10), (None, 10)):
        model = hf_model(**SMALL, pad_token_id=pad)
        out, _ = model.ar_generate(ids, 24, attention_mask=attention_mask)
        lengths = [row.index(10) for row in out[:, 7:].tolist() if 10 in row]
        assert min(lengths) + 1 < out.shape[1] - 7
        shortest = next(row for row in out[:, 7:].tolist() if row.index(10) == min(lengths))
        assert set(shortest[min(lengths) + 1 :]) == {expected}


def test_mask_token_in_a_prompt_is_text(hf_model: Models) -> None:
    """A prompt that holds the mask id treated as something to fill in."""
    model = hf_model(**SMALL)
    prompt = torch.tensor([[1, 11, 3]])
    for name in METHODS:
        ids, _ = getattr(model, name)(prompt, 8)
        assert ids[:, :3].equal(prompt)
        assert 11 not in ids[:, 3:]


def test_drafter_colours_drafts_only(hf_model: Models) -> None:
    """An adapter that changes the AR view's text, or that is attached and never used."""
    model = hf_model(**SMALL)
    adapter, prompt = model.drafter, torch.tensor([[4, 5, 6, 7, 8, 1, 2]])
    counts = {}
    for drafter in (adapter, None):
        object.__setattr__(model, "drafter", drafter)
        texts = [getattr(model, name)(prompt, 24, eos_token_id=[])[0] for name in METHODS]
        assert texts[2].equal(texts[0])
        counts[drafter is None] = (
            model.linear_spec_generate(prompt, 24, 4, eos_token_id=[])[1],
            *map(str, texts),
        )
    assert counts[True][1:] == counts[False][1:]
    assert counts[True][0] != counts[False][0]
