"""The drafter's losses against numbers worked out by hand and a twin that loops over tokens."""

import math

import pytest
import torch
from torch import Tensor

from trimode.training.drafter_loss import (
    active_places,
    block_mean_weights,
    place_losses,
    union_support,
)


def logits_of(*laws: list[float]) -> Tensor:
    """[M, V] float64. Logits whose softmax is the given laws."""
    return torch.tensor(laws, dtype=torch.float64).log()


def bits(text: str) -> Tensor:
    """[B, S] bool, from `1` and `0`, rows parted by spaces."""
    return torch.tensor([[c == "1" for c in row] for row in text.split()])


def test_worked_example() -> None:
    """A wrong direction of the KL, a lambda with a gradient, or a CE over the whole vocabulary.

    V = 4, K = 1, tau = 1: the drafter's best is token 0, the verifier's token 1, so U = {0, 1}.
    q = (0.6, 0.2) / 0.8 = (3/4, 1/4), p = (0.1, 0.4) / 0.5 = (1/5, 4/5).
    """
    draft = logits_of([0.6, 0.2, 0.1, 0.1])
    verifier = logits_of([0.1, 0.4, 0.2, 0.3])
    got = place_losses(draft, verifier, torch.tensor([1]), temperature=1.0, top_k=1, eta=0.5)
    overlap = 1 / 5 + 1 / 4
    mix = math.exp(-0.5 * overlap)
    kl = 1 / 5 * math.log((1 / 5) / (3 / 4)) + 4 / 5 * math.log((4 / 5) / (1 / 4))
    assert got.overlap.item() == pytest.approx(overlap, rel=1e-12)
    assert got.lk.item() == pytest.approx(mix * kl + (1 - mix) * (1 - overlap), rel=1e-12)
    assert got.ce.item() == pytest.approx(-math.log(1 / 4), rel=1e-12)
    assert got.is_inside.tolist() == [True]


def test_target_outside_the_support_is_dropped() -> None:
    """A target nobody proposes counted as a loss of zero, which would make the mean look better."""
    draft, verifier = logits_of([0.6, 0.2, 0.1, 0.1]), logits_of([0.1, 0.4, 0.2, 0.3])
    got = place_losses(draft, verifier, torch.tensor([3]), temperature=1.0, top_k=1, eta=0.5)
    assert got.ce.tolist() == [0.0]
    assert got.is_inside.tolist() == [False]


def test_equal_laws_have_no_loss_and_no_gradient() -> None:
    """An offset that pulls a perfect drafter away."""
    draft = logits_of([0.5, 0.3, 0.1, 0.1]).requires_grad_()
    got = place_losses(draft, draft, torch.tensor([0]), temperature=3.0, top_k=3, eta=0.5)
    (gradient,) = torch.autograd.grad(got.lk.sum(), draft)
    assert got.lk.item() == pytest.approx(0, abs=1e-12)
    assert got.overlap.item() == pytest.approx(1)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_twin_that_loops(top_k: int) -> None:
    """Doubled ids counted twice, a banned token, or a gradient of NaN from the infinities."""
    torch.manual_seed(top_k)
    draft = (3 * torch.randn(5, 9, dtype=torch.float64)).requires_grad_()
    verifier = 3 * torch.randn(5, 9, dtype=torch.float64)
    banned = torch.arange(9) == 4
    draft_logits = draft.masked_fill(banned, -torch.inf)
    verifier = verifier.masked_fill(banned, -torch.inf)
    ids = torch.tensor([0, 1, 2, 3, 5])
    options = {"temperature": 3.0, "top_k": top_k, "eta": 0.5}
    got = place_losses(draft_logits, verifier, ids, **options)
    pairs = zip(draft_logits, verifier, ids.tolist(), strict=True)
    twins = [_slow_losses(*pair, **options) for pair in pairs]
    lk, ce = (torch.stack(column) for column in zip(*(t[:2] for t in twins), strict=True))
    torch.testing.assert_close(got.lk, lk)
    torch.testing.assert_close(got.ce, ce)
    assert got.is_inside.tolist() == [t[2] for t in twins]
    assert got.overlap.tolist() == pytest.approx([t[3] for t in twins])
    mine, theirs = (
        torch.autograd.grad((a + b).sum(), draft, retain_graph=True)[0]
        for a, b in ((got.lk, got.ce), (lk, ce))
    )
    assert mine.isfinite().all()
    torch.testing.assert_close(mine, theirs)


def _slow_losses(
    draft: Tensor, verifier: Tensor, target: int, *, temperature: float, top_k: int, eta: float
) -> tuple[Tensor, Tensor, bool, float]:
    """LK, CE, whether the target is in U, and alpha_acc of one place, one token at a time."""

    def best(logits: Tensor) -> list[int]:
        return sorted(range(len(logits)), key=lambda v: -logits[v].item())[:top_k]

    def law(logits: Tensor, tau: float) -> dict[int, Tensor]:
        mass = {v: (logits[v] / tau).exp() for v in support}
        return {v: m / sum(mass.values()) for v, m in mass.items()}

    support = set(best(draft)) | set(best(verifier))
    p, q, sharp = law(verifier, temperature), law(draft, temperature), law(draft, 1.0)
    overlap = sum(min(p[v].item(), q[v].item()) for v in support)
    mix = math.exp(-eta * overlap)
    kl = sum(p[v] * (p[v] / q[v]).log() for v in support)
    distance = sum((p[v] - q[v]).abs() for v in support) / 2
    is_inside = target in support
    ce = -sharp[target].log() if is_inside else torch.zeros((), dtype=torch.float64)
    return mix * kl + (1 - mix) * distance, ce, is_inside, overlap


def test_union_names_each_token_once() -> None:
    """A token of both top-Ks weighing twice."""
    draft, verifier = logits_of([0.4, 0.3, 0.2, 0.1]), logits_of([0.1, 0.5, 0.3, 0.1])
    ids, is_repeat = union_support(draft, verifier, top_k=2)
    assert ids.tolist() == [[1, 2, 0, 1]]
    assert is_repeat.tolist() == [[False, False, False, True]]


@pytest.mark.parametrize(
    ("kept", "active"),
    [
        ("00000000", "01000100"),  # first drafts rejected
        ("01110111", "01110111"),  # all accepted
        ("01010110", "01100111"),  # what fits again after a mismatch does not count
        ("00110100", "01000110"),
    ],
)
def test_active_places_truth_table(kept: str, active: str) -> None:
    """Places after the first mismatch in the loss, or a mismatch carried into the next block."""
    starts, drafted = bits("10001000"), bits("01110111")
    assert active_places(drafted, bits(kept), starts).tolist() == bits(active).tolist()


def test_blocks_that_are_not_drafted_have_no_active_places() -> None:
    """Fill or a cut block in the loss."""
    got = active_places(bits("01110000"), bits("01110111"), bits("10001000"))
    assert got.tolist() == bits("01110000").tolist()


def test_weights_are_means_in_each_block() -> None:
    """A long accepted prefix outweighing the other blocks."""
    blocks = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    weights = block_mean_weights(bits("01110100"), blocks)
    assert weights[0].tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3, 0, 1, 0, 0])
