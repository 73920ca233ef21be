"""The causal convolution in PyTorch operations, for any device: one multiply-add of the whole sequence for each weight."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused.runtime.autocast import no_autocast
from fused.runtime.dtypes import accumulation_dtype
from fused.runtime.elementwise import clipwise
from fused.runtime.exporting import is_exporting


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
    run: Any = exported if is_exporting() else _CausalConv1d.apply
    return run(x, weight, bias, initial_state, activation is not None, reverse)


class _CausalConv1d(torch.autograd.Function):
    """Autograd of the convolution: it saves its inputs, and the backward computes the pre-activation again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, silu: bool, reverse: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.silu, ctx.reverse = silu, reverse
        ctx.save_for_backward(x, weight, bias, initial_state)
        with no_autocast(x.device):
            padded = _pad(x, initial_state, weight.shape[1], reverse)
            state = padded[:, _final_state_rows(x, weight, reverse)].transpose(1, 2)
            y = _weighted_sum(padded, x, weight, bias, reverse)
            y = clipwise(F.silu, y) if silu else y
            return y.to(x.dtype), state.to(x.dtype, copy=True, memory_format=torch.contiguous_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, initial_state = ctx.saved_tensors
        length = x.shape[1]
        with no_autocast(x.device):
            padded = _pad(x, initial_state, weight.shape[1], ctx.reverse)
            w = weight.to(padded.dtype)
            dpadded, dweight, dbias = torch.zeros_like(padded), torch.zeros_like(w), None
            if dy is not None:
                dy = dy.to(padded.dtype)
                if ctx.silu:
                    pre_activation = _weighted_sum(padded, x, weight, bias, ctx.reverse)
                    gate = clipwise(torch.sigmoid, pre_activation)
                    dy = dy * gate * (1 + pre_activation * (1 - gate))
                for k, start in _first_rows(weight, ctx.reverse):
                    dpadded[:, start : start + length].addcmul_(w[:, k], dy)
                    dweight[:, k] = (dy * padded[:, start : start + length]).sum((0, 1))
                dbias = dy.sum((0, 1))
            if dstate is not None:
                dpadded[:, _final_state_rows(x, weight, ctx.reverse)] += dstate.transpose(1, 2)
            dx, dinitial = _unpad(dpadded, length, ctx.reverse)
            return (
                dx.to(x.dtype),
                dweight.to(weight.dtype),
                None if bias is None or dbias is None else dbias.to(bias.dtype),
                None if initial_state is None else dinitial.transpose(1, 2).to(initial_state.dtype),
                None,
                None,
            )


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


def _pad(x: Tensor, state: Tensor | None, width: int, reverse: bool) -> Tensor:
    """Return x (B, L, E) with the K-1 inputs beyond its edge, (B, L+K-1, E), in at least float32."""
    shape = (x.shape[0], x.shape[1] + width - 1, x.shape[2])
    padded = torch.empty(shape, dtype=accumulation_dtype(x.dtype), device=x.device)
    inside, edge = _unpad(padded, x.shape[1], reverse)
    inside.copy_(x)
    if state is None:
        edge.zero_()
    else:
        edge.copy_(state.transpose(1, 2).to(x.dtype))
    return padded


def _unpad(padded: Tensor, length: int, reverse: bool) -> tuple[Tensor, Tensor]:
    """Return the sequence (B, L, E) and the K-1 inputs beyond its edge (B, K-1, E), as views of padded (B, L+K-1, E)."""
    beyond = padded.shape[1] - length
    return (padded[:, :length], padded[:, length:]) if reverse else (padded[:, beyond:], padded[:, :beyond])


def _final_state_rows(x: Tensor, weight: Tensor, reverse: bool) -> slice:
    """Return the rows of the padded sequence (B, L+K-1, E) that are the final state."""
    return slice(0, weight.shape[1] - 1) if reverse else slice(x.shape[1], None)


def _first_rows(weight: Tensor, reverse: bool) -> list[tuple[int, int]]:
    """Return every index k of the weights (E, K), and the row of the padded sequence that it multiplies at t = 0."""
    width = weight.shape[1]
    return [(k, width - 1 - k if reverse else k) for k in range(width)]


def _weighted_sum(padded: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    """Return the pre-activation (B, L, E) of padded (B, L+K-1, E), in the dtype of padded."""
    w = weight.to(padded.dtype)
    y = torch.zeros_like(x, dtype=padded.dtype, memory_format=torch.contiguous_format)
    if bias is not None:
        y += bias
    for k, start in _first_rows(weight, reverse):
        y.addcmul_(padded[:, start : start + x.shape[1]], w[:, k])
    return y
