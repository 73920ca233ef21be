"""The tolerance rule of the project: an operator may be off by twice what the plain loop is off, and by one rounding.

truth = the loop in float64 on the same rounded inputs; plain = the loop in at least float32, every result rounded once.
    |got - truth| <= 2 |plain - truth| + u |truth|
in L2 and in max-abs, errors pooled over seeds; u is the unit roundoff of the dtype returned plus 8 of float32.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Results = dict[str, Tensor]
NORMS = {"L2": lambda x: x.norm(), "max": lambda x: x.abs().max()}


def outcome(op: Callable, tensors: dict[str, Tensor], seeds: list[Tensor], precision: torch.dtype | None) -> Results:
    """Results and gradients of op(**tensors); with `precision`, computed there on upcast copies of the inputs."""
    leaves = {k: v.detach().clone().requires_grad_() for k, v in tensors.items()}
    results = op(**{k: v if precision is None else v.to(precision) for k, v in leaves.items()})
    pairs = [(y, g) for y, g in zip(results, seeds, strict=True) if g is not None]
    grads = torch.autograd.grad([y for y, _ in pairs], list(leaves.values()), [g.to(y.dtype) for y, g in pairs])
    return {f"out{i}": y.detach() for i, y in enumerate(results)} | {f"d{k}": g for k, g in zip(leaves, grads, strict=True)}


def double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.double() for k, v in tensors.items()}


def assert_rule(samples: Iterable[tuple[Results, Results, Results]]) -> None:
    """Each sample is (got, truth, plain); plain is rounded here to the dtypes of got."""
    samples = list(samples)
    for name, first in samples[0][0].items():
        if not first.numel():
            continue
        unit = torch.finfo(first.dtype).eps / 2 + 8 * torch.finfo(torch.float32).eps / 2
        trios = [(got[name].double(), truth[name], plain[name].to(first.dtype).double()) for got, truth, plain in samples]
        for norm, measure in NORMS.items():
            error, plain_error, size = (
                torch.stack([measure(x) for x in xs]).square().mean().sqrt()
                for xs in zip(*((g - t, p - t, t) for g, t, p in trios), strict=True)
            )
            assert torch.isfinite(plain_error), f"{name}: the plain loop is not finite"
            assert error <= 2 * plain_error + unit * size, (
                f"{name}, {norm}: error {error:.3g}, allowed {2 * plain_error + unit * size:.3g}, size {size:.3g}"
            )
        for got, truth, plain in trios:
            zero = (truth == 0) & (plain == 0)
            assert not got[zero].any(), f"{name}: not zero where the truth is"
