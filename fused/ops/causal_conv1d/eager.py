"""The causal convolution in PyTorch operations, for any device: one multiply-add of the whole sequence for each weight."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused.runtime.autocast import no_autocast
from fused.runtime.dtypes import accumulation_dtype
from fused.runtime.elementwise import by_vectors, cast, empty_vectors, silu_in_place
from fused.runtime.exporting import is_exporting
from fused.runtime.library import wants_gradients


def causal_conv1d_eager(
    x: Float[Tensor, "B L E"],
    weight: Float[Tensor, "E K"],
    bias: Float[Tensor, " E"] | None = None,
    *,
    activation: str | None = "silu",
    initial_state: Float[Tensor, "B E S"] | None = None,
    reverse: bool = False,
) -> tuple[Float[Tensor, "B L E"], Float[Tensor, "B E S"]]:
    """Convolve as `fused.causal_conv1d` says; no argument is checked."""
    silu = activation is not None
    if is_exporting():
        return exported(x, weight, bias, initial_state, silu, reverse)
    rows = None if bias is None else bias.unsqueeze(0)
    y, state = _run(x, weight.unsqueeze(0), rows, initial_state, silu, (reverse,))
    return y[0].flip(1) if reverse else y[0], state


def convolve_both_directions(
    x: Float[Tensor, "B L E"], weight: Float[Tensor, "2 E K"], bias: Float[Tensor, "2 E"] | None
) -> Float[Tensor, "2 B L E"]:
    """Return silu(conv(x)) forwards and, in the order of its scan, from token L-1 to 0, backwards."""
    if is_exporting():
        biases = (None, None) if bias is None else bias.unbind()
        y, backward = (exported(x, w, b, None, True, r)[0] for w, b, r in zip(weight, biases, (False, True), strict=True))
        return torch.stack((y, backward.flip(1)))
    return _run(x, weight, bias, None, True, (False, True))[0]


def _run(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, silu: bool, reverse: tuple[bool, ...]
) -> tuple[Tensor, Tensor]:
    arguments = (x, weight, bias, initial_state, silu, reverse)
    return _CausalConv1d.apply(*arguments) if wants_gradients(*arguments[:4]) else _forward(*arguments)


class _CausalConv1d(torch.autograd.Function):
    """Autograd of `_forward`: it saves the inputs, and the backward computes the pre-activation again."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        *tensors, ctx.silu, ctx.reverse = arguments
        ctx.save_for_backward(*tensors)
        return _forward(*arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, initial_state = ctx.saved_tensors
        length, reverse = x.shape[1], ctx.reverse
        with no_autocast(x.device):
            padded = _pad(x, initial_state, weight.shape[2] - 1, reverse)
            rows, dbias = _rows(weight, padded.dtype), None
            dpadded, drows = torch.zeros_like(padded), torch.zeros_like(rows)
            if dy is not None:
                if ctx.silu:
                    y = _weighted_sum(padded, length, rows, bias)
                    dy = by_vectors(torch.ops.aten.silu_backward, _empty_vectors_like(y).copy_(dy), y)
                else:
                    dy = dy.to(padded.dtype)
                for k, row in enumerate(rows):
                    dpadded[:, :, k : k + length].addcmul_(row, dy)
                    torch.sum(dy * padded[:, :, k : k + length], (1, 2), keepdim=True, out=drows[k])
                dbias = dy.sum((1, 2))
            if dstate is not None:
                final = dstate.transpose(1, 2)
                dpadded[0, :, length:] += final.flip(1) if reverse[0] else final
            first = padded.shape[2] - length
            dx, *others = (d.flip(1) if r else d for d, r in zip(dpadded[:, :, first:], reverse, strict=True))
            for other in others:
                dx += other
            dinitial = dpadded[0, :, :first].flip(1) if reverse[0] else dpadded[0, :, :first]
            return (
                dx.to(x.dtype),
                drows[:, :, 0, 0].permute(1, 2, 0).to(weight.dtype),
                None if bias is None or dbias is None else dbias.to(bias.dtype),
                None if initial_state is None else dinitial.transpose(1, 2).to(initial_state.dtype),
                None,
                None,
            )


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, silu: bool, reverse: tuple[bool, ...]
) -> tuple[Tensor, Tensor]:
    """Return y (D, B, L, E) of D directions, each in the order of its scan, and the first's final state (B, E, K-1).

    x is (B, L, E), weight (D, E, K), bias (D, E), initial_state (B, E, K-1), which only one direction can have.
    """
    with no_autocast(x.device):
        padded = _pad(x, initial_state, weight.shape[2] - 1, reverse)
        final = padded[0, :, x.shape[1] :]
        state = (final.flip(1) if reverse[0] else final).transpose(1, 2)
        y = _weighted_sum(padded, x.shape[1], _rows(weight, padded.dtype), bias)
        y = silu_in_place(y) if silu else y
        return cast(y, x.dtype), state.to(x.dtype, copy=True, memory_format=torch.contiguous_format)


def exported(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Return (y, final state) as `causal_conv1d_eager` does, by a graph of pure functions, for `torch.export` and ONNX."""
    dtype = accumulation_dtype(x.dtype)
    with no_autocast(x.device):
        beyond = weight.shape[1] - 1
        inside = x.to(dtype).transpose(1, 2)
        edge = inside.new_zeros(*inside.shape[:2], beyond) if initial_state is None else initial_state.to(x.dtype).to(dtype)
        padded = torch.cat((inside, edge) if reverse else (edge, inside), dim=2)
        w = weight.to(dtype).flip(1) if reverse else weight.to(dtype)
        y = F.conv1d(padded, w.unsqueeze(1), None if bias is None else bias.to(dtype), groups=x.shape[2])
        y = F.silu(y) if silu else y
        final = padded[:, :, :beyond] if reverse else padded[:, :, x.shape[1] :]
        return y.transpose(1, 2).to(x.dtype), final.to(x.dtype)


def _pad(x: Tensor, state: Tensor | None, beyond: int, reverse: tuple[bool, ...]) -> Tensor:
    """Return x (B, L, E) behind the K-1 inputs before it, in the order of every scan, (D, B, K-1+L, E), in at least float32."""
    length = x.shape[1]
    shape = (len(reverse), x.shape[0], beyond + length, x.shape[2])
    padded = torch.empty(shape, dtype=accumulation_dtype(x.dtype), device=x.device)
    edge = padded[:, :, :beyond]
    if state is None:
        edge.zero_()
    else:
        before = state.transpose(1, 2).to(x.dtype)
        edge.copy_(before.flip(1) if reverse[0] else before)
    for sequence, r in zip(padded[:, :, beyond:], reverse, strict=True):
        sequence.copy_(x.flip(1) if r else x)
    return padded


def _rows(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weights (D, E, K) as contiguous rows (K, D, 1, 1, E)."""
    return weight.to(dtype).permute(2, 0, 1).contiguous()[:, :, None, None]


def _weighted_sum(padded: Tensor, length: int, rows: Tensor, bias: Tensor | None) -> Tensor:
    """Return the pre-activation (D, B, L, E) of padded (D, B, K-1+L, E), rows (K, D, 1, 1, E) and bias (D, E)."""
    if torch.compiler.is_compiling():  # PyTorch 2.11's loses the gradients of a result that is written in place
        y = padded[:, :, :length] * rows[0]
        y = y if bias is None else y + bias[:, None, None]
        for k, row in enumerate(rows[1:], 1):
            y = torch.addcmul(y, padded[:, :, k : k + length], row)
        return y
    y = _empty_vectors_like(padded[:, :, :length])
    torch.mul(padded[:, :, :length], rows[0], out=y)
    if bias is not None:
        y += bias[:, None, None]
    for k, row in enumerate(rows[1:], 1):
        y.addcmul_(padded[:, :, k : k + length], row)
    return y


def _empty_vectors_like(x: Tensor) -> Tensor:
    return empty_vectors(x.shape, dtype=x.dtype, device=x.device)
