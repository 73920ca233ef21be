"""The norm with its parameters, and stochastic depth."""

import torch
from torch import Tensor, nn

from reference.ops.add_norm import add_norm


class Norm(nn.Module):
    """RMSNorm or LayerNorm with the parameters of `add_norm`; RMSNorm has no bias and no `bias` key."""

    bias: nn.Parameter | None

    def __init__(self, dim: int, eps: float = 1e-5, kind: str = "rms") -> None:
        super().__init__()
        self.eps, self.kind = eps, kind
        self.weight = nn.Parameter(torch.ones(dim))
        self.register_parameter("bias", nn.Parameter(torch.zeros(dim)) if kind == "layer" else None)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise without a residual."""
        return self.add(x, None, prenorm=False)

    def add(self, x: Tensor, residual: Tensor | None, *, prenorm: bool = True, residual_in_fp32: bool = True):
        """`add_norm` with this module's weights."""
        return add_norm(
            x, self.weight, self.bias, residual=residual, eps=self.eps, kind=self.kind,
            prenorm=prenorm, residual_in_fp32=residual_in_fp32,
        )  # fmt: skip


class DropPath(nn.Module):
    """Stochastic depth: in training, drop a clip's branch with probability `rate` and scale the others by 1/(1 - rate)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        kept = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) < 1 - self.rate
        return x * kept.to(x.dtype) / (1 - self.rate)
