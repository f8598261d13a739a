"""Masks that skip the bonus, adapters that are a view, drafts from the text: still `ar`'s text.

All in float64, where rounding cannot move a choice.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch

from tests.decoding.test_exactness import LAWS, PROMPTS, SMALL, generate, texts
from tests.reference import greedy_diffusion, greedy_skip, group_logits, next_logits
from trimode.decoding import Event, GenerationParams, Sequence
from trimode.decoding.lookup import Lookup
from trimode.decoding.step import Readout, Step
from trimode.engine import Engine
from trimode.engine.runner import Runner
from trimode.errors import CapacityError, RequestError
from trimode.model import DrafterAdapter, TriModeModel
from trimode.model import attention as attention_module
from trimode.model.adapter import AdapterForm, LoraPair, linear_of
from trimode.model.corrector import Corrector
from trimode.model.masks import fed_mask
from trimode.runtime import TriModeLM

BOTH = AdapterForm(
    views=("draft", "denoise"), adapts_clean=False, draft_forms=("skip", "block"), num_masks=3
)
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def other_view(
    model: TriModeModel,
    *,
    form: AdapterForm = BOTH,
    strength: float = 0.5,
    num_places: int = 2,
    has_corrector: bool = False,
) -> DrafterAdapter:
    """A random adapter on all linear layers, with mask embeddings and perhaps a corrector."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    pairs, hidden = {}, model.config.hidden_size
    for index, layer in enumerate(model.encoder.layers):
        for target in TARGETS:
            weight = linear_of(layer, target).weight
            scale = strength * float(weight.std()) / 2
            pairs[index, target] = LoraPair(
                draw(4, weight.shape[1]), draw(weight.shape[0], 4), scale
            )
    embeddings = model.encoder.embed_tokens.weight
    corrector = None
    if has_corrector:
        corrector = Corrector(
            draw(6, hidden), draw(6, hidden) / 8, draw(6, hidden), num_candidates=5
        )
    adapter = DrafterAdapter(
        pairs,
        form=form,
        mask_embeddings=draw(num_places, hidden) * float(embeddings.std()),
        corrector=corrector,
    )
    return adapter.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def base(tiny_model: Callable[..., Any]) -> TriModeLM:
    """Its flat law lets the noise decide, so drafts run long."""
    return TriModeLM(tiny_model(torch.float64, initializer_range=0.2, **SMALL), None)


@pytest.fixture(scope="module")
def peaked(tiny_model: Callable[..., Any]) -> TriModeLM:
    """Its greedy choices are plain, and its drafts right now and then."""
    return TriModeLM(tiny_model(torch.float64, initializer_range=0.3, **SMALL), None)


@pytest.fixture(scope="module")
def adapted(base: TriModeLM) -> TriModeLM:
    return TriModeLM(base.model, None, adapter=other_view(base.model))


@pytest.fixture(scope="module")
def corrected(base: TriModeLM) -> TriModeLM:
    return TriModeLM(base.model, None, adapter=other_view(base.model, has_corrector=True))


SHAPES: list[dict[str, Any]] = [
    {"mode": "linear", "draft_form": "skip", "block_length": 5},
    {"mode": "linear", "draft_form": "skip", "skip_masks": 1},
    {"mode": "linear", "skip_masks": 6, "draft_cutoff": 0.2},
    {"mode": "linear", "skip_masks": 6, "min_gain": 0.05},
    {"mode": "branching", "skip_masks": 6, "branches": 5, "min_gain": 0.1, "lookup": True},
    {"mode": "branching", "skip_masks": 4, "branches": 9, "guesses": False, "min_gain": 0.02},
    {"mode": "branching", "skip_masks": 2, "branches": 1, "block_length": 4},
    {"mode": "branching", "skip_masks": 3, "branches": 4, "block_length": 4},
    {"mode": "branching", "skip_masks": 3, "branches": 5, "guesses": False, "block_length": 5},
    {"mode": "branching", "skip_masks": 4, "branches": 0, "block_length": 5},
    {"mode": "quadratic", "skip_masks": 2, "block_length": 4},
    {"mode": "linear", "draft_form": "block", "block_length": 4, "lookup": True},
    {"mode": "linear", "skip_masks": 3, "lookup": True},
    {"mode": "branching", "skip_masks": 3, "branches": 3, "lookup": True, "block_length": 5},
    {"mode": "branching", "draft_form": "block", "branches": 3, "lookup": True, "block_length": 4},
]


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("ignore_eos", [True, False])
def test_every_shape_writes_what_ar_writes(
    base: TriModeLM,
    adapted: TriModeLM,
    corrected: TriModeLM,
    law: dict[str, Any],
    ignore_eos: bool,
) -> None:
    """Prevents: a skipped place filled from a draft, a group behind the wrong anchor, a looked-up
    token or a corrected choice leaking into the text, an opening token emitted twice or never."""
    expected = generate(base, mode="ar", ignore_eos=ignore_eos, **law)
    for options in SHAPES if ignore_eos else SHAPES[::3]:
        for lm in (base, adapted, corrected):
            found = generate(lm, ignore_eos=ignore_eos, **law, **options)
            assert texts(found) == texts(expected), options
            assert [g.finish_reason for g in found] == [g.finish_reason for g in expected]
            for one in found:
                assert sum(one.stats.acceptance_lengths) == len(one.token_ids) - 1


@pytest.mark.parametrize("num_new", [1, 2, 3, 4, 5])
def test_short_texts(base: TriModeLM, adapted: TriModeLM, num_new: int) -> None:
    """Prevents: a round that opens where no draft of it could be emitted, or past the end."""
    expected = generate(base, mode="ar", max_new_tokens=num_new, temperature=0.7)
    for options in SHAPES:
        found = generate(adapted, max_new_tokens=num_new, temperature=0.7, **options)
        assert texts(found) == texts(expected), options


TWINS: list[dict[str, Any]] = [
    {"num_masks": 1},
    {"num_masks": 3},
    {"num_masks": 4, "branches": 1},
    {"num_masks": 3, "branches": 3, "has_guesses": True},
    {"num_masks": 2, "branches": 5, "has_guesses": True},
    {"num_masks": 3, "branches": 4},
]


def run_as(lm: TriModeLM, prompt: list[int], twin: dict[str, Any], num_new: int) -> Any:
    options: dict[str, Any] = {"mode": "linear"}
    if twin.get("branches"):
        options = {
            "mode": "branching",
            "branches": twin["branches"],
            "guesses": twin.get("has_guesses", False),
        }
    [found] = generate(
        *(lm, prompt),
        seed=0,
        block_length=6,
        skip_masks=twin["num_masks"],
        max_new_tokens=num_new,
        **options,
    )
    return found


@pytest.mark.parametrize("twin", TWINS, ids=str)
@pytest.mark.parametrize("adapts_clean", [None, False, True])
def test_takes_the_forwards_of_its_slow_twin(
    peaked: TriModeLM, twin: dict[str, Any], adapts_clean: bool | None
) -> None:
    """Prevents: groups that see a draft too many or too few, places counted from the group's start,
    the adapter on for what it is not for, an opening that is no part of its round."""
    adapter = None
    if adapts_clean is not None:
        form = AdapterForm(("draft",), adapts_clean, ("skip",), 3)
        adapter = other_view(peaked.model, form=form, strength=0.2)
    lm = TriModeLM(peaked.model, None, adapter=adapter)
    for prompt in PROMPTS:
        found = run_as(lm, prompt, twin, 20)
        expected = greedy_skip(peaked.model, prompt, max_new_tokens=20, adapter=adapter, **twin)
        assert found.token_ids == expected.new_ids
        assert found.stats.acceptance_lengths == expected.lengths
        assert found.stats.num_forwards == expected.num_forwards


def _of_the_groups_start(groups: Any, positions: Any, anchors: Any) -> Any:
    """A mutant of `fed_mask`: the anchor derived from the group's first position."""
    starts: dict[int, int] = {}
    for group, position in zip(groups, positions, strict=True):
        starts[group] = min(position, starts.get(group, position))
    derived = [
        anchor if group == 0 else starts[group] - 1
        for group, anchor in zip(groups, anchors, strict=True)
    ]
    return fed_mask(groups, positions, derived)


def test_a_group_that_sees_one_draft_too_many_is_caught(
    peaked: TriModeLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison with the slow twin must fail where a shorter group sees a rejected draft; and
    what it compares must not change where nothing is wrong."""
    twin: dict[str, Any] = {"num_masks": 3, "branches": 4}
    prompts = [[a, b, c] for a in range(0, 9, 2) for b in range(1, 8, 3) for c in (0, 5)]

    def lengths() -> list[list[int]]:
        return [run_as(peaked, prompt, twin, 24).stats.acceptance_lengths for prompt in prompts]

    found = [
        greedy_skip(peaked.model, prompt, max_new_tokens=24, **twin).lengths for prompt in prompts
    ]
    assert lengths() == found
    monkeypatch.setattr(attention_module, "fed_mask", _of_the_groups_start)
    assert lengths() != found


def test_every_accepted_length_is_reached(adapted: TriModeLM, base: TriModeLM) -> None:
    """Prevents: exactness proved on drafts that are all wrong, or all right."""
    for lm in (base, adapted):
        lengths: set[int] = set()
        for seed in range(12):
            found = generate(
                lm, mode="linear", skip_masks=3, temperature=1.3, seed=seed, max_new_tokens=40
            )
            lengths |= {length for one in found for length in one.stats.acceptance_lengths[:-1]}
        assert {2, 3, 4, 5} <= lengths


@pytest.mark.parametrize("mode", ["linear", "branching"])
def test_the_corrector_walks_each_draft_from_what_stands_before_it(
    peaked: TriModeLM, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Prevents: a place corrected with another group's token, with its own, or not at all; the
    exact bonus not used where masks skip it; a banned token among the candidates, which training
    does not have there."""
    model = deepcopy(peaked.model)
    head = model.diffusion_head.weight
    head[model.config.mask_token_id] = 2 * head[6]  # likelier than the likeliest
    adapter = other_view(model, strength=0.2, has_corrector=True)
    assert adapter.corrector is not None
    adapter.corrector.num_candidates = 2  # so few that a banned one is missed
    lm = TriModeLM(model, None, adapter=adapter)
    seen: list[tuple[list[int], Step, Readout]] = []
    real = Runner.run

    def run(self: Runner, feeds: Any) -> Any:
        readouts = real(self, feeds)
        for feed, readout in zip(feeds, readouts, strict=True):
            text = [*feed.seq.prompt_ids, *feed.seq.new_ids][: feed.seq.length]
            seen.append((text, feed.step, readout))
        return readouts

    monkeypatch.setattr(Runner, "run", run)
    generate(*(lm, PROMPTS[2]), seed=0, mode=mode, block_length=6, skip_masks=3, max_new_tokens=16)
    num_drafted = num_moved = 0
    for text, step, readout in seen:
        trunk = [i for i, group in enumerate(step.groups) if group == 0]
        answers = dict(zip(step.wanted, readout.token_ids, strict=True))
        for number in sorted(set(step.groups) - {0}):
            own = [i for i, group in enumerate(step.groups) if group == number]
            anchor = step.anchors[own[0]]
            known = [*text, *(step.token_ids[i] for i in trunk)][: anchor + 1]
            group = [None if step.mask_places[i] else step.token_ids[i] for i in own]
            place = step.positions[own[0]] - anchor
            before = group[0]
            if place == 2:
                at_anchor = next(i for i in trunk if step.positions[i] == anchor)
                before = answers[at_anchor]
            expected, plain = walked(lm, known, group, place=place, before=before)
            drafted = [answers[i] for i in own if step.mask_places[i]]
            assert drafted == expected
            num_drafted += len(drafted)
            num_moved += sum(a != b for a, b in zip(drafted, plain, strict=True))
    assert num_drafted > 20
    assert num_moved > 5  # or the corrector changed nothing


@pytest.mark.parametrize("options", [{"draft_form": "block"}, {"skip_masks": 3}], ids=str)
def test_the_corrector_is_off_where_the_adapter_is(
    peaked: TriModeLM, options: dict[str, Any]
) -> None:
    """Prevents: the corrector of an adapter that does not serve drafts, applied to drafts."""
    model = peaked.model
    form = AdapterForm(("denoise",), False, ("block",), None)
    adapter = other_view(model, form=form, has_corrector=True)
    lm = TriModeLM(model, None, adapter=adapter)
    options = {"mode": "linear", "block_length": 5, "max_new_tokens": 24, **options}
    found, plain = generate(lm, **options), generate(peaked, **options)
    for one, other in zip(found, plain, strict=True):
        assert one.stats.acceptance_lengths == other.stats.acceptance_lengths


def walked(
    lm: TriModeLM, prefix: list[int], group: list[int | None], *, place: int, before: int | None
) -> tuple[list[int], list[int]]:
    """Greedy choices of a group's masks, one place after the other, with and without corrector."""
    model, adapter = lm.model, lm.adapter
    assert adapter is not None
    corrector = adapter.corrector
    assert corrector is not None
    kept: list[torch.Tensor] = []
    hook = model.encoder.norm.register_forward_hook(lambda *found: kept.append(found[2]))
    logits = group_logits(model, prefix, group, place=place, adapter=adapter)
    hook.remove()
    states = kept[0][0, len(prefix) :]
    table = model.encoder.embed_tokens.weight
    chosen, plain = [], []
    for i, token_id in enumerate(group):
        if token_id is not None:
            before = token_id
            continue
        assert before is not None
        plain.append(int(logits[i].argmax()))
        scores = logits[i].clone()
        scores[model.config.mask_token_id] = -torch.inf
        for candidate in scores.topk(corrector.num_candidates).indices.tolist():
            context = corrector.before @ table[before] * (1 + corrector.state @ states[i])
            scores[candidate] += context @ (corrector.candidate @ table[candidate])
        before = int(scores.argmax())
        chosen.append(before)
    return chosen, plain


def test_batches_and_modes_switched_mid_life(
    base: TriModeLM, adapted: TriModeLM, corrected: TriModeLM
) -> None:
    """Prevents: a draft of one form taken for one of the other when the mode changes, or one
    sequence's groups drafting for another's."""
    params = [
        GenerationParams(
            mode="branching",
            max_new_tokens=24,
            block_length=5,
            seed=seed,
            temperature=1.3,
            ignore_eos=True,
            skip_masks=3,
            lookup=bool(seed % 2),
        )
        for seed in range(6)
    ]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(6)]
    expected = [
        generate(base, p, mode="ar", seed=one.seed, temperature=1.3, max_new_tokens=24)[0].token_ids
        for p, one in zip(prompts, params, strict=True)
    ]
    draw = random.Random(3)
    for lm in (base, adapted, corrected):
        sequences = [lm.sequence(p, one) for p, one in zip(prompts, params, strict=True)]
        engine = Engine(
            lm.model, num_rows=4, num_cells=80, adapter=lm.adapter, time_slice=5, token_budget=64
        )
        for seq in sequences:
            engine.submit(seq)
        while not engine.is_idle:
            engine.step()
            for seq in sequences:
                if not seq.is_finished and draw.random() < 0.3:
                    seq.mode = draw.choice(["ar", "linear", "branching", "quadratic"])
        assert [seq.new_ids for seq in sequences] == expected


@pytest.mark.parametrize("law", LAWS[:3], ids=str)
def test_ar_does_not_see_the_adapter(
    base: TriModeLM, adapted: TriModeLM, law: dict[str, Any]
) -> None:
    """Prevents: an adapter that is the other view colouring this one, by weights or by cells."""
    options: dict[str, Any] = {"mode": "ar", "logprobs": 2, **law}
    for one, other in zip(generate(base, **options), generate(adapted, **options), strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == other.logprobs  # to the bit


def test_an_adapter_that_serves_denoise_is_on_in_diffusion_alone_not_in_its_commits(
    peaked: TriModeLM,
) -> None:
    """Prevents: `diffusion` run on the bare base, or a commit with the adapter on."""
    model = peaked.model
    form = AdapterForm(("denoise",), True, ("block",), None)
    serves = TriModeLM(model, None, adapter=other_view(model, form=form))
    [found] = generate(
        *(serves, PROMPTS[0]), seed=0, mode="diffusion", block_length=4, threshold=0.5
    )
    bare = greedy_diffusion(
        model, PROMPTS[0], max_new_tokens=16, block_length=4, threshold=0.5, stops=()
    )
    # The twin of one block with the adapter on: masks at places 2 to 4, the token before at 1.
    first = int(next_logits(model, PROMPTS[0])[-1].argmax())
    canvas: list[int | None] = [first, None, None, None]
    while None in canvas:
        logits = group_logits(model, PROMPTS[0], canvas, place=1, adapter=serves.adapter)
        sure, token = logits.softmax(-1).max(-1)
        masked = sorted(
            (i for i in range(4) if canvas[i] is None), key=lambda i: (-float(sure[i]), i)
        )
        for rank, i in enumerate(masked):
            if rank == 0 or float(sure[i]) >= 0.5:
                canvas[i] = int(token[i])
    assert found.token_ids[:4] == canvas
    assert found.token_ids[4] == int(
        next_logits(model, [*PROMPTS[0], *found.token_ids[:4]])[-1].argmax()
    )
    assert found.token_ids != bare.new_ids
    drafts = TriModeLM(model, None, adapter=other_view(model, form=AdapterForm()))
    [off] = generate(*(drafts, PROMPTS[0]), seed=0, mode="diffusion", block_length=4, threshold=0.5)
    assert off.token_ids == bare.new_ids


def test_a_grammar_says_nothing_of_masks_behind_an_unknown_bonus(
    base: TriModeLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents: the grammar's law of the bonus token put on the mask after it."""
    from trimode.decoding.law import _places

    params = GenerationParams(
        mode="branching",
        max_new_tokens=20,
        block_length=5,
        seed=0,
        skip_masks=2,
        branches=6,
        ignore_eos=True,
    )
    known: dict[tuple[bool, int], set[bool]] = {}
    real = Runner.run

    def run(self: Runner, feeds: Any) -> Any:
        for feed in feeds:
            for i, place in zip(feed.step.wanted, _places(feed.seq, feed.step), strict=True):
                first = min(
                    p
                    for p, g in zip(feed.step.positions, feed.step.groups, strict=True)
                    if g == feed.step.groups[i]
                )
                kind = (place.is_trunk, first - feed.step.anchors[i])
                behind = feed.step.mask_places[i]
                if place.is_trunk or behind == 2:
                    known.setdefault(kind, set()).add(place.is_known)
                else:
                    assert not place.is_known
        return real(self, feeds)

    monkeypatch.setattr(Runner, "run", run)
    seq = base.sequence(PROMPTS[2], params)
    base.engine([seq]).run()
    trunk = {value for (is_trunk, _), values in known.items() if is_trunk for value in values}
    assert trunk == {True}
    assert known[False, 2] == {False}  # the mask behind a skipped bonus
    assert known[False, 1] == {True}  # the mask behind a guess


def test_looked_up_drafts_come_true_in_a_text_that_repeats_itself() -> None:
    """Prevents: a lookup that never finds, drafts what stood before and not after, or never
    learns."""
    lookup, text = Lookup(), [1, 2, 3, 4, 5, 6]
    assert lookup.guess(text[:3], text[3:], most=4) is None
    for _ in range(4):
        text += [1, 2, 3, 4, 5, 6]
        found = lookup.guess(text[:3], text[3:], most=4)
        assert found is not None
        assert found.token_ids == [1, 2, 3, 4][: len(found.token_ids)]
    assert len(found.token_ids) == 4
    assert min(found.confidences) > 0.75
    wrong, other = Lookup(), [7, 8]
    for i in range(12):
        wrong.guess(other[:1], other[1:], most=2)
        other += [20 + i, 7, 8]
    hopeless = wrong.guess(other[:1], other[1:], most=2)
    assert hopeless is None or hopeless.expected < 0.15


def test_lookup_saves_forwards_on_a_text_that_repeats_itself(base: TriModeLM) -> None:
    """Prevents: `lookup` taken and not used."""
    bias = {4: 30.0}  # the same token over and over
    options: dict[str, Any] = {"seed": 0, "logit_bias": bias, "max_new_tokens": 40}
    options["draft_cutoff"] = 0.4  # the law before the bias is flat, so no draft is as sure
    for shape in ({"draft_form": "block", "block_length": 4}, {"skip_masks": 3}):
        [plain], [looked] = (
            generate(base, PROMPTS[0], mode="linear", lookup=lookup, **shape, **options)
            for lookup in (False, True)
        )
        assert looked.token_ids == plain.token_ids
        assert looked.stats.num_forwards < 0.5 * plain.stats.num_forwards


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "ar", "draft_form": "skip"}, "draft_form is 'skip'; allowed: None but in"),
        ({"mode": "diffusion", "lookup": True}, "lookup is True; allowed: None but in"),
        ({"mode": "linear", "draft_form": "wide"}, "draft_form is 'wide'; allowed: None, block"),
        ({"mode": "linear", "skip_masks": 0}, "skip_masks is 0; allowed"),
        ({"mode": "linear", "lookup": 1}, "lookup is 1; allowed"),
        ({"mode": "linear", "draft_form": "block", "skip_masks": 2}, "skip_masks is 2; allowed"),
        ({"mode": "linear", "draft_form": "skip", "steps": 2}, "steps is 2; allowed"),
        ({"mode": "branching", "branches": 8}, r"allowed: None, or 0 to 2 \* block_length - 1 = 7"),
        (
            {"mode": "branching", "skip_masks": 5, "branches": 12},
            r"allowed: None, or 0 to 2 \* skip_masks \+ 1 = 11",
        ),
    ],
    ids=str,
)
def test_what_the_form_cannot_do_is_refused(options: dict[str, Any], message: str) -> None:
    """Prevents: a knob that is taken and means nothing."""
    with pytest.raises(RequestError, match=message):
        GenerationParams(max_new_tokens=4, block_length=4, seed=0, **options)


def test_the_form_comes_from_the_adapter_unless_asked_for() -> None:
    """Prevents: an adapter trained to skip fed blocks, or more masks than it has seen."""

    def masks(**options: Any) -> int | None:
        params = GenerationParams(
            **({"mode": "linear", "max_new_tokens": 4, "block_length": 8, "seed": 0} | options)
        )
        return params.setting(params.mode, BOTH).num_masks

    assert masks() == 3
    assert masks(block_length=4) == 2
    assert masks(skip_masks=7) == 7
    assert masks(draft_form="block") is None
    assert masks(threshold=0.5) is None
    assert masks(mode="diffusion") is None
    assert GenerationParams(mode="linear", max_new_tokens=4, block_length=8, seed=0).setting(
        "linear"
    ) == GenerationParams(
        mode="linear", max_new_tokens=4, block_length=8, seed=0, draft_form="block"
    ).setting("linear", BOTH)


def test_events_of_an_opening_round(adapted: TriModeLM) -> None:
    """Prevents: a watcher that sees a draft at another place than the verifier checks it."""
    events: list[Event] = []
    [found] = generate(
        *(adapted, PROMPTS[0]),
        seed=3,
        mode="linear",
        temperature=1.3,
        skip_masks=3,
        on_event=lambda _, event: events.append(event),
    )
    shown = [i for event in events if event.kind == "emit" for i in event.token_ids]
    assert shown == found.token_ids
    latest = None
    for event in events:
        if event.kind == "draft":
            latest = event
        elif event.kind == "verify" and event.token_ids:
            assert latest is not None
            assert event.position == latest.position + 1
            assert latest.token_ids[1:][: len(event.token_ids)] == event.token_ids


def test_a_round_cut_short_is_counted(adapted: TriModeLM) -> None:
    """Prevents: the token of an opening forward missing in the lengths of a round that an abort
    ends."""
    params = GenerationParams(
        mode="linear", max_new_tokens=20, block_length=5, seed=0, ignore_eos=True
    )
    seq = adapted.sequence(PROMPTS[0], params)
    engine = adapted.engine([seq])
    while seq.stats.forwards["verify"] < 3:  # a round, and the opening of the next
        engine.step()
    engine.abort(seq)
    assert seq.setting.num_masks
    assert sum(seq.stats.acceptance_lengths) == len(seq.new_ids) - 1
    assert len(seq.stats.acceptance_lengths) == 2


def test_nothing_is_drafted_behind_the_end(base: TriModeLM) -> None:
    """Prevents: a draft shown after the last token, at a place that is none."""
    for options in ({"mode": "linear"}, {"mode": "quadratic"}):
        for seed in range(20):
            kinds: list[str] = []
            generate(
                *(base, PROMPTS[0]),
                seed=seed,
                temperature=1.3,
                skip_masks=3,
                ignore_eos=False,
                max_new_tokens=20,
                on_event=lambda _, event, kinds=kinds: kinds.append(event.kind),
                **options,
            )
            assert kinds[-1] == "emit"


@pytest.mark.parametrize("limits", [{"max_step_tokens": 64}, {}], ids=str)
def test_too_many_masks_are_named(base: TriModeLM, limits: dict[str, int]) -> None:
    """Prevents: a user told to take shorter blocks, which would not help."""
    params = GenerationParams(
        mode="linear", max_new_tokens=4, block_length=4, seed=0, skip_masks=50
    )
    engine = Engine(base.model, num_rows=1, num_cells=40, **limits)
    with pytest.raises(CapacityError, match="skip_masks=50 "):
        engine.submit(base.sequence([1], params))


def test_a_sequence_made_for_another_form_is_refused(adapted: TriModeLM) -> None:
    """Prevents: masks placed for one adapter and read by another."""
    params = GenerationParams(mode="linear", max_new_tokens=4, block_length=4, seed=0)
    engine = Engine(adapted.model, num_rows=1, num_cells=40, adapter=adapted.adapter)
    seq = Sequence([1], params, mask_token_id=11)
    with pytest.raises(AssertionError, match="made for an adapter"):
        engine.submit(seq)
