"""The selective scan: one linear recurrence per channel and state, with a decay that depends on the token.

    delta_t = softplus(delta_t + delta_bias)
    h_t     = exp(delta_t * A) * h_{t-1} + delta_t * u_t * B_t
    y_t     = (sum_n C_t * h_t + D * u_t) * silu(z_t)

B batch, L tokens, E channels, N states per channel, G groups of channels that share B and C.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fused import backends
from fused.backends import CPU, NATIVE, TORCH, Abilities
from fused.ops import mamba_ssm
from fused.ops.selective_scan.cpu import bidirectional_scan_cpu, selective_scan_cpu
from fused.ops.selective_scan.eager import scan_both_directions, selective_scan_eager
from fused.ops.shapes import Mixing, State, Tokens
from fused.runtime.checks import check_tensor
from fused.runtime.dtypes import KERNEL_DTYPES
from fused.runtime.exporting import is_exporting

Pair = tuple[Tensor, Tensor]
_PAIRED = ("u", "delta", "A", "B", "C", "D", "delta_bias")


BACKENDS = {
    "native": NATIVE,
    "cpu": CPU,
    "mamba_ssm": Abilities(False, False, True, True, KERNEL_DTYPES, ("cuda",)),
    "torch": replace(TORCH, fullgraph=False),
}
"""Abilities of the backends that have this operator."""


def selective_scan(
    u: Tokens,
    delta: Tokens,
    A: Float[Tensor, "E N"],
    B: Mixing,
    C: Mixing,
    D: Float[Tensor, " E"] | None = None,
    z: Tokens | None = None,
    delta_bias: Float[Tensor, " E"] | None = None,
    *,
    softplus: bool = True,
    initial_state: State | None = None,
    reverse: bool = False,
    backend: str = "auto",
) -> tuple[Tokens, State]:
    """Scan `u` along its tokens and return (y, final_state).

    Computes in at least float32 whatever the dtypes of the arguments; y has u's dtype, the state at least float32.
    Channel e uses group e // (E // G) of B and C. `reverse` scans from token L-1 to 0: `initial_state` then enters at
    the end, and `final_state` is the state after token 0. Gradients reach every tensor and flow from both results.

    Raises TypeError or ValueError for an argument that does not fit, ValueError for what the backend cannot do,
    BackendError for a backend that cannot run here.

        >>> u, delta = torch.randn(2, 63, 8), torch.randn(2, 63, 8)
        >>> A, B, C = -torch.rand(8, 4), torch.randn(2, 63, 4), torch.randn(2, 63, 4)
        >>> y, state = selective_scan(u, delta, A, B, C)
    """
    _check(u, delta, A, B, C, D, z, delta_bias, initial_state)
    asked = {"initial_state": initial_state is not None, "reverse": reverse, "groups": B.dim() == 4 or C.dim() == 4}
    backends.check_abilities("selective_scan", BACKENDS, backend, u.dtype, asked)
    run = implementation(backends.choose(backend, u.device))
    return run(u, delta, A, B, C, D, z, delta_bias, softplus=softplus, initial_state=initial_state, reverse=reverse)


def implementation(backend: str) -> Callable[..., Any]:
    """Return the operator of a concrete backend, without argument checks; its arguments are those above but for `backend`."""
    operator_backend = backends.operators_of(backend)
    if operator_backend == "native":
        from fused.ops.selective_scan.native import selective_scan_native  # registers the operator, at its first use

        return selective_scan_native
    if operator_backend == "cpu":
        return selective_scan_cpu
    return mamba_ssm.selective_scan if operator_backend == "mamba_ssm" else selective_scan_eager


def bidirectional_scan(
    u: Pair,
    delta: Pair,
    A: Pair,
    B: Pair,
    C: Pair,
    D: tuple[Tensor | None, Tensor | None] = (None, None),
    z: Tokens | None = None,
    delta_bias: tuple[Tensor | None, Tensor | None] = (None, None),
    *,
    softplus: bool = True,
    backend: str = "auto",
) -> Tokens:
    """Run two scans over the same tokens, the first of every pair from token 0, the second from token L-1, and one gate:

        y = (scan(u[0], delta[0], ...) + scan(u[1], delta[1], ..., reverse=True)) * silu(z)

    Return y (B, L, E) in u's dtype. Shapes, dtypes and errors are those of `selective_scan`, without states. Backends "native"
    and "cpu" run both in one kernel, and "torch" both in one loop.

        >>> u, delta = [(torch.randn(2, 63, 8), torch.randn(2, 63, 8)) for _ in range(2)]
        >>> A, BC = (-torch.rand(8, 4),) * 2, (torch.randn(2, 63, 4),) * 2
        >>> y = bidirectional_scan(u, delta, A, BC, BC)
    """
    directions = [dict(zip(_PAIRED, x, strict=True)) for x in zip(u, delta, A, B, C, D, delta_bias, strict=True)]
    if len(directions) != 2:
        raise ValueError(f"bidirectional_scan: u and all others but z must be pairs, got {len(directions)} of each")
    for direction in directions:
        _check(**direction, z=z, initial_state=None)
    for name, pair in (("u", u), ("A", A)):
        if len({(x.shape, x.dtype, x.device) for x in pair}) > 1:
            shown = (f"{tuple(x.shape)} of {x.dtype} on {x.device}" for x in pair)
            raise ValueError(f"bidirectional_scan: {name} must be alike in both directions, got {' and '.join(shown)}")
    chosen = backends.operators_of(backends.choose(backend, u[0].device))
    if chosen == "native" and all(x.dim() == 3 for x in (*B, *C)):
        from fused.ops.selective_scan.native import bidirectional_scan_native

        backends.check_abilities("selective_scan", BACKENDS, "native", u[0].dtype, {})
        return bidirectional_scan_native(u, delta, A, B, C, D, z, delta_bias, softplus=softplus)
    if chosen == "cpu" and _alike(B, C) and not is_exporting():
        backends.check_abilities("selective_scan", BACKENDS, "cpu", u[0].dtype, {})
        return bidirectional_scan_cpu(u, delta, A, B, C, D, z, delta_bias, softplus=softplus)
    if chosen == "torch" and _alike(delta, B, C, D, delta_bias):
        backends.check_abilities("selective_scan", BACKENDS, "torch", u[0].dtype, {})
        return _scan_both_eager(directions, z, softplus)
    options: dict[str, Any] = {"z": z, "softplus": softplus, "backend": backend}
    forward, backward = directions
    return selective_scan(**forward, **options)[0] + selective_scan(**backward, **options, reverse=True)[0]


def _alike(*pairs: tuple[Tensor | None, Tensor | None]) -> bool:
    """Return whether the tensors of every pair have one shape and one dtype, or are both None."""
    forms = ([None if x is None else (x.shape, x.dtype) for x in pair] for pair in pairs)
    return all(first == second for first, second in forms)


def _scan_both_eager(directions: list[dict[str, Any]], z: Tensor | None, softplus: bool) -> Tensor:
    """Scan both directions in one loop."""
    pairs = {name: tuple(d[name] for d in directions) for name in _PAIRED}
    for name in ("u", "delta", "B", "C"):
        forward, backward = pairs[name]
        pairs[name] = forward, backward.flip(1)
    stacked: dict[str, Any] = {k: None if pair[0] is None else torch.stack(pair) for k, pair in pairs.items()}
    return scan_both_directions(**stacked, z=z, softplus=softplus)


def _check(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None,
    initial_state: Tensor | None,
) -> None:  # fmt: skip
    op = "selective_scan"
    check_tensor(op, "u", u, "B L E", {}, None)
    sizes = dict(zip("BLE", u.shape, strict=True))
    check_tensor(op, "A", A, "E N", sizes, u.device)
    sizes["N"] = A.shape[1]
    if not sizes["N"]:
        raise ValueError(f"{op}: A must have at least one state a channel (N), got {tuple(A.shape)}")
    for name, value, letters in (("delta", delta, "B L E"), ("B", B, "B L N | B L G N"), ("C", C, "B L N | B L G N")):
        check_tensor(op, name, value, letters, sizes, u.device)
    optional = (("D", D, "E"), ("z", z, "B L E"), ("delta_bias", delta_bias, "E"), ("initial_state", initial_state, "B E N"))
    for name, tensor, letters in optional:
        if tensor is not None:
            check_tensor(op, name, tensor, letters, sizes, u.device)
    groups = {name: x.shape[2] for name, x in (("B", B), ("C", C)) if x.dim() == 4}
    for name, count in groups.items():
        if count == 0 or u.shape[2] % count:
            raise ValueError(f"{op}: the groups of {name} must divide E={u.shape[2]}, got G={count}")
    if len(set(groups.values())) > 1:
        raise ValueError(f"{op}: B and C must have the same number of groups, got {groups}")
