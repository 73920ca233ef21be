"""Adapters of mamba-ssm and causal-conv1d to this package's signatures: channel-last tokens, both directions, states returned.

Nothing is imported before the first call. Upstream's layout is (B, channels, L) with contiguous tokens, and it scans from the
first token only. Every call of an operator therefore makes a transposed copy and, for `reverse`, flips before and after; a
mixer has that layout from its first product on. Upstream carries no state into a call and ignores the gradient of the state
that leaves the scan: the first is refused by `backends.check_abilities`, the second here, in the backward. Written against
mamba-ssm 2.3.2 and causal-conv1d 1.7.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fused.ops.shapes import DirectionWeights


def selective_scan(
    u: Float[Tensor, "B L E"],
    delta: Float[Tensor, "B L E"],
    A: Float[Tensor, "E N"],
    B: Float[Tensor, "B L *G N"],
    C: Float[Tensor, "B L *G N"],
    D: Float[Tensor, " E"] | None = None,
    z: Float[Tensor, "B L E"] | None = None,
    delta_bias: Float[Tensor, " E"] | None = None,
    *,
    softplus: bool = True,
    initial_state: None = None,
    reverse: bool = False,
) -> tuple[Float[Tensor, "B L E"], Float[Tensor, "B E N"]]:
    """Scan by mamba-ssm's CUDA kernel. It takes u, delta, B, C and z in one dtype, u's, and A, D and delta_bias in float32.

    It takes no initial state (`BACKENDS` says so). Raises RuntimeError in the backward if a gradient arrives at the final
    state.
    """
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def tokens(x: Tensor | None) -> Tensor | None:  # (B, L, ...) -> (B, ..., L), the tokens contiguous
        if x is None:
            return None
        return (x.flip(1) if reverse else x).to(u.dtype).movedim(1, -1).contiguous()

    def as_float32(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.float()

    y, state = selective_scan_fn(
        tokens(u),
        tokens(delta),
        A.float(),
        tokens(B),
        tokens(C),
        as_float32(D),
        z=tokens(z),
        delta_bias=as_float32(delta_bias),
        delta_softplus=softplus,
        return_last_state=True,
    )
    y = y.transpose(1, 2)
    return y.flip(1) if reverse else y, _NoGradient.apply(state)


def causal_conv1d(
    x: Float[Tensor, "B L E"],
    weight: Float[Tensor, "E K"],
    bias: Float[Tensor, " E"] | None = None,
    *,
    activation: str | None = "silu",
    initial_state: None = None,
    reverse: bool = False,
) -> tuple[Float[Tensor, "B L E"], Float[Tensor, "B E S"]]:
    """Convolve by causal-conv1d's CUDA kernel, for K of 2 to 4; weight and bias may have another dtype than x, as there.

    The final state is a slice of x, so gradients do flow from it.
    """
    from causal_conv1d import causal_conv1d_fn

    beyond = weight.shape[1] - 1
    _check_width(beyond + 1)
    if reverse:
        state = F.pad(x[:, :beyond], (0, 0, 0, max(0, beyond - x.shape[1])))
    else:
        state = F.pad(x, (0, 0, max(0, beyond - x.shape[1]), 0))[:, -beyond:]
    line = (x.flip(1) if reverse else x).transpose(1, 2)
    if not _channel_last(line):
        line = line.contiguous()
    y = causal_conv1d_fn(line, weight.contiguous(), bias, activation=activation).transpose(1, 2)
    return y.flip(1) if reverse else y, state.transpose(1, 2)


def add_norm(
    x: Float[Tensor, "*B D"],
    weight: Float[Tensor, " D"],
    bias: Float[Tensor, " D"] | None = None,
    *,
    residual: Float[Tensor, "*B D"] | None = None,
    eps: float = 1e-5,
    kind: str = "rms",
    prenorm: bool = True,
    residual_in_fp32: bool = True,
) -> Float[Tensor, "*B D"] | tuple[Float[Tensor, "*B D"], Float[Tensor, "*B D"]]:
    """Add and normalise by mamba-ssm's Triton kernel, which has both kinds of norm."""
    from mamba_ssm.ops.triton.layer_norm import layer_norm_fn, rms_norm_fn

    run = rms_norm_fn if kind == "rms" else layer_norm_fn
    return run(x, weight, bias, residual=residual, eps=eps, prenorm=prenorm, residual_in_fp32=residual_in_fp32)


def mamba_mixer(
    hidden: Float[Tensor, "B L D"], in_proj: nn.Linear, out_proj: nn.Linear, directions: Sequence[DirectionWeights], *,
    inner: bool,
) -> Float[Tensor, "B L D"]:  # fmt: skip
    """Run a mixer as mamba-ssm's own module does, with tokens contiguous from in_proj's product on.

    With `inner`, run `mamba_inner_fn` once per direction and add the outputs; else causal-conv1d, matrix products and the scan,
    and one out_proj. A second direction runs on flipped tokens. A of the directions is log(-A). out_proj's bias is added once.
    """
    xz = _matmul_channels_first(in_proj.weight, in_proj.bias, hidden.flatten(0, 1), hidden.shape[0])
    first, *second = directions
    if inner:
        out = _inner(xz, first, out_proj.weight)
        for weights in second:
            out = out + _inner(xz.flip(-1), weights, out_proj.weight).flip(1)
        return out if out_proj.bias is None else out + out_proj.bias.to(out.dtype)  # mamba_inner_fn gives its gradient wrongly
    y = _separate(xz, first)
    for weights in second:
        y = y + _separate(xz.flip(-1), weights).flip(-1)
    return out_proj(y.transpose(1, 2))


def _matmul_channels_first(weight: Tensor, bias: Tensor | None, rows: Tensor, clips: int) -> Tensor:
    """Return rows (clips * L, in) times weight (out, in) as (clips, out, L), in memory (out, clips, L)."""
    product = weight @ rows.t()
    if bias is not None:
        product = product + bias.to(product.dtype)[:, None]
    return product.unflatten(1, (clips, -1)).transpose(0, 1)


def _inner(xz: Tensor, weights: DirectionWeights, out_proj: Tensor) -> Tensor:
    """Return a direction's out (B, L, D) of xz (B, 2E, L) by `mamba_inner_fn`."""
    from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn

    return mamba_inner_fn(
        xz, weights.conv.unsqueeze(1), weights.conv_bias, weights.x_proj, weights.dt_proj, out_proj, None,
        -torch.exp(weights.A.float()), D=weights.D.float(), delta_bias=weights.dt_bias.float(), delta_softplus=True,
    )  # fmt: skip


def _separate(xz: Tensor, weights: DirectionWeights) -> Tensor:
    """Return a direction's gated y (B, E, L) of xz (B, 2E, L) by causal-conv1d, matrix products and the scan."""
    from causal_conv1d import causal_conv1d_fn
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    x, z = xz.chunk(2, dim=1)
    _check_width(weights.conv.shape[1])
    c = causal_conv1d_fn(x, weights.conv, weights.conv_bias, activation="silu")
    (R, N), clips = (weights.dt_proj.shape[1], weights.A.shape[1]), len(c)
    dt, *B_C = F.linear(c.transpose(1, 2).flatten(0, 1), weights.x_proj).split((R, N, N), dim=-1)
    delta = _matmul_channels_first(weights.dt_proj, None, dt, clips)
    B, C = (m.unflatten(0, (clips, -1)).transpose(1, 2).to(c.dtype).contiguous() for m in B_C)
    A, D = -torch.exp(weights.A.float()), weights.D.float()
    return selective_scan_fn(c, delta.to(c.dtype), A, B, C, D, z=z, delta_bias=weights.dt_bias.float(), delta_softplus=True)


def _check_width(K: int) -> None:
    if not 2 <= K <= 4:
        raise ValueError(f"causal_conv1d: mamba_ssm has K of 2 to 4 only, got K={K}; use backend='torch'")


def _channel_last(line: Tensor) -> bool:
    """Return whether causal-conv1d's channel-last kernel can read this (B, E, L) in place: aligned vectors of 8 channels."""
    batch, channel, token = line.stride()
    return channel == 1 and token > 1 and line.shape[1] % 8 == token % 8 == batch % 8 == 0


class _NoGradient(torch.autograd.Function):
    """An identity whose backward raises: upstream would drop the gradient."""

    @staticmethod
    def forward(ctx: Any, state: Tensor) -> Tensor:
        return state.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError("mamba_ssm ignores the gradient of the scan's final state: detach the state, or use backend='torch'")
