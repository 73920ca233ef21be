"""A mixer by the kernels for CPUs, as the operator `videomamba::mamba_inner_cpu`, in float32 or float64.

    xz = in_proj(u)        c = silu(conv(x))        dt, B, C = x_proj(c)
    y = sum of the scans * silu(z)                  out = out_proj(y)

Kernels run the convolution and the scan, each over both directions, PyTorch the products. Kept for the backward are xz, the
results of x_proj, y with and without its gate, and the states that enter the chunks of the scan; the rest is computed again.
Tensors of both directions are (K, B, L, ...), in the order of the tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused.ops.causal_conv1d import cpu as conv
from fused.ops.selective_scan import cpu as scan
from fused.ops.shapes import DirectionWeights, Linear, Weights
from fused.runtime import cpu_library
from fused.runtime.autocast import autocast_dtype
from fused.runtime.exporting import is_exporting
from fused.runtime.library import register, wants_gradients
from fused.runtime.linear import product


def takes(u: Tensor, in_proj: Linear, directions: Sequence[DirectionWeights], out_proj: Linear) -> bool:
    """Return whether `mamba_inner_cpu` can run: in float32 or float64, all alike, without autocast."""
    if u.dtype not in cpu_library.DTYPES or is_exporting() or autocast_dtype(u.device) is not None:
        return False
    return all(w is None or w.dtype == u.dtype for weights in (in_proj, out_proj, *directions) for w in weights)


def mamba_inner_cpu(u: Tensor, in_proj: Linear, directions: Sequence[DirectionWeights], out_proj: Linear) -> Tensor:
    """Return out (B, L, D) of u (B, L, D). A of the one or two directions is log(-A); the second runs from the last token."""
    first, second = list(directions[0]), list(directions[1]) if len(directions) > 1 else []
    arguments = (u, first, second, *in_proj, *out_proj)
    return _mamba_inner(*arguments, wants_gradients(*arguments))[0]


class _Directions:
    """The weights of one direction or two, each field with an entry a direction."""

    def __init__(self, first: Weights, second: Weights) -> None:
        fields: Any = zip(first, second, strict=True) if second else ((w,) for w in first)
        fields = ([None if w is None else w.contiguous() for w in field] for field in fields)
        self.weights: Any = DirectionWeights(*fields)
        self.reverses = [False, True] if second else [False]
        self.N, self.R = self.weights.A[0].shape[1], self.weights.dt_proj[0].shape[1]

    def convolve(self, xz: Tensor, rows: Sequence[Tensor | None]) -> Tensor:
        """Return c (K, B, L, E), and write x_proj's results into `rows` (B, L, R+2N), if they are not None."""
        (B, L, E2), w = xz.shape, self.weights
        c, x = xz.new_empty((len(self.reverses), B, L, E2 // 2)), xz[..., : E2 // 2]
        struct = conv.conv_struct(x, w.conv, w.conv_bias, None, True, self.reverses, c, w.x_proj, rows)
        cpu_library.call("conv_forward", xz.dtype, struct)
        return c

    def scan_struct(
        self, xz: Tensor, c: Tensor, rows: Sequence[Tensor], y: Tensor, pre_gate: Tensor | None, chunks: Tensor | None
    ) -> tuple[Any, ...]:
        """Return the members of the scan's struct."""
        w, z, (B, C) = self.weights, xz[..., xz.shape[2] // 2 :], self.mixing(rows)
        options = True, True, self.reverses, y, pre_gate, None, chunks, w.dt_proj
        return scan.scan_struct(c.unbind(), rows, w.A, B, C, w.D, w.dt_bias, z, None, *options)

    def mixing(self, rows: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return B and C (B, L, N) of every direction, views of the rows."""
        return [row[..., self.R : -self.N] for row in rows], [row[..., -self.N :] for row in rows]


def _forward(
    u: Tensor, first: Weights, second: Weights, in_proj: Tensor, in_proj_bias: Tensor | None, out_proj: Tensor,
    out_proj_bias: Tensor | None, keep: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """Return out (B, L, D) and, if `keep`, what the backward reads."""
    d = _Directions(first, second)
    xz = _linear(u, in_proj, in_proj_bias)
    y, pre_gate, chunks = _outputs(u, first, second, keep)
    rows = [y.new_empty((*y.shape[:2], d.R + 2 * d.N)) for _ in d.reverses]
    c = d.convolve(xz, rows)
    struct = d.scan_struct(xz, c, rows, y, pre_gate, chunks)
    cpu_library.call("scan_forward", u.dtype, struct)
    out = _linear(y, out_proj, out_proj_bias)
    return (out, xz, rows, y, pre_gate, chunks) if keep else (out, None, [], None, None, None)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x weight^T + bias (B, L, out) of x (B, L, in)."""
    out = product(x.flatten(0, 1), weight.t()).view(*x.shape[:2], weight.shape[0])
    return out if bias is None else out.add_(bias)


def _outputs(u: Tensor, first: Weights, second: Weights, keep: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return y (B, L, E) without values, and if `keep` the same for y before its gate and the states that enter chunks."""
    assert first[5] is not None
    (B, L, _), (E, N), K = u.shape, first[5].shape, 2 if second else 1
    y = u.new_empty((B, L, E))
    if not keep:
        return y, None, None
    return y, torch.empty_like(y), u.new_empty(scan.kept_shape(B, L, E, N, K, 1, u.dtype))


def _forward_shapes(
    u: Tensor, first: Weights, second: Weights, in_proj: Tensor, in_proj_bias: Tensor | None, out_proj: Tensor,
    out_proj_bias: Tensor | None, keep: bool,
) -> tuple[Any, ...]:  # fmt: skip
    (B, L, _), empty = u.shape, u.new_empty
    out = empty((B, L, out_proj.shape[0]))
    if not keep:
        return out, empty(0), [], *(empty(0) for _ in range(3))
    assert first[2] is not None
    y, pre_gate, chunks = _outputs(u, first, second, True)
    assert pre_gate is not None and chunks is not None
    rows = [empty((B, L, first[2].shape[0])) for _ in range(2 if second else 1)]
    return out, empty((B, L, in_proj.shape[0])), rows, y, pre_gate, chunks


def _backward(
    u: Tensor, first: Weights, second: Weights, in_proj: Tensor, in_proj_bias: Tensor | None, out_proj: Tensor,
    out_proj_bias: Tensor | None, xz: Tensor, rows: Sequence[Tensor], y: Tensor, pre_gate: Tensor, chunks: Tensor, dout: Tensor,
) -> tuple[Any, ...]:  # fmt: skip
    """Return the gradients of all tensors, None for None."""
    d = _Directions(first, second)
    w = d.weights
    dout = dout.contiguous().flatten(0, 1)
    dy, dxz = product(dout, out_proj).view(y.shape), torch.empty_like(xz)
    d_out_proj = product(dout.t(), y.flatten(0, 1))
    c = d.convolve(xz, (None, None))
    du, ddelta = c.new_empty((2, *c.shape)).unbind()
    drows, half = [torch.empty_like(row) for row in rows], xz.shape[2] // 2
    dB, dC = ([x.unsqueeze(2) for x in pair] for pair in d.mixing(drows))
    empty: Any = ([None if x is None else torch.empty_like(x) for x in field] for field in w)
    dconv, dconv_bias, d_x_proj, d_dt_proj, dbias, dA, dD = gradients = list(empty)
    struct = d.scan_struct(xz, c, rows, y, pre_gate, chunks)
    scan_grads = scan.gradients_struct(
        dy, None, du.unbind(), ddelta.unbind(), dB, dC, dA, dD, dbias, dxz[..., half:], None, drows, d_dt_proj
    )  # fmt: skip
    cpu_library.call("scan_backward", y.dtype, struct, scan_grads)
    conv_struct = conv.conv_struct(
        xz[..., :half], w.conv, w.conv_bias, None, True, d.reverses, None, w.x_proj, rows
    )  # fmt: skip
    conv_grads = conv.gradients_struct(du.unbind(), dxz[..., :half], dconv, dconv_bias, None, drows, d_x_proj)
    cpu_library.call("conv_backward", y.dtype, conv_struct, conv_grads)
    dxz, tokens = dxz.flatten(0, 1), u.flatten(0, 1)
    by_direction = [list(grads) for grads in zip(*gradients, strict=True)]
    return (
        product(dxz, in_proj).view(u.shape), by_direction[0], by_direction[1] if second else [],
        product(dxz.t(), tokens), None if in_proj_bias is None else dxz.sum(0),
        d_out_proj, None if out_proj_bias is None else dout.sum(0),
    )  # fmt: skip


def _backward_shapes(
    u: Tensor, first: Weights, second: Weights, in_proj: Tensor, in_proj_bias: Tensor | None, out_proj: Tensor,
    out_proj_bias: Tensor | None, xz: Tensor, rows: Sequence[Tensor], y: Tensor, pre_gate: Tensor, chunks: Tensor, dout: Tensor,
) -> tuple[Any, ...]:  # fmt: skip
    def like(x: Tensor | None) -> Tensor:
        return u.new_empty(0 if x is None else x.shape)

    linears = (like(x) for x in (in_proj, in_proj_bias, out_proj, out_proj_bias))
    return like(u), [like(x) for x in first], [like(x) for x in second], *linears


_INPUTS = (
    "Tensor u, Tensor?[] first, Tensor?[] second, Tensor in_proj, Tensor? in_proj_bias, Tensor out_proj, Tensor? out_proj_bias"
)
_KEPT = "Tensor xz, Tensor[] rows, Tensor y, Tensor pre_gate, Tensor chunks"
_mamba_inner_backward = register(
    f"mamba_inner_cpu_backward({_INPUTS}, {_KEPT}, Tensor dout) -> (Tensor du, Tensor[] dfirst, Tensor[] dsecond, "
    "Tensor d_in_proj, Tensor d_in_proj_bias, Tensor d_out_proj, Tensor d_out_proj_bias)",  # empty for what is None
    _backward,
    _backward_shapes,
)
_mamba_inner = register(
    f"mamba_inner_cpu({_INPUTS}, bool keep) -> (Tensor out, {_KEPT})",  # empty for what is not kept
    _forward,
    _forward_shapes,
    _mamba_inner_backward,
)
