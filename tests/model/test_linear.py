"""The linear layer against float64, on every path and where no quick path may be taken."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from trimode.model.linear import Linear


@pytest.fixture(params=[True, False], ids=["bias", "no-bias"])
def layer(request: pytest.FixtureRequest) -> Iterator[Linear]:
    torch.manual_seed(0)
    return Linear(48, 80, bias=request.param)  # type: ignore[return-value]


def expected(layer: Linear, x: Tensor) -> Tensor:
    """The definition, in float64."""
    output = torch.einsum("...i,oi->...o", x.double(), layer.weight.detach().double())
    return output if layer.bias is None else output + layer.bias.detach().double()


@pytest.mark.parametrize("shape", [(0,), (1,), (2,), (3,), (8,), (9,), (40,), (1, 1), (2, 7)])
def test_every_path_gives_the_product(layer: Linear, shape: tuple[int, ...]) -> None:
    """Prevents: a padded token in the answer, a transposed one, a bias left out or added twice."""
    x = torch.randn(*shape, 48)
    kept = x.clone()
    with torch.inference_mode():
        output = layer(x)
    assert output.shape == (*shape, 80)
    torch.testing.assert_close(output.double(), expected(layer, x), rtol=0, atol=1e-5)
    assert x.equal(kept)


@pytest.mark.parametrize("num_tokens", [1, 2, 5, 20])
def test_takes_strided_tokens(layer: Linear, num_tokens: int) -> None:
    """Prevents: memory read in the order of its cells where it is a transposed or a cut view."""
    for x in (torch.randn(48, num_tokens).T, torch.randn(num_tokens, 96)[:, ::2]):
        with torch.inference_mode():
            output = layer(x)
        torch.testing.assert_close(output.double(), expected(layer, x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 2, 5, 20])
def test_gradients_are_those_of_torch(layer: Linear, num_tokens: int) -> None:
    """Prevents: a product without a derivative taken in training, or under `no_grad` beside it."""
    x = torch.randn(num_tokens, 48)
    torch.nn.functional.linear(x, layer.weight, layer.bias).square().sum().backward()
    assert layer.weight.grad is not None
    wanted, layer.weight.grad = layer.weight.grad.clone(), None
    layer(x).square().sum().backward()
    assert layer.weight.grad.equal(wanted)


@pytest.mark.parametrize("num_tokens", [1, 2, 5, 20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_torchs_own(num_tokens: int, dtype: torch.dtype) -> None:
    """Prevents: float64, in which exactness is proved, rounded to float32 on the way."""
    layer = Linear(48, 80).to(dtype)
    x = torch.randn(num_tokens, 48, dtype=dtype)
    with torch.inference_mode():
        assert layer(x).equal(torch.nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("num_tokens", [1, 5])
def test_autocast_is_obeyed(layer: Linear, num_tokens: int) -> None:
    """Prevents: float32 where the caller asked for bfloat16."""
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(num_tokens, 48)).dtype is torch.bfloat16


def test_a_changed_weight_is_seen_at_once(layer: Linear) -> None:
    """Prevents: a product with what the weight was before an adapter was merged into it."""
    x = torch.randn(5, 48)
    with torch.inference_mode():
        before = layer(x)
    with torch.no_grad():
        layer.weight.mul_(2)
    with torch.inference_mode():
        after = layer(x)
    assert not after.equal(before)
    torch.testing.assert_close(after.double(), expected(layer, x), rtol=0, atol=1e-5)


def test_is_torchs_own_to_everybody_else(layer: Linear) -> None:
    """Prevents: tools that look for `nn.Linear` (PEFT, tensor parallel) passing it by."""
    assert isinstance(layer, nn.Linear)
    assert list(layer.state_dict()) == list(nn.Linear(48, 80, layer.bias is not None).state_dict())
