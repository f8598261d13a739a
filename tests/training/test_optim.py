"""The optimiser: what Muon does to a matrix, who gets which optimiser, and the schedule."""

import pytest
import torch
from torch import nn

from trimode.model import DrafterAdapter, TriModeConfig, TriModeModel
from trimode.model.adapter import LoraPair
from trimode.training.config import OptimizerPart, SchedulePart
from trimode.training.optim import Muon, make_optimizer, orthogonalize, wsd_ratio


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 16, 64), (2, 64, 16)])
def test_orthogonalize_flattens_the_spectrum_and_keeps_the_directions(
    shape: tuple[int, ...],
) -> None:
    """A wrong coefficient or a missed transpose, which leaves or destroys the singular vectors."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(matrices)
    singular = torch.linalg.svdvals(result)
    assert 0.3 < float(singular.min())
    assert float(singular.max()) < 1.3
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    inner = u.mT @ result @ vh.mT
    off_diagonal = inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))
    assert float(off_diagonal.abs().max()) < 1e-3
    assert float(inner.diagonal(dim1=-2, dim2=-1).min()) > 0.3


@pytest.mark.parametrize("shape", [(48, 48), (32, 96), (96, 32)])
def test_update_has_the_size_of_an_adamw_update(shape: tuple[int, int]) -> None:
    """Rates that must be tuned anew for each shape, or that do not fit AdamW's."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(shape))
    weight.grad = torch.randn(shape)
    Muon([weight], lr=0.01).step()
    rms = float(weight.detach().square().mean().sqrt())
    assert rms == pytest.approx(0.2 * 0.01, rel=0.25)


def test_matrices_of_one_shape_do_not_mix() -> None:
    """Batched orthogonalisation giving one matrix another's update."""
    torch.manual_seed(0)
    gradients = [torch.randn(8, 8), torch.randn(8, 8)]
    together = [nn.Parameter(torch.ones(8, 8)) for _ in gradients]
    for parameter, gradient in zip(together, gradients, strict=True):
        parameter.grad = gradient.clone()
    Muon(together, lr=0.1).step()
    for parameter, gradient in zip(together, gradients, strict=True):
        alone = nn.Parameter(torch.ones(8, 8))
        alone.grad = gradient.clone()
        Muon([alone], lr=0.1).step()
        torch.testing.assert_close(alone, parameter)


def test_momentum_and_decoupled_decay() -> None:
    """Weight decay mixed into the gradient, where orthogonalisation would undo it."""
    parameter = nn.Parameter(torch.full((4, 4), 2.0))
    optimizer = Muon([parameter], lr=0.1, weight_decay=0.5)
    parameter.grad = torch.zeros(4, 4)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.full((4, 4), 2.0 * 0.95))


def _model() -> TriModeModel:
    config = TriModeConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, head_dim=4
    )
    return TriModeModel(config)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_every_parameter_is_updated_once(name: str) -> None:
    """A parameter in no optimiser stays at its initial value without anyone noticing."""
    torch.manual_seed(0)
    model = _model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = make_optimizer(model, OptimizerPart(name=name), has_fast_bf16=False)  # type: ignore[arg-type]
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step(1.0)
    for parameter_name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[parameter_name]), parameter_name
        assert parameter.grad is None
    groups = [g for o in optimizer._optimizers for g in o.param_groups]
    ids = [id(p) for group in groups for p in group["params"]]
    assert len(ids) == len(set(ids)) == len(list(model.parameters()))


def test_embedding_and_head_are_not_orthogonalised() -> None:
    """Muon on the embedding or the head, whose rows are a table, not a map."""
    model = _model()
    muon = make_optimizer(model, OptimizerPart(), has_fast_bf16=False)._optimizers[0]
    assert isinstance(muon, Muon)
    ids = {id(p) for group in muon.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        is_hidden = "_proj" in name
        assert (id(parameter) in ids) == is_hidden, name


def test_mask_embeddings_do_not_decay() -> None:
    """Prevents weight decay from pulling the masks' embedding to zero, and their own rate from
    being that of the factors."""
    pair = LoraPair(torch.ones(2, 8), torch.ones(8, 2), 1.0)
    adapter = DrafterAdapter({(0, "o_proj"): pair}, mask_embeddings=torch.ones(1, 8))
    part = OptimizerPart(
        name="adamw", learning_rate=0.1, embedding_learning_rate=0.5, weight_decay=0.5
    )
    optimizer = make_optimizer(adapter, part, has_fast_bf16=False)
    for parameter in adapter.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(1.0)
    assert adapter.mask_embeddings is not None
    assert adapter.mask_embeddings.eq(1).all()
    assert pair.down.lt(1).all()
    adapter.mask_embeddings.grad = torch.ones(1, 8)
    optimizer.step(1.0)
    moved = 1 - adapter.mask_embeddings
    assert moved.gt(0.3).all()


def test_wsd() -> None:
    """A first step at rate 0, a decay that starts late, or a last step above the minimum."""
    schedule = SchedulePart(warmup_share=0.1, decay_share=0.4, min_ratio=0.1)
    assert wsd_ratio(0.05, schedule) == pytest.approx(0.5)
    assert wsd_ratio(0.1, schedule) == wsd_ratio(0.6, schedule) == 1.0
    assert wsd_ratio(0.8, schedule) == pytest.approx(0.1 + 0.9 * 0.5)
    assert wsd_ratio(1.0, schedule) == pytest.approx(0.1)
    flat = SchedulePart(warmup_share=0.0, decay_share=0.0, min_ratio=0.0)
    assert wsd_ratio(0.0, flat) == wsd_ratio(1.0, flat) == 1.0
