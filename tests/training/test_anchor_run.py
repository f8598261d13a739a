"""Whole runs from anchors: they learn, resume to the last bit, export what `trimode` reads, and
measure what decoding then does."""

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import trimode
from tests.training.fake_stream import FakeStream, write_data
from tests.training.test_drafter import STAGE, _StopAfter
from tests.training.tiny_run import MODEL
from trimode.checkpoint.adapter import load_adapter
from trimode.checkpoint.io import load_model
from trimode.errors import ConfigError, TriModeError
from trimode.model.adapter import TARGETS, AdapterForm
from trimode.runtime import TriModeLM
from trimode.training import anchor_objective
from trimode.training.adapter_config import DrafterPart
from trimode.training.anchor_config import AnchorPart
from trimode.training.anchor_evaluation import AnchorReport, _Tally, measure_anchors
from trimode.training.anchor_groups import all_anchors, lay_out, moved
from trimode.training.anchor_loss import Heads
from trimode.training.anchor_objective import AnchorObjective
from trimode.training.config import (
    EvaluationPart,
    ModelPart,
    OptimizerPart,
    SchedulePart,
    TrainConfig,
)
from trimode.training.conversation_packing import ConversationSampler
from trimode.training.parallel import setup
from trimode.training.precision import choose_precision
from trimode.training.trainer import train

ANCHORS = AnchorPart(per_row=12, num_masks=3)
EVERYTHING = AnchorPart(
    per_row=12,
    num_masks=3,
    keep=0.8,
    forms=("skip", "block"),
    views=("draft", "denoise"),
    loss="kl_then_lk",
    lk_from=0.5,
    weights="dpace",
    replay_share=0.5,
    replay_from=0.25,
    mask_places=4,
    corrector_rank=4,
    corrector_candidates=4,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A finished run of the AR view on documents that count in a circle."""
    folder = tmp_path_factory.mktemp("base")
    config = TrainConfig(
        data=str(write_data(folder / "data", period=7)),
        output_dir=str(folder / "run"),
        stages=(STAGE,),
        model=MODEL,
        schedule=SchedulePart(warmup_share=0.1, decay_share=0.5),
        evaluation=EvaluationPart(tokens=512, every_steps=0),
        precision="fp32",
        device="cpu",
        log_every_steps=1,
    )
    train(config)
    return config


def anchored(
    base: TrainConfig, output_dir: Path, *, num_steps: int, anchors: AnchorPart
) -> TrainConfig:
    tokens = num_steps * STAGE.batch_tokens
    return replace(
        base,
        output_dir=str(output_dir),
        model=ModelPart(init=base.output_dir + "/final"),
        stages=(replace(STAGE, name="adapter", tokens=tokens, diffusion_weight=0.3),),
        drafter=DrafterPart(rank=8, alpha=32.0, targets=TARGETS, anchors=anchors),
        optimizer=OptimizerPart(name="adamw", learning_rate=1e-2, weight_decay=0.0),
    )


@dataclass(frozen=True)
class Learned:
    folder: Path
    base: Path
    report: AnchorReport
    steps: list[dict[str, Any]]


@pytest.fixture(scope="module", params=["plain", "everything"])
def learned(
    base: TrainConfig, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Learned:
    """The plainest way, and with every option on, where fewer of the groups are drafts."""
    anchors, num_steps = (ANCHORS, 40) if request.param == "plain" else (EVERYTHING, 60)
    folder = tmp_path_factory.mktemp("run") / "run"
    config = anchored(base, folder, num_steps=num_steps, anchors=anchors)
    seen: list[dict[str, Any]] = []
    result = train(config, log=seen.append)
    assert result.final_dir == Path(config.output_dir) / "drafter"
    assert isinstance(result.heldout, AnchorReport)
    steps = [record for record in seen if record["kind"] == "step"]
    return Learned(result.final_dir, Path(base.output_dir) / "final", result.heldout, steps)


def test_learning_raises_acceptance(learned: Learned) -> None:
    """Prevents a loss that falls, but does not lead to accepted drafts."""
    before, after = learned.report.untrained.skip, learned.report.with_adapter.skip
    assert before is not None
    assert after is not None
    assert before.round_acceptance_length < 2.6
    assert after.round_acceptance_length > 4
    assert after.fused_tokens > before.fused_tokens + 1
    assert after.conditional_by_offset[0] > 0.8
    first, last = learned.steps[0], learned.steps[-1]
    assert last["right_to_2"] > first["right_to_2"] + 0.4
    assert last["acceptance_length"] > first["acceptance_length"] + 0.5
    assert last["overlap"] > first["overlap"] + 0.2
    counts = [record["drafted_tokens"] for record in learned.steps]
    assert counts == sorted(counts)
    assert counts[-1] > 39 * counts[0] * 0.5
    learned.report.line()


def test_what_is_exported_says_how_to_use_it(learned: Learned) -> None:
    """Prevents an adapter whose masks, form or corrector decoding would have to guess."""
    model = load_model(learned.base, device="cpu", dtype=torch.float32)
    adapter = load_adapter(learned.folder, model=model)
    assert adapter.mask_embeddings is not None
    is_plain = adapter.corrector is None
    assert len(adapter.mask_embeddings) == (1 if is_plain else 4)
    assert replace(adapter.form, acceptance=()) == AdapterForm(
        views=("draft",) if is_plain else ("draft", "denoise"),
        adapts_clean=False,
        draft_forms=("skip",) if is_plain else ("skip", "block"),
        num_masks=3,
    )
    measured = learned.report.with_adapter  # the last evaluation is the best one here
    for form, chances in zip(adapter.form.draft_forms, adapter.form.acceptance, strict=True):
        assert list(chances) == pytest.approx(measured.of(form).conditional_by_offset, abs=0.1)
        assert chances[0] > 0.7
    mean = model.encoder.embed_tokens.weight.mean(0)
    assert (adapter.mask_embeddings - mean).abs().max() > 1e-3
    if adapter.corrector is not None:
        assert adapter.corrector.num_candidates == 4
        assert adapter.corrector.candidate.abs().max() > 0
    found = json.loads((learned.folder / "adapter_config.json").read_text())
    assert found["base_model_name_or_path"] == str(learned.base)


@pytest.mark.parametrize("anchors", [ANCHORS, EVERYTHING], ids=["plain", "everything"])
def test_stopped_and_resumed_run_has_the_same_adapter_to_the_bit(
    base: TrainConfig, tmp_path: Path, anchors: AnchorPart
) -> None:
    """Prevents draws, a replay, the loss in force or the count of drafted tokens from depending on
    where a run was stopped."""
    config = anchored(base, tmp_path / "straight", num_steps=6, anchors=anchors)
    straight = train(config)
    stopped = replace(config, output_dir=str(tmp_path / "stopped"))
    assert not train(stopped, log=_StopAfter(3)).is_finished
    resumed = train(stopped)
    assert resumed.heldout == straight.heldout
    assert replace(resumed.state, seconds=0) == replace(straight.state, seconds=0)
    assert straight.state.drafted_tokens > 0
    for name in ("adapter_model.safetensors", "trimode_view.safetensors"):
        one, other = (
            load_file(tmp_path / run / "drafter" / name) for run in ("straight", "stopped")
        )
        assert one.keys() == other.keys()
        assert all(tensor.equal(other[key]) for key, tensor in one.items())


class OneText(FakeStream):
    """Conversations whose answers a model wrote."""

    def __init__(self, prompts: list[list[int]], written: list[list[int]]) -> None:
        lens = [len(p) + len(w) for p, w in zip(prompts, written, strict=True)]
        super().__init__(lens)
        self.kind = "chat"
        pairs = list(zip(prompts, written, strict=True))
        self._ids = np.array([i for p, w in pairs for i in (*p, *w)], dtype=np.int64)
        self._flags = np.array([f for p, w in pairs for f in [False] * len(p) + [True] * len(w)])

    def supervised(self, start: int, stop: int) -> np.ndarray:
        """[stop - start] bool."""
        return self._flags[start:stop].copy()


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("block", {"mask_places": 0, "adapts_clean": True}),
        ("block", {"mask_places": 3, "corrector_rank": 4, "corrector_candidates": 4}),
        ("skip", {"mask_places": 0}),
        ("skip", {"mask_places": 4, "corrector_rank": 4, "corrector_candidates": 4}),
    ],
)
def test_the_walk_counts_what_decoding_counts(
    base: TrainConfig, tmp_path: Path, form: Any, options: dict[str, Any]
) -> None:
    """Prevents a number in training that decoding does not reach, or passes."""
    has_forms = "draft_form" in inspect.signature(TriModeLM.generate).parameters
    if not has_forms and options != {"mask_places": 0, "adapts_clean": True}:
        pytest.skip("decoding knows the published form of drafts only")
    anchors = AnchorPart(per_row=12, num_masks=3, forms=(form,), **options)
    config = anchored(base, tmp_path / "run", num_steps=12, anchors=anchors)
    result = train(config)
    assert result.final_dir is not None
    model = load_model(Path(config.model.init or ""), device="cpu", dtype=torch.float64)
    model.requires_grad_(False)
    adapter = load_adapter(result.final_dir, model=model)
    lm = TriModeLM(model, None, adapter=adapter)
    prompts = [[3 + (i * step) % 7 for i in range(5 + step)] for step in (1, 2, 3, 4, 5)]
    how: dict[str, Any] = {"mode": "linear", "block_length": 4, "ignore_eos": True, "min_gain": 0.0}
    if form == "skip":
        how |= {"block_length": 8, "skip_masks": 3}
    lengths, written = [], []
    for prompt in prompts:
        made = lm.generate(prompt, max_new_tokens=40, **how)
        some = made.stats.acceptance_lengths[:-3]  # the last ones know where the text must end
        lengths += some
        written.append(made.token_ids[: 1 + sum(some)])
    assert len(set(lengths)) >= 2
    found = measure_anchors(
        model,
        OneText(prompts, written),
        config=replace(config, evaluation=EvaluationPart(tokens=10_000)),
        parallel=setup(config.parallel, device=torch.device("cpu"), config={}),
        precision=choose_precision("fp32", torch.device("cpu")),
        heads=Heads(model),
        adapter=adapter,
    )
    assert (found.answers, found.greedy_share) == (5, 1.0)
    assert found.of(form).rounds == len(lengths)
    assert found.of(form).round_acceptance_length == pytest.approx(sum(lengths) / len(lengths))


def test_replay_draws_again_where_the_round_ends(
    base: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents a replay that trains the drawn anchors after all, or begins before its time."""
    anchors = replace(ANCHORS, replay_share=1.0, replay_from=0.5)
    config = anchored(base, tmp_path / "run", num_steps=4, anchors=anchors)
    played: list[tuple[Any, Any, bool]] = []
    group_sums = anchor_objective.group_sums

    def spy(model: Any, text: Any, groups: Any, *args: Any, **options: Any) -> Any:
        found = group_sums(model, text, groups, *args, **options)
        if torch.is_grad_enabled() or groups.drawn.is_replayed.any():
            played.append((groups.drawn, found.runs, torch.is_grad_enabled()))
        return found

    moves: list[bool] = []

    def check(rows: Any, drawn: Any, runs: Any) -> Any:
        before, found, has_graph = played[-1]
        assert not has_graph
        assert drawn.anchors.equal(before.anchors)
        assert runs.equal(found)
        after = moved(rows, drawn, runs)
        moves.append(not after.anchors.equal(drawn.anchors))
        return after

    monkeypatch.setattr(anchor_objective, "group_sums", spy)
    monkeypatch.setattr(anchor_objective, "moved", check)
    train(config)
    assert [has_graph for _, _, has_graph in played] == [True, True, False, True, False, True]
    assert moves == [True, True]
    for (drawn, runs, _), (after, _, _) in ((played[2], played[3]), (played[4], played[5])):
        assert (after.anchors.sum() - drawn.anchors.sum()) > 0
        assert (after.anchors.sum() - drawn.anchors.sum()) <= (runs + 2).sum()


def test_answers_of_another_law_are_not_called_greedy(base: TrainConfig, tmp_path: Path) -> None:
    """Prevents a walk over sampled text, where drafts of the likeliest token must look bad."""
    config = anchored(base, tmp_path / "run", num_steps=1, anchors=ANCHORS)
    model = load_model(Path(config.model.init or ""), device="cpu", dtype=torch.float32)
    rng = np.random.default_rng(0)
    prompts = [[3, 4, 5, 6]] * 3
    texts = [[7, 8, 9, 3, 4, 5, 6, 7], *rng.integers(3, 10, (2, 8)).tolist()]
    found = measure_anchors(
        model,
        OneText(prompts, texts),
        config=config,
        parallel=setup(config.parallel, device=torch.device("cpu"), config={}),
        precision=choose_precision("fp32", torch.device("cpu")),
        heads=Heads(model),
        adapter=None,
    )
    assert found.greedy_share == pytest.approx(1 / 3, abs=1e-4)
    assert found.skip is not None
    assert found.skip.rounds <= 7


@pytest.mark.parametrize(("form", "rounds"), [("skip", 3), ("block", 3)])
def test_a_fused_forward_drafts_behind_the_token_before_the_last(form: str, rounds: int) -> None:
    """Prevents a fused walk over groups that begin one token too late: the last token was their
    bonus, and not yet known, when they were fed."""
    runs = torch.tensor([2, 0, 0, 0, 0, 1, 0, 0])  # by anchor; the answer is tokens 1 to 6
    tally = _Tally.new(3)
    tally._add_answer(runs, 1, 7, is_greedy=True, form=form)
    found = tally.quality()
    assert found.fused_tokens == 5 / 3  # 0 -> 3 (run 2 behind anchor 0) -> 4 -> 5
    assert found.rounds == rounds


def test_a_mask_beyond_the_text_is_not_called_wrong() -> None:
    """Prevents shares that sink with the length of the answers: a perfect draft is always right."""
    sampler = ConversationSampler(OneText([[3, 4]] * 2, [[5, 6, 7], [8, 9, 3, 4, 5]]), 16, (2,), 0)
    rows = sampler.rows([0])
    drawn = all_anchors(rows, part=ANCHORS, form="skip")
    groups = lay_out(rows, drawn, mask_token_id=1, eos_token_id=2)
    assert len(groups.targets) < 3 * drawn.num_groups
    tally, yes = _Tally.new(3), torch.ones(len(groups.targets), dtype=torch.bool)
    tally.add(rows, groups, torch.full_like(rows.clean_ids, -1), yes, yes, form="skip")
    assert tally.quality().conditional_by_offset == [1, 1, 1]


def test_a_base_that_moved_in_memory_fails_the_run(
    base: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents a proof of the frozen base that cannot fail."""
    loss = AnchorObjective.loss

    def nudge(self: AnchorObjective, *args: Any) -> Any:
        with torch.no_grad():
            self.model.encoder.norm.weight[0] += 1e-6
        return loss(self, *args)

    monkeypatch.setattr(AnchorObjective, "loss", nudge)
    with pytest.raises(TriModeError, match="changed in memory"):
        train(anchored(base, tmp_path / "run", num_steps=2, anchors=ANCHORS))


def test_bfloat16_base_learns_the_same(base: TrainConfig, tmp_path: Path) -> None:
    """Prevents a base in bfloat16 that trains its adapter towards other choices."""
    config = anchored(base, tmp_path / "run", num_steps=30, anchors=ANCHORS)
    result = train(replace(config, precision="bf16"))
    assert isinstance(result.heldout, AnchorReport)
    assert result.heldout.with_adapter.skip is not None
    assert result.heldout.with_adapter.skip.round_acceptance_length > 3.5
    assert result.final_dir is not None
    lm = trimode.load(config.model.init, drafter=result.final_dir)
    assert lm.adapter is not None


Change = Callable[[TrainConfig], TrainConfig]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: replace(c, model=ModelPart()), "a drafter run needs the model that it is for"),
        (
            lambda c: replace(c, drafter=replace(c.drafter, sampled_share=0.1)),
            "sampled_share is 0.1, but means nothing beside anchors",
        ),
        (
            lambda c: replace(
                c,
                optimizer=replace(c.optimizer, embedding_learning_rate=1e-3),
                drafter=replace(c.drafter, anchors=replace(ANCHORS, mask_places=0)),
            ),
            "optimizer.embedding_learning_rate is 0.001, but means nothing to a drafter run",
        ),
    ],
)
def test_config_errors(base: TrainConfig, tmp_path: Path, change: Change, message: str) -> None:
    """Prevents a run of hours that ignores what it was asked."""
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        change(anchored(base, tmp_path / "run", num_steps=2, anchors=ANCHORS))
