"""mamba-ssm and causal-conv1d behind this package's signatures: channel-last tokens, both directions, states returned.

Nothing is imported before the first call. Upstream's layout is (B, channels, L) with the tokens contiguous and its
directions are one, so that a transposed copy and, for `reverse`, a flip before and after belong to each call of an operator;
a whole mixer has that layout from its first product on.
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
    """mamba-ssm's Triton kernel for both kinds of norm."""
    from mamba_ssm.ops.triton.layer_norm import layer_norm_fn, rms_norm_fn

    run = rms_norm_fn if kind == "rms" else layer_norm_fn
    return run(x, weight, bias, residual=residual, eps=eps, prenorm=prenorm, residual_in_fp32=residual_in_fp32)


@runtime_checkable
class Mixer(Protocol):
    """What `mix` reads of a mixer; a backward direction has the same with `_b` (and `A_b_log`), but for the outer two."""

    in_proj: nn.Linear
    conv1d: nn.Conv1d
    x_proj: nn.Linear
    dt_proj: nn.Linear
    A_log: Tensor
    D: Tensor
    out_proj: nn.Linear


def mix(hidden: Float[Tensor, "B L D"], mixer: Mixer, *, inner: bool) -> Float[Tensor, "B L D"]:
    """A mixer as mamba-ssm's own module runs it, with the tokens contiguous from in_proj's product on: nothing is transposed.

    With `inner` by `mamba_inner_fn`, once per direction, outputs added; else by causal-conv1d, products and the scan, and one
    out_proj. The backward direction runs if the mixer has one, on flipped tokens. out_proj's bias is added once.
    """
    xz = _tokens_contiguous(mixer.in_proj, hidden.flatten(0, 1), hidden.shape[0])
    both = hasattr(mixer, "A_b_log")
    if inner:
        out = _inner(xz, mixer, "")
        out = out + _inner(xz.flip(-1), mixer, "_b").flip(1) if both else out
        bias = mixer.out_proj.bias  # its gradient by mamba_inner_fn is a single number
        return out if bias is None else out + bias.to(out.dtype)
    y = _separate(xz, mixer, "")
    y = y + _separate(xz.flip(-1), mixer, "_b").flip(-1) if both else y
    return mixer.out_proj(y.transpose(1, 2))


def _tokens_contiguous(linear: nn.Linear, rows: Tensor, clips: int, bias: bool = True) -> Tensor:
    """(clips, out, L) of rows (clips * L, in), in memory (out, clips, L)."""
    product = linear.weight @ rows.t()
    if bias and linear.bias is not None:
        product = product + linear.bias.to(product.dtype)[:, None]
    return product.unflatten(1, (clips, -1)).transpose(0, 1)


def _own(mixer: Mixer, suffix: str) -> tuple[nn.Conv1d, nn.Linear, nn.Linear, Tensor, Tensor]:
    conv, x_proj, dt_proj, D = (getattr(mixer, name + suffix) for name in ("conv1d", "x_proj", "dt_proj", "D"))
    return conv, x_proj, dt_proj, -torch.exp(getattr(mixer, "A_b_log" if suffix else "A_log").float()), D.float()


def _inner(xz: Tensor, mixer: Mixer, suffix: str) -> Tensor:
    from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn

    conv, x_proj, dt_proj, A, D = _own(mixer, suffix)
    return mamba_inner_fn(
        xz, conv.weight, conv.bias, x_proj.weight, dt_proj.weight, mixer.out_proj.weight, None, A,
        D=D, delta_bias=dt_proj.bias.float(), delta_softplus=True,
    )  # fmt: skip


def _separate(xz: Tensor, mixer: Mixer, suffix: str) -> Tensor:
    from causal_conv1d import causal_conv1d_fn
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    conv, x_proj, dt_proj, A, D = _own(mixer, suffix)
    x, z = xz.chunk(2, dim=1)
    _check_width(conv.weight.shape[-1])
    c = causal_conv1d_fn(x, conv.weight.squeeze(1), conv.bias, activation="silu")
    N, clips = A.shape[1], len(c)
    dt, *mixes = x_proj(c.transpose(1, 2).flatten(0, 1)).split((dt_proj.in_features, N, N), dim=-1)
    delta = _tokens_contiguous(dt_proj, dt, clips, bias=False)
    B, C = (m.unflatten(0, (clips, -1)).transpose(1, 2).to(c.dtype).contiguous() for m in mixes)
    return selective_scan_fn(c, delta.to(c.dtype), A, B, C, D, z=z, delta_bias=dt_proj.bias.float(), delta_softplus=True)


def _check_width(K: int) -> None:
    if not 2 <= K <= 4:
        raise ValueError(f"causal_conv1d: mamba_ssm has K of 2 to 4 only, got K={K}; use backend='torch'")


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
