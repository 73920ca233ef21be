"""The norm with its parameters, and stochastic depth."""

from typing import Any

import torch
from torch import Tensor, nn

from fused.ops.add_norm import api
from fused.ops.add_norm.cpu import add_norm_cpu
from fused.ops.add_norm.eager import add_norm_eager


class Norm(nn.Module):
    """RMSNorm ("rms", no bias and no `bias` key) or LayerNorm ("layer") over `fused.add_norm`."""

    bias: nn.Parameter | None

    def __init__(self, dim: int, eps: float = 1e-5, kind: str = "rms") -> None:
        super().__init__()
        self.eps, self.kind = eps, kind
        self.weight = nn.Parameter(torch.ones(dim))
        self.register_parameter("bias", nn.Parameter(torch.zeros(dim)) if kind == "layer" else None)

    def forward(
        self, x: Tensor, backend: str = "auto", residual: Tensor | None = None, *, prenorm: bool = False,
        residual_in_fp32: bool = True, kept: Tensor | None = None, scale: float = 1.0,
    ) -> Any:  # fmt: skip
        """Return `add_norm` of x (..., D) and residual with this module's parameters; without a residual, the normalised x.

        With `prenorm` the result, which a hook also sees, is a pair with the sum. A model resolves its backend once a forward.
        The operator of "native", "cpu" or "torch" is then called directly. `kept` and `scale` are of `DropPath.draw`, for
        "native".
        """
        options: dict[str, Any] = {
            "residual": residual, "eps": self.eps, "kind": self.kind, "prenorm": prenorm, "residual_in_fp32": residual_in_fp32
        }  # fmt: skip
        if backend in ("native", "native_kept"):
            from fused.ops.add_norm.native import add_norm_native

            return add_norm_native(x, self.weight, self.bias, **options, kept=kept, scale=scale)
        if backend == "cpu":
            return add_norm_cpu(x, self.weight, self.bias, **options)
        if backend == "torch":
            return add_norm_eager(x, self.weight, self.bias, **options)
        return api.add_norm(x, self.weight, self.bias, **options, backend=backend)


class DropPath(nn.Module):
    """Stochastic depth: in training, a clip's branch is dropped with probability `rate`, and the others are scaled up."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Return x (B, ...) with dropped and scaled clips; x itself outside of training."""
        if self.rate == 0 or not self.training:
            return x
        kept, scale = self.draw(x)
        kept = kept.to(x.dtype).view(-1, *(1,) * (x.dim() - 1))
        return torch.addcmul(x.new_zeros(()), x, kept, value=scale)  # x * kept * scale in one pass, rounded once

    def draw(self, x: Tensor) -> tuple[Tensor, float]:
        """Return 0 or 1 for each clip of x (B, ...), in float32 (B,), and the scale of those that are kept."""
        keep = 1 - self.rate
        return torch.empty(x.shape[:1], dtype=torch.float32, device=x.device).bernoulli_(keep), 1 / keep
