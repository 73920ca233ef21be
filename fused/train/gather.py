"""The features of all processes, with gradients, for losses that compare every clip with every other."""

import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    """All processes' rows in the order of ranks; backward takes the gradient of this process's rows."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, summed: bool) -> Tensor:
        size, start = dist.get_world_size(), dist.get_rank() * len(x)
        ctx.summed, ctx.own = summed and size > 1, slice(start, start + len(x))  # type: ignore[attr-defined]
        parts = [torch.empty_like(x) for _ in range(size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous()
        if ctx.summed:  # type: ignore[attr-defined]
            gradient = gradient.clone()
            dist.all_reduce(gradient)
        return gradient[ctx.own], None  # type: ignore[attr-defined]


def gather(x: Tensor, kind: str = "exact") -> Tensor:
    """Return the rows of all processes, (W B, ...) of (B, ...) in each, in the order of ranks; without a group x itself.

    Every process has as many rows, and computes the same loss of all. Where gradients of parameters are averaged over processes
    afterwards, "exact" makes them those of one process with the whole batch: a row's gradient is the sum over the losses of all
    processes. "upstream" takes that of the own loss, so that the average is divided by W once more, as in upstream's training.
    """
    return _Gather.apply(x, kind == "exact") if dist.is_initialized() else x  # type: ignore[no-any-return]
