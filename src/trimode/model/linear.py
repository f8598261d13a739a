"""The linear layer of the network: torch's own, with quicker products for inference on the CPU.

Nothing is packed and nothing is held twice; only the order in which a product is summed differs.
A weight that is shared out over ranks is a DTensor, which says what lies where; see `model.shares`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

SMALL_WEIGHT = 2**20
"""Elements up to which a weight is small; see `Linear`."""


class Linear(nn.Linear):
    """`y = x W^T + b`. Same parameters and results as `nn.Linear`, but for the last bits.

    In inference mode, in float32 on the CPU, MKL's `x W^T` is avoided: for a few tokens it reads
    the weights at a third of the memory's speed. `W x^T` reads them at full speed for two tokens,
    so one is fed as two, and it wins up to eight where the weight is small. oneDNN's product
    takes the rest. Measured on AMD EPYC; no path is needed for a right result.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out]."""
        if isinstance(self.weight, DTensor) and not isinstance(x, DTensor):
            return times_share(x, self.weight, self.bias)
        return _times(x, self.weight, self.bias)


def times_share(x: Tensor, weight: DTensor, bias: Tensor | None = None) -> Tensor:
    """`y = x W^T + b` on a rank that holds a part of W; for inference, nothing goes backward.

    DTensor's own product gives the same, but takes 0.16 ms of the host to find out what is known
    here: 36 ms per forward of 32 layers, several times what a GPU needs for its part.

    Args:
        x: [..., in], whole; [..., in / ranks] if the weight is cut along its inputs.
        weight: [out, in], cut along one of the two.
        bias: Cut as the outputs are.

    Returns:
        [..., out / ranks]; if the weight is cut along its inputs [..., out], the sum over ranks.
    """
    part = weight.to_local()
    if weight.placements[0].is_shard(0):
        return _times(x, part, bias.to_local() if isinstance(bias, DTensor) else bias)
    output = _times(x, part, None).contiguous()
    dist.all_reduce(output, group=weight.device_mesh.get_group())
    return output if bias is None else output + bias


def _times(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not (torch.is_inference_mode_enabled() and _is_plain(x, weight)):
        return F.linear(x, weight, bias)
    num_tokens = x.shape[0] if x.ndim == 2 else 0
    if 0 < num_tokens <= (8 if weight.numel() <= SMALL_WEIGHT else 2):
        # A transposed x would make the product the slow one again.
        rows = torch.cat((x, x)) if num_tokens == 1 else x.contiguous()
        output = torch.mm(weight, rows.t())
        output = output[:, :1].t() if num_tokens == 1 else output.t().contiguous()
        return output if bias is None else output + bias
    if not torch.backends.mkldnn.is_available():
        return F.linear(x, weight, bias)
    output = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return output


def _is_plain(x: Tensor, weight: Tensor) -> bool:
    """Whether these are float32 in this process's main memory, to be multiplied here and now."""
    return (
        x.dtype is torch.float32
        and weight.dtype is torch.float32
        and weight.is_cpu
        and type(x) is Tensor
        and type(weight) in (nn.Parameter, Tensor)  # not a DTensor
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()  # inductor knows nn.Linear's product, not these
    )
