"""The fused head and cross-entropy against the plain one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trimode.training import head_loss
from trimode.training.head_loss import head_loss_sum


@pytest.mark.parametrize("num_rows", [3, 10, 100])
def test_equals_plain_cross_entropy(monkeypatch: pytest.MonkeyPatch, num_rows: int) -> None:
    """A chunk lost at the end, a weight applied to the loss but not to its gradient."""
    monkeypatch.setattr(head_loss, "chunk_rows", lambda vocab_size, device: num_rows)
    torch.manual_seed(0)
    head = nn.Linear(8, 17, bias=False).double()
    states = torch.randn(20, 8, dtype=torch.float64, requires_grad=True)
    targets, weights = torch.randint(17, (20,)), torch.rand(20)
    (head_loss_sum(head, states, targets, weights) * 0.3).backward()
    fused = [states.grad, head.weight.grad]
    states.grad = head.weight.grad = None
    losses = F.cross_entropy(head(states), targets, reduction="none")
    ((losses * weights).sum() * 0.3).backward()
    torch.testing.assert_close(fused, [states.grad, head.weight.grad])
    with torch.no_grad():
        total = head_loss_sum(head, states, targets, weights)
    torch.testing.assert_close(total, (losses * weights).sum())


def test_no_rows_give_zero() -> None:
    """A batch whose rows happen to have no masked token."""
    head = nn.Linear(8, 17, bias=False)
    states = torch.zeros(0, 8, requires_grad=True)
    total = head_loss_sum(head, states, torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    total.backward()
    assert float(total.detach()) == 0
    assert head.weight.grad is not None
    assert float(head.weight.grad.abs().sum()) == 0


def test_bf16_products_keep_a_float32_sum() -> None:
    """A loss summed in bf16 stops growing after a few hundred tokens."""
    torch.manual_seed(0)
    head = nn.Linear(8, 17, bias=False)
    states, targets = torch.randn(5000, 8), torch.randint(17, (5000,))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        total = head_loss_sum(head, states, targets, torch.ones(5000))
    exact = F.cross_entropy(head(states), targets, reduction="sum")
    assert total.dtype == torch.float32
    assert float(total) == pytest.approx(float(exact.detach()), rel=2e-3)


@pytest.mark.parametrize(
    ("is_frozen", "is_evaluating", "num_products"), [(False, True, 1), (True, False, 2)]
)
def test_no_gradient_is_made_in_vain(
    monkeypatch: pytest.MonkeyPatch, is_frozen: bool, is_evaluating: bool, num_products: int
) -> None:
    """An evaluation, or a LoRA run, that makes the gradient of a head which nobody updates."""
    head = nn.Linear(8, 17, bias=False).requires_grad_(not is_frozen)
    states = torch.randn(20, 8, requires_grad=True)
    made = []
    for name in ("mm", "zeros_like", "empty_like"):
        plain = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *a, plain=plain, name=name, **k: made.append(name) or plain(*a, **k)
        )
    with torch.set_grad_enabled(not is_evaluating):
        total = head_loss_sum(head, states, torch.randint(17, (20,)), torch.ones(20))
    assert made.count("mm") == num_products
    assert "zeros_like" not in made
    assert ("empty_like" in made) == (not is_evaluating)
    if not is_evaluating:
        total.backward()
        assert states.grad is not None
        assert head.weight.grad is None
