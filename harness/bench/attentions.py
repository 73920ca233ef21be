"""Measurement of the kernels for softmax attention; the ViT gets the fastest of the box."""

import statistics

import torch

from harness.baselines import attention
from harness.bench.clock import Call, Clock


def measure_attentions(device: str, dtype: str) -> dict[str, float]:
    """Return the seconds of one attention, forward and backward, by every kernel that can be pinned here.

    Only where none can, it is PyTorch's choice, which may be another under parity's settings than under the clock.
    """
    clock, found = Clock(device), {}
    heads, length = (12, 12545) if device.startswith("cuda") else (3, 257)
    q, k, v = (torch.randn(1, heads, length, 64, device=device, dtype=getattr(torch, dtype), requires_grad=True) for _ in "qkv")
    present = [k for k in attention.PINNED if not attention.unavailable(k, device) and q.dtype in attention.dtypes(k)]
    for kind in present or ["sdpa"]:

        def step(kind: str = kind) -> object:
            with attention.only(kind, q.device):
                return torch.autograd.grad(attention.attend(q, k, v, kind).sum(), (q, k, v))

        clock.warm(Call(step), 3)
        found[kind] = statistics.median(clock.time(Call(step)) for _ in range(7))
    return found
