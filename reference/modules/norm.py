"""The norm with its parameters, the rule of the residual stream, and stochastic depth."""

from typing import Any

import torch
from torch import Tensor, nn

from reference.ops.add_norm import add_norm
from reference.ops.dtypes import accumulation_dtype


class Norm(nn.Module):
    """RMSNorm (`kind="rms"`) or LayerNorm (`kind="layer"`) over the last dimension; RMSNorm has no `bias` key."""

    bias: nn.Parameter | None

    def __init__(self, dim: int, eps: float = 1e-5, kind: str = "rms") -> None:
        super().__init__()
        self.eps, self.kind = eps, kind
        self.weight = nn.Parameter(torch.ones(dim))
        self.register_parameter("bias", nn.Parameter(torch.zeros(dim)) if kind == "layer" else None)

    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., D) normalised, in x's dtype."""
        return self._add_norm(x, prenorm=False)

    def add(
        self, hidden: Tensor, residual: Tensor | None, *, fused_add_norm: bool = True, residual_in_fp32: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Add hidden (..., D) to the residual stream, normalise the sum, and return both: (normed, new residual).

        This is the one rule of every layer and of the final norm (upstream's Block, with and without `fused_add_norm`):

            fused      normed = norm(residual + hidden), from the sum before it is rounded; the normed value has hidden's dtype
            not fused  the sum is rounded to the dtype of residual + hidden first; the normed value has the weight's dtype

        The new residual is the sum, in at least float32 when `residual_in_fp32`. Without a residual the sum is hidden itself.
        In float32 both ways give the same numbers.
        """
        if fused_add_norm:
            return self._add_norm(hidden, residual=residual, residual_in_fp32=residual_in_fp32)
        total = hidden if residual is None else residual + hidden
        normed = self(total.to(self.weight.dtype))
        return normed, total.to(accumulation_dtype(total.dtype)) if residual_in_fp32 else total

    def _add_norm(self, x: Tensor, **options: Any) -> Any:
        """Call `add_norm` with this module's parameters."""
        return add_norm(x, self.weight, self.bias, eps=self.eps, kind=self.kind, **options)


class DropPath(nn.Module):
    """Stochastic depth: in training, zero a clip's branch with probability `rate` and scale the others by 1 / (1 - rate)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Return x (B, ...), in training with the branches of some clips zeroed."""
        if not self.training or self.rate == 0:
            return x
        kept = torch.empty(x.shape[0], device=x.device).bernoulli_(1 - self.rate)
        keep_mask = kept.view(-1, *[1] * (x.dim() - 1))
        return x * keep_mask.to(x.dtype) / (1 - self.rate)
