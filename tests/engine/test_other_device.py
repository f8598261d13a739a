"""Decoding on a device that is not the CPU: everything that a forward is given must lie there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests.other_device import DEVICE, Elsewhere, other_device
from trimode.decoding.choose import choose
from trimode.decoding.noise import gumbel, noise_key
from trimode.decoding.params import GenerationParams
from trimode.engine import Engine
from trimode.model import DrafterAdapter
from trimode.model.adapter import TARGETS, VIEWS, AdapterForm, new_adapter
from trimode.model.corrector import Corrector
from trimode.runtime import Generation, TriModeLM

PROMPTS = [[65, 66, 67], [70], [80, 81, 82, 83, 84, 85, 86]]
MODES: tuple[dict[str, Any], ...] = (
    {"mode": "ar"},
    {"mode": "linear"},
    {"mode": "linear", "draft_form": "skip", "lookup": True},
    {"mode": "branching", "branches": 5},
    {"mode": "quadratic", "block_length": 4},
    {"mode": "diffusion", "policy": "entropy_bound"},
    {"mode": "diffusion", "revision": "joint_threshold"},
    {"mode": "diffusion", "revision": "ar_doubt"},
    {"mode": "diffusion", "steps": 3, "revision": "remdm"},
)
LAWS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 20},
    {
        "temperature": 1.0,
        "logit_bias": {70: 2.0},
        "repetition_penalty": 1.2,
        "max_thinking_tokens": 4,
        "end_think_token_id": 90,
    },
)

Models = Callable[..., Any]


def corrected_adapter(model: Any) -> DrafterAdapter:
    """On everything, with mask embeddings and a corrector."""
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(4, 64, generator=generator) for _ in range(3)]
    adapter = new_adapter(
        model.encoder.layers,
        rank=2,
        alpha=2,
        targets=TARGETS,
        seed=1,
        form=AdapterForm(views=VIEWS, adapts_clean=False, draft_forms=("block", "skip")),
        mask_embeddings=torch.randn(2, 64, generator=generator),
        corrector=Corrector(*parts, num_candidates=5),
    )
    for _, _, pair in adapter.items():
        pair.up.data = torch.randn(pair.up.shape, generator=generator) * 0.2
    return adapter.double().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def lms(tiny_model: Models, byte_tokenizer: PreTrainedTokenizerFast) -> tuple[TriModeLM, TriModeLM]:
    """The same network here and on the other device."""
    model = tiny_model()
    adapter = corrected_adapter(model)
    with other_device():
        away = copy.deepcopy(model).to(DEVICE)
        away_adapter = copy.deepcopy(adapter).to(DEVICE)
    here = TriModeLM(model, byte_tokenizer, adapter=adapter)
    return here, TriModeLM(away, byte_tokenizer, adapter=away_adapter)


def test_the_other_device_is_strict() -> None:
    """Prevents: a test of devices that lets tensors of two devices meet, and so cannot fail."""
    with other_device():
        there = torch.arange(3, device="cuda")
        assert there.device == DEVICE
        assert not there.is_cpu
        assert (there * 2 + torch.tensor(1)).tolist() == [1, 3, 5]
        for wrong in (
            lambda: there + torch.ones(3),
            lambda: torch.ones(3, 3)[:, 0] @ there.float(),
        ):
            with pytest.raises(RuntimeError, match="on the CPU"):
                wrong()
        there[torch.tensor([0, 2])] = 7  # CUDA takes indices from the CPU
        assert there.cpu().tolist() == [7, 1, 7]


@pytest.mark.parametrize("law", LAWS, ids=("greedy", "filtered", "controlled"))
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_texts(lms: tuple[TriModeLM, TriModeLM], mode: dict[str, Any], law: dict[str, Any]) -> None:
    """Prevents: a mask, an index or a law left on the CPU, which only a GPU would refuse."""
    here, there = lms
    options = {**mode, **law, "max_new_tokens": 12, "seed": 3, "ignore_eos": True}
    if mode["mode"] == "ar":
        options["logprobs"] = 2
    expected = here.generate(PROMPTS, **options)
    with other_device():
        found = there.generate(PROMPTS, **options)
    assert isinstance(expected, list)
    assert isinstance(found, list)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    if mode["mode"] != "ar":
        assert found[0].stats.forwards == expected[0].stats.forwards


def test_mixed_rows(lms: tuple[TriModeLM, TriModeLM]) -> None:
    """Prevents: rows that are no neighbours, prefixes copied and prompts cut, on the CPU only."""
    found: list[list[list[int]]] = []
    for lm in lms:
        with other_device():
            engine = Engine(
                lm.model,
                num_rows=3,
                num_cells=96,
                adapter=lm.adapter,
                token_budget=24,
                time_slice=4,
            )
            sequences = [
                lm.prepare([65 + i % 3] * 14, seed=i, max_new_tokens=10, ignore_eos=True, **mode)
                for i, mode in enumerate(MODES)
            ]
            for seq in sequences:
                engine.submit(seq)
                engine.step()
            engine.run()
        assert engine.counts.preemptions
        assert engine.counts.reused_tokens
        found.append([seq.new_ids for seq in sequences])
    assert found[0] == found[1]


def test_infilling_and_revising(lms: tuple[TriModeLM, TriModeLM]) -> None:
    """Prevents: gaps and revisions that work on the CPU only."""
    here, there = lms
    text = "def add(a, b):\n    return <FILL>\n"
    expected = here.infill(text, lengths=[2, 4], seed=0), here.revise("a = b + c\n", budget=2)
    with other_device():
        found = there.infill(text, lengths=[2, 4], seed=0), there.revise("a = b + c\n", budget=2)
    assert found[0].text == expected[0].text
    assert found[1].text == expected[1].text


def test_noise_and_choices_are_the_same_bits() -> None:
    """Prevents: other noise, or another path to a choice, where a device is not the CPU."""
    keys = torch.tensor([noise_key(seed, 9) for seed in (0, 1, 2**64 - 1)])
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(0))
    params = [
        GenerationParams(mode="ar", max_new_tokens=1, block_length=8, seed=i, temperature=0.7)
        for i in range(3)
    ]
    expected = choose(logits.clone(), params=params, positions=[4, 5, 6], banned=torch.tensor([2]))
    with other_device():
        assert torch.equal(gumbel(keys.to(DEVICE), 500).cpu(), gumbel(keys, 500))
        away = logits.to(DEVICE)
        assert isinstance(away, Elsewhere)
        found = choose(
            away, params=params, positions=[4, 5, 6], banned=torch.tensor([2], device=DEVICE)
        )
    assert found == expected


def test_generation_is_of_the_other_device(lms: tuple[TriModeLM, TriModeLM]) -> None:
    """Prevents: a twin that never left the CPU, so that the tests above compare it with itself."""
    _, there = lms
    assert all(isinstance(weight, Elsewhere) for weight in there.model.parameters())
    with other_device():
        cache = there.model.new_cache(num_rows=1, num_cells=4)
        assert cache.keys.device == DEVICE
        assert isinstance(there.generate([65], max_new_tokens=1), Generation)
