"""The scan of Mamba-2 (SSD): a linear recurrence with one decay for all states of a head.

    d_t = clamp(softplus(dt_t + dt_bias), *dt_limit)
    S_t = exp(d_t * A) * S_{t-1} + d_t * x_t B_t^T
    y_t = (S_t C_t + D * x_t) * silu(z_t)

B batch, L tokens, H heads, P channels of a head, N states of a channel, G groups of heads that share B and C.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from fused import backends
from fused.backends import NATIVE, TORCH, Abilities
from fused.ops.seq_idx import check_seq_idx
from fused.ops.ssd import mamba_ssm
from fused.ops.ssd.eager import ssd_eager
from fused.runtime.checks import check_tensor
from fused.runtime.dtypes import KERNEL_DTYPES

BACKENDS = {
    "native": NATIVE,
    "mamba_ssm": Abilities(True, True, True, True, KERNEL_DTYPES, ("cuda",), fullgraph=False),
    "torch": replace(TORCH, fullgraph=False),
}
"""Abilities of the backends that have this operator."""


def ssd(
    x: Float[Tensor, "B L H P"],
    dt: Float[Tensor, "B L H"],
    A: Float[Tensor, " H"],
    B: Float[Tensor, "B L G N"],
    C: Float[Tensor, "B L G N"],
    D: Float[Tensor, " H"] | Float[Tensor, "H P"] | None = None,
    z: Float[Tensor, "B L H P"] | None = None,
    dt_bias: Float[Tensor, " H"] | None = None,
    *,
    softplus: bool = True,
    dt_limit: Sequence[float | int] = (0.0, math.inf),
    initial_state: Float[Tensor, "B H P N"] | None = None,
    seq_idx: Int[Tensor, "B L"] | None = None,
    reverse: bool = False,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B L H P"], Float[Tensor, "B H P N"]]:
    """Scan `x` along its tokens and return (y, final_state).

    Computes in at least float32 whatever the dtypes of the arguments; y has x's dtype, the state at least float32. Head h uses
    group h // (H // G) of B and C. `seq_idx` numbers the segments of each row, ascending; the state is zero where it changes.
    `initial_state` continues the first segment of each row, whatever its number is (in mamba-ssm only segment 0), and
    `final_state` is that of the last one. `reverse` scans from token L-1 to 0: `initial_state` then enters at the end, and
    `final_state` is the state after token 0. Gradients reach every tensor and flow from both results. A NaN makes NaN of what
    depends on it, and may of the other tokens within 256.

    Raises TypeError or ValueError for an argument that does not fit, ValueError for what the backend cannot do,
    BackendError for a backend that cannot run here.

        >>> x, dt, A = torch.randn(2, 63, 4, 8), torch.randn(2, 63, 4), -torch.rand(4)
        >>> B, C = torch.randn(2, 63, 1, 16), torch.randn(2, 63, 1, 16)
        >>> y, state = ssd(x, dt, A, B, C)
    """
    _check(x, dt, A, B, C, D, z, dt_bias, initial_state)
    dt_limit = check_dt_limit("ssd", dt_limit)
    if seq_idx is not None:
        check_seq_idx("ssd", seq_idx, x.shape[0], x.shape[1], x.device)
    asked = {"initial_state": initial_state is not None, "reverse": reverse, "groups": B.shape[2] > 1}
    backends.check_abilities("ssd", BACKENDS, backend, x.dtype, asked)
    run = implementation(backends.choose(backend, x.device))
    return run(
        x, dt, A, B, C, D, z, dt_bias, softplus=softplus, dt_limit=dt_limit, initial_state=initial_state, seq_idx=seq_idx,
        reverse=reverse,
    )  # fmt: skip


def implementation(backend: str) -> Callable[..., Any]:
    """Return the operator of a concrete backend, without argument checks; its arguments are those above but for `backend`.

    With `final=False` it need not compute the final state.
    """
    operator_backend = backends.operators_of(backend)
    if operator_backend == "native":
        from fused.ops.ssd.native import ssd_native  # Triton is imported where it is used

        return ssd_native
    return mamba_ssm.ssd if operator_backend == "mamba_ssm" else ssd_eager


def check_dt_limit(op: str, dt_limit: object) -> tuple[float, float]:
    """Return the limits as floats. Raises TypeError unless they are a pair of numbers, ValueError unless low <= high."""
    if not isinstance(dt_limit, (tuple, list)) or len(dt_limit) != 2 or not all(isinstance(v, (int, float)) for v in dt_limit):
        raise TypeError(f"{op}: dt_limit must be a pair of numbers (low, high), got {dt_limit!r}")
    low, high = map(float, dt_limit)
    if not low <= high:
        raise ValueError(f"{op}: dt_limit must be (low, high) with low <= high, got {dt_limit!r}")
    return low, high


def _check(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    initial_state: Tensor | None,
) -> None:  # fmt: skip
    op = "ssd"
    check_tensor(op, "x", x, "B L H P", {}, None)
    sizes = dict(zip("BLHP", x.shape, strict=True))
    check_tensor(op, "B", B, "B L G N", sizes, x.device)
    sizes |= {"G": B.shape[2], "N": B.shape[3]}
    for letter, what in (("L", "token"), ("H", "head"), ("P", "channel a head"), ("N", "state a channel")):
        if not sizes[letter]:
            raise ValueError(f"{op}: there must be at least one {what} ({letter}), got x {tuple(x.shape)}, B {tuple(B.shape)}")
    if not sizes["G"] or sizes["H"] % sizes["G"]:
        raise ValueError(f"{op}: the groups of B and C must divide H={sizes['H']}, got G={sizes['G']}")
    for name, tensor, letters in (("dt", dt, "B L H"), ("A", A, "H"), ("C", C, "B L G N")):
        check_tensor(op, name, tensor, letters, sizes, x.device)
    scan = (("dt_bias", dt_bias, "H"), ("initial_state", initial_state, "B H P N"))
    for name, value, letters in (("D", D, "H | H P"), ("z", z, "B L H P"), *scan):
        if value is not None:
            check_tensor(op, name, value, letters, sizes, x.device)
