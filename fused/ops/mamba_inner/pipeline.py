"""The steps of a mixer between in_proj and out_proj, over one direction or two, shared by its native operators.

    c = silu(conv(x))        dt, B, C = x_proj(c)        delta = softplus(dt_proj(dt) + bias)
    y = scan(c, delta, A, B, C, D, z)

A row of x_proj's output is [dt, zeros up to a multiple of DT_ALIGN | B | C]: with dt of 36 or 12 alone, cuBLAS takes kernels
for unaligned matrices, which need twice the time.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused.ops.causal_conv1d import launch as conv
from fused.ops.mamba_inner.kernels import PackedWeights, dt_proj_softplus, pack_weights, unpack_gradients
from fused.ops.selective_scan import launch as scan
from fused.ops.selective_scan.inputs import ScanInputs, aligned_or_none
from fused.ops.selective_scan.kernel_source import SOFTPLUS_BY_CALLER
from fused.ops.selective_scan.launch import ScanGradients
from fused.ops.selective_scan.schedule import ScanSchedule
from fused.ops.shapes import DirectionWeights, Weights, dense

ByDirection = Sequence[Any]  # a weight of one or two directions
BATCHED_TOKENS = 4096  # up to which the gradients of both directions' weights are one product
DT_ALIGN = 16  # elements; 32 bytes, the unit of memory reads, in a 16-bit dtype


def padded_dt_rank(R: int | torch.SymInt) -> Any:
    """Return the columns that dt and the zeros behind it take in a row of x_proj's output."""
    return -(-R // DT_ALIGN) * DT_ALIGN


def pack(
    conv: ByDirection, conv_bias: ByDirection, x_proj: ByDirection, dt_proj: ByDirection, dt_bias: ByDirection, A: ByDirection,
    D: ByDirection, *, dtype: torch.dtype, linears: Sequence[Tensor] = (), memory: Sequence[Tensor | None] = (None, None),
) -> PackedWeights:  # fmt: skip
    """Return the weights of one or two directions as matrix products, in `dtype`, and the scan read them.

    `linears` are up to two other matrices with a side of E. `memory` is (packed, A_D) of an earlier result for these weights.
    """
    A, D, linears = ([x.contiguous() for x in tensors] for tensors in (A, D, linears))
    x_proj, dt_proj = _of_one_dtype(x_proj, dtype), _of_one_dtype(dt_proj, dtype)
    return pack_weights(x_proj, dt_proj, A, D, padded_dt_rank(dt_proj[0].shape[1]), dtype, linears, *memory)


def pack_mixer(
    first: Weights, second: Weights, in_proj: Tensor | None, out_proj: Tensor, dtype: torch.dtype, *memory: Tensor | None
) -> PackedWeights:
    """Return the packed weights of a mixer, with those of in_proj, if it is not None, and of out_proj as the last `linears`."""
    directions: Any = zip(first, second, strict=True) if second else ((w,) for w in first)
    linears = [out_proj] if in_proj is None else [in_proj, out_proj]
    return pack(*directions, dtype=dtype, linears=linears, memory=memory or (None, None))


def _of_one_dtype(weights: ByDirection, dtype: torch.dtype) -> list[Tensor]:
    """Return contiguous weights, cast to `dtype` where their own differ."""
    same = all(w.dtype == weights[0].dtype for w in weights)
    return [w.contiguous() if same else w.to(dtype).contiguous() for w in weights]


class Pipeline:
    """A mixer's directions over one x: the steps that forward and backward share.

    x and z are (B, L, E), the halves of in_proj's output; z is None without a gate. `directions` are one or two
    `DirectionWeights`, or the same as lists; A is log(-A) with `A_is_log`.
    """

    def __init__(
        self, x: Tensor, z: Tensor | None, directions: Sequence[Sequence[Any]], reverses: tuple[bool, ...],
        batch_invariant: bool, A_is_log: bool,
    ) -> None:  # fmt: skip
        self.x, self.z, self.reverses, self.A_is_log = x, z, reverses, A_is_log
        fields: Any = zip(*directions, strict=True)
        self.weights: Any = DirectionWeights(*fields)  # each field with an entry a direction
        R, self.N = self.weights.dt_proj[0].shape[1], self.weights.A[0].shape[1]
        K = self.weights.conv[0].shape[-1]
        if self.N > scan.MAX_STATES or K > conv.MAX_WIDTH:
            too_many = self.N > scan.MAX_STATES
            name, limit, size = ("d_state", scan.MAX_STATES, self.N) if too_many else ("d_conv", conv.MAX_WIDTH, K)
            raise ValueError(f"mixer: backend 'native' has {name} up to {limit}, got {size}; use backend='torch'")
        self.R, self.padded_R = R, padded_dt_rank(R)
        self.width = self.padded_R + 2 * self.N  # of a row of x_proj's output
        self.batch_invariant = batch_invariant

    @classmethod
    def of_mixer(cls, x: Tensor, z: Tensor, first: Weights, second: Weights, batch_invariant: bool) -> "Pipeline":
        """Return the pipeline of one or both directions of a mixer, whose A is log(-A)."""
        directions: Any = (first, second) if second else (first,)
        return cls(x, z, directions, (False, True)[: len(directions)], batch_invariant, A_is_log=True)

    def packed_shapes(self, linears: Sequence[Tensor | None], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return tensors like `packed` and `A_D` of `pack_mixer`, without values; A_D is empty where that is None."""
        (_, _, E), d, empty = self.x.shape, len(self.reverses), self.x.new_empty
        linear_rows = sum(w.numel() // E for w in linears if w is not None and w.dtype != dtype)
        packed = empty((d * (self.width + self.padded_R) + linear_rows, E), dtype=dtype)
        if all(w.dtype == torch.float32 for w in (*self.weights.A, *self.weights.D)):
            return packed, empty(0, dtype=dtype)
        return packed, empty((d, (self.N + 1) * E), dtype=torch.float32)

    @functools.cached_property
    def schedule(self) -> ScanSchedule:
        """The schedule of the scan, for which sizes must be known: a compiler's symbol for a size would become a constant."""
        return scan.schedule_for(self.x, self.N, len(self.reverses), self.batch_invariant)

    def convolve(
        self, conv_states: Sequence[Tensor | None] | None = None, want_states: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Return c (directions, B, L, E), and the conv states (B, E, K-1) that leave, or None."""
        weights = self.weights
        return conv.forward(self.x, weights.conv, weights.conv_bias, conv_states, self.reverses, True, want_states)

    def split(self, dt_B_C: Tensor) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return dt (directions, B * L, padded R), and for each direction B and C (B, L, N)."""
        dt, B, C = dt_B_C.split((self.padded_R, self.N, self.N), dim=-1)
        return dt.flatten(1, 2), B.unbind(), C.unbind()

    def project(self, c: Tensor, packed: PackedWeights) -> tuple[Tensor, Tensor]:
        """Return x_proj's output (directions, B, L, width) and delta (directions, B, L, E) of c (directions, B, L, E)."""
        rows = c.new_empty((len(c), c.shape[1] * c.shape[2], self.width))
        _matmul(c.flatten(1, 2), packed.x_proj.mT, rows)
        delta = dt_proj_softplus(rows, packed.dt_proj, self.weights.dt_bias)
        return rows.unflatten(1, c.shape[1:3]), delta.view(c.shape)

    def project_x(self, c: Tensor, packed: PackedWeights) -> Tensor:
        """Return x_proj's output alone; see `project`."""
        rows = c.new_empty((len(c), c.shape[1] * c.shape[2], self.width))
        return _matmul(c.flatten(1, 2), packed.x_proj.mT, rows).unflatten(1, c.shape[1:3])

    def delta(self, dt_B_C: Tensor, packed: PackedWeights) -> Tensor:
        """Return delta (directions, B, L, E), after softplus, of x_proj's output (directions, B, L, width)."""
        delta = dt_proj_softplus(dt_B_C.flatten(1, 2), packed.dt_proj, self.weights.dt_bias)
        return delta.view(len(self.reverses), *self.x.shape)

    def scan_inputs(self, c: Tensor, dt_B_C: Tensor, delta: Tensor, packed: PackedWeights) -> ScanInputs:
        """Return the inputs of the scan: c and delta are (directions, B, L, E), dt_B_C is (directions, B, L, width)."""
        _, B, C = self.split(dt_B_C)
        A, D = list(map(aligned_or_none, packed.A)), list(map(aligned_or_none, packed.D))
        z, no_bias = None if self.z is None else dense(self.z), (None,) * len(delta)
        inputs: Any = (self.reverses, c.unbind(), delta.unbind(), A, B, C, D, no_bias, z, SOFTPLUS_BY_CALLER, self.A_is_log)
        return ScanInputs(*inputs)

    def backward(
        self, s: ScanInputs, c: Tensor, dt_B_C: Tensor, packed: PackedWeights, dy: Tensor, tile_states: Tensor,
        y_pre_gate: Tensor | None, *, dx: Tensor | None = None, dz: Tensor | None = None, dfinal_states: Tensor | None = None,
        conv_states: Sequence[Tensor | None] | None = None, dconv_states: Sequence[Tensor | None] | None = None,
    ) -> tuple[conv.Gradients, ScanGradients, list[DirectionWeights]]:  # fmt: skip
        """Return the gradients of the convolution (x among them), of the scan (z among them), and of each direction's weights.

        dy is (B, L, E); `dfinal_states` (directions, B, E, N) and `dconv_states` (B, E, K-1) are of the states that leave. The
        gradients of x and z (B, L, E) are written into dx and dz where these are not None.
        """
        d_dt_B_C, du, ddelta = torch.empty_like(dt_B_C), torch.empty_like(c), torch.empty_like(c)
        dt, *_ = self.split(dt_B_C)
        ddt, dB, dC = self.split(d_dt_B_C)
        g = scan.backward(
            s, dy, dfinal_states, tile_states, y_pre_gate, self.schedule, dB, dC, du.unbind(), ddelta.unbind(), dz
        )  # fmt: skip
        du, ddelta, d_dt_B_C = (x.flatten(1, 2) for x in (du, ddelta, d_dt_B_C))
        _matmul(ddelta, packed.dt_proj.mT, ddt)
        weights = self.weights
        d_dt_proj = _weight_gradients(ddelta, dt, weights.dt_proj[0].dtype)
        d_x_proj = _weight_gradients(d_dt_B_C, c.flatten(1, 2), weights.x_proj[0].dtype)
        d_x_proj, d_dt_proj = unpack_gradients(d_x_proj, d_dt_proj, weights.x_proj, weights.dt_proj)
        du.baddbmm_(d_dt_B_C, packed.x_proj)
        conv_grads = conv.backward(
            du.view(c.shape), dconv_states, self.x, weights.conv, weights.conv_bias, conv_states, self.reverses, True, dx
        )  # fmt: skip
        by_direction = zip(conv_grads.weights, conv_grads.biases, d_x_proj, d_dt_proj, g.delta_bias, g.A, g.D, strict=True)
        pairs = zip(by_direction, zip(*weights, strict=True), strict=True)
        return conv_grads, g, [_like(DirectionWeights(*grads), DirectionWeights(*w)) for grads, w in pairs]


def weight_gradient(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x^T y (..., M, N) of x (..., tokens, M) and y (..., tokens, N), in `dtype` where one rounding does that.

    Under autocast that is float32, the dtype of the weights, so that no second kernel casts the result.
    """
    x, multiply = x.mT, torch.mm if x.dim() == 2 else torch.bmm
    if dtype != torch.float32 or x.dtype == torch.float32:
        return multiply(x, y)
    if x.is_cuda:
        return multiply(x, y, out_dtype=torch.float32)
    return multiply(x.float(), y.float())


def _weight_gradients(x: Tensor, y: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return `weight_gradient` of every direction of x (directions, tokens, M) and y (directions, tokens, N).

    Over many tokens it is one product after the other, whose long sums cuBLAS splits, but not those of a batch. Over few tokens
    a product is shorter than its launch, so that one launch is better. In float32 a sum that is not split is less exact.
    """
    if x.dtype == torch.float32 or x.shape[1] > BATCHED_TOKENS or len(x) == 1:
        return [weight_gradient(a, b, dtype) for a, b in zip(x, y, strict=True)]
    return list(weight_gradient(x, y, dtype).unbind())


def _like(grads: DirectionWeights, weights: DirectionWeights) -> DirectionWeights:
    """Return gradients in their weights' dtypes, None for None."""
    pairs = zip(grads, weights, strict=True)
    results: list[Any] = [None if w is None or grad is None else grad.to(w.dtype) for grad, w in pairs]
    return DirectionWeights(*results)


def _matmul(x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """Write x @ y of every direction into `out` (directions, M, N) and return it; x (directions, M, K), y (directions, K, N).

    In float32 the directions are multiplied one after the other, as PyTorch's mixer does: cuBLAS splits their long sums over
    channels, but not those of a batch, whose error is 2-3 times as large (5e-7 and 1.6e-7 on an H200).
    """
    if x.dtype != torch.float32:
        return torch.bmm(x, y, out=out)
    for a, b, product in zip(x, y, out, strict=True):
        torch.mm(a, b, out=product)
    return out
