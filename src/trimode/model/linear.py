"""The linear layer of the network: torch's own, with quicker products for inference on the CPU.

Nothing is packed and nothing is held twice; only the order in which a product is summed differs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
        weight, bias = self.weight, self.bias
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
        and type(weight) is nn.Parameter  # not a DTensor
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()  # inductor knows nn.Linear's product, not these
    )
