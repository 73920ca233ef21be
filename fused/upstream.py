"""mamba-ssm and causal-conv1d behind this package's signatures: channel-last tokens, both directions, states returned.

Nothing is imported before the first call. Upstream's layout is (B, channels, L) with the tokens contiguous and its
directions are one, so that a transposed copy and, for `reverse`, a flip before and after belong to each call.
Upstream carries no state into a call and ignores the gradient of the state that leaves the scan: the first is refused
by `backends.check_abilities`, the second here, in the backward. Written against mamba-ssm 2.3.2 and causal-conv1d 1.7.
"""

from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


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
    reverse: bool = False,
) -> tuple[Float[Tensor, "B L E"], Float[Tensor, "B E N"]]:
    """mamba-ssm's CUDA scan. It wants u, delta, B, C and z in one dtype, u's, and A, D and delta_bias in float32.

    Raises RuntimeError in the backward if a gradient arrives at the final state.
    """
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def tokens(x: Tensor | None) -> Tensor | None:  # (B, L, ...) -> (B, ..., L), the tokens contiguous
        if x is None:
            return None
        return (x.flip(1) if reverse else x).to(u.dtype).movedim(1, -1).contiguous()

    def wide(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.float()

    y, state = selective_scan_fn(
        tokens(u),
        tokens(delta),
        A.float(),
        tokens(B),
        tokens(C),
        wide(D),
        z=tokens(z),
        delta_bias=wide(delta_bias),
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
    reverse: bool = False,
) -> tuple[Float[Tensor, "B L E"], Float[Tensor, "B E S"]]:
    """causal-conv1d's CUDA convolution, for K of 2 to 4; weight and bias may have another dtype than x, as there.

    The final state is a slice of x, so gradients do flow from it.
    """
    from causal_conv1d import causal_conv1d_fn

    beyond = weight.shape[1] - 1
    if not 1 <= beyond <= 3:
        raise ValueError(f"causal_conv1d: mamba_ssm has K of 2 to 4 only, got K={beyond + 1}; use backend='torch'")
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
    """mamba-ssm's Triton kernel for both kinds of norm."""
    from mamba_ssm.ops.triton.layer_norm import layer_norm_fn, rms_norm_fn

    run = rms_norm_fn if kind == "rms" else layer_norm_fn
    return run(x, weight, bias, residual=residual, eps=eps, prenorm=prenorm, residual_in_fp32=residual_in_fp32)


@runtime_checkable
class Mixer(Protocol):
    """What `mamba_inner` reads of a mixer; a backward direction has the same with `_b` (and `A_b_log`)."""

    conv1d: nn.Conv1d
    x_proj: nn.Linear
    dt_proj: nn.Linear
    A_log: Tensor
    D: Tensor
    out_proj: nn.Linear


def mamba_inner(xz: Float[Tensor, "B L E2"], mixer: Mixer) -> Float[Tensor, "B L D"]:
    """Everything of a mixer after in_proj by mamba-ssm's `mamba_inner_fn`, once per direction, outputs added.

    The backward direction runs if the mixer has one, on flipped tokens. out_proj's bias is added once.
    """
    from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn

    def one(tokens: Tensor, suffix: str, out_bias: Tensor | None) -> Tensor:
        conv, x_proj, dt_proj = (getattr(mixer, name + suffix) for name in ("conv1d", "x_proj", "dt_proj"))
        A_log = getattr(mixer, "A_b_log" if suffix else "A_log")
        return mamba_inner_fn(
            tokens,
            conv.weight,
            conv.bias,
            x_proj.weight,
            dt_proj.weight,
            mixer.out_proj.weight,
            out_bias,
            -torch.exp(A_log.float()),
            D=getattr(mixer, "D" + suffix).float(),
            delta_bias=dt_proj.bias.float(),
            delta_softplus=True,
        )

    tokens = xz.transpose(1, 2).contiguous()
    out = one(tokens, "", mixer.out_proj.bias)
    return out + one(tokens.flip(-1), "_b", None).flip(1) if hasattr(mixer, "A_b_log") else out


def _channel_last(line: Tensor) -> bool:
    """Whether causal-conv1d's channel-last kernel takes this (B, E, L) as it lies: vectors of 8 channels, aligned."""
    batch, channel, token = line.stride()
    return channel == 1 and token > 1 and line.shape[1] % 8 == token % 8 == batch % 8 == 0


class _NoGradient(torch.autograd.Function):
    """Identity that refuses a gradient rather than losing it."""

    @staticmethod
    def forward(ctx, state: Tensor) -> Tensor:
        return state.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        raise RuntimeError("mamba_ssm ignores the gradient of the scan's final state: detach the state, or use backend='torch'")
