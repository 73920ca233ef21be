"""The path that a scan of a mixer takes on a GPU, in words: how sequences are split, and what their state passes compute."""

import torch

from fused.ops.selective_scan.inputs import ScanInputs, has_moments
from fused.ops.selective_scan.kernel_source import SOFTPLUS_BY_CALLER
from fused.ops.selective_scan.schedule import make_schedule


def path_of(B: int, L: int, E: int, dtype: torch.dtype, processors: int, *, gradients: bool = False, N: int = 16) -> str:
    """Return the path of both directions over B clips of L tokens and E channels on a GPU with `processors` multiprocessors.

    `launch.forward` decides the same way; `ScanOutputs.by_moments` and `StatePassing.exits` say what a call has done.
    """
    plan = make_schedule(B, L, E, N, 2, processors)
    stream, row, A = (torch.empty(size, dtype=dtype, device="meta") for size in ((B, L, E), (B, L, N), (E, N)))
    u = delta = [stream] * 2
    none = [None] * 2
    s = ScanInputs((False, True), u, delta, [A] * 2, [row] * 2, [row] * 2, none, none, stream, SOFTPLUS_BY_CALLER)
    by_moments = not gradients and has_moments(s, plan)
    splits = plan.moments_schedule if by_moments and plan.moments_schedule else plan.fwd_schedule
    num_split = splits.num_sequences - splits.num_unsplit
    if not num_split:
        return "not split"
    of = "" if not splits.num_unsplit else f" of {num_split} of {splits.num_sequences} sequences"
    how = "by moments, which may exit" if by_moments else "exact"
    return f"{splits.num_splits} splits{of}, state passes {how}"
