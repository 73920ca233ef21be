"""All of a mixer after in_proj as one operator, `videomamba::mixer`.

    c = silu(conv(x))        dt, B, C = x_proj(c)        y = sum of both scans * silu(z)        out = out_proj(y)

It keeps xz and the rows of x_proj; the backward makes everything else again, the scan too unless what it wants of that was
kept. Both directions share one launch of the convolution, of x_proj, of dt_proj and of the scan, B and C are read where x_proj
wrote them, and the gradients of x and z are written where those of in_proj's output are wanted. A row of x_proj is
[dt, zeros up to a multiple of STEP | B | C]: with dt of 36 or 12 alone, cuBLAS takes kernels for unaligned matrices, which need
twice the time.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused.ops.causal_conv1d import launch as conv
from fused.ops.causal_conv1d.launch import Optionals
from fused.ops.mamba_inner.dt_proj_kernel import steps
from fused.ops.mamba_inner.pack_kernel import Packed, pack
from fused.ops.selective_scan import launch as scan
from fused.ops.selective_scan.native import aligned, dense, plan
from fused.ops.selective_scan.schedule import TILE
from fused.runtime.library import below_autograd, differentiable, register, wants_gradients
from fused.runtime.modes import is_batch_invariant

NAMES = ("conv", "conv_bias", "proj", "dt", "dt_bias", "A", "D")
PACKED = ("proj", "dt", "A", "D")  # what `packed` takes
_TENSORS = (
    "Tensor xz, Tensor conv0, Tensor? conv1, Tensor? conv_bias0, Tensor? conv_bias1, Tensor proj0, Tensor? proj1,"
    " Tensor dt0, Tensor? dt1, Tensor dt_bias0, Tensor? dt_bias1, Tensor A0, Tensor? A1, Tensor D0, Tensor? D1,"
    " Tensor out, Tensor? out_bias"
)
_COUNT = 17
_KEPT = 5  # results beside the first: rows, starts, y, ungated, marks; empty for what is not kept
STEP = 16  # elements; 32 bytes of the narrowest dtype, which memory is read by


def mix(xz: Tensor, directions: list[dict[str, Any]], out: Tensor, out_bias: Tensor | None, keep: bool = False) -> Tensor:
    """xz (B, L, 2E) to (B, L, D). A direction has conv (E, K), conv_bias (E,) or None, proj (R + 2N, E), dt (E, R),
    dt_bias (E,), A (E, N) the logarithm of -A, and D (E,); the second of two runs from the last token.
    With `keep` the backward does not scan again: y, once more without the gate, and the states before every 16 tokens are kept.

    Matrix products are in xz's dtype, under autocast as elsewhere with their weights rounded to it.
    """
    low = torch.is_autocast_enabled(xz.device.type)

    def product(x: Tensor | None) -> Tensor | None:
        return x.to(xz.dtype) if low and x is not None else x

    flat: list[Tensor | None] = []
    for name in NAMES:
        pair = [own[name] for own in directions]
        if name in ("proj", "dt"):
            pair = [product(x) for x in pair]
        flat += [*pair, *[None] * (2 - len(pair))]
    tensors = (xz, *flat, product(out), product(out_bias))
    return _differentiable(*tensors, is_batch_invariant(), keep and wants_gradients(*tensors))[0]


class Parts:
    """Tensors of a mixer behind in_proj by name, each once per direction, and what forward and backward both make of them."""

    conv: tuple[Tensor, ...]
    conv_bias: tuple[Tensor | None, ...]
    proj: tuple[Tensor, ...]
    dt: tuple[Tensor, ...]
    dt_bias: tuple[Tensor, ...]
    A: tuple[Tensor, ...]
    D: tuple[Tensor, ...]

    def __init__(
        self,
        x: Tensor,
        z: Tensor | None,
        named: Sequence[tuple[Any, ...]],
        reverses: tuple[bool, ...],
        even: bool,
        logarithm: bool,
    ) -> None:
        self.x, self.z, self.reverses, self.logarithm = x, z, reverses, logarithm
        for name, pair in zip(NAMES, named, strict=True):
            setattr(self, name, pair)
        self.R, self.N = self.dt[0].shape[1], self.A[0].shape[1]
        for name, size, most in (("d_state", self.N, scan.LONGEST_STATE), ("d_conv", self.conv[0].shape[1], conv.MAX_WIDTH)):
            if size > most:
                raise ValueError(f"mixer: backend 'native' has {name} up to {most}, got {size}; use backend='torch'")
        self.step = stepped(self.R)
        self.width = self.step + 2 * self.N  # of a row
        self.plan = plan(x, self.N, len(reverses), even)

    def weights(self) -> Packed:
        """x_proj (directions, width, E), dt_proj (directions, step, E), A and D."""
        return packed(*(getattr(self, name) for name in PACKED))

    def split(self, rows: Tensor) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """dt (directions, B * L, step), and for each direction B and C (B, L, N)."""
        dt, B, C = rows.split((self.step, self.N, self.N), dim=-1)
        return dt.flatten(1, 2), B.unbind(), C.unbind()

    def convolved(self) -> Tensor:
        """(directions, B, L, E)."""
        return conv.forward(self.x, self.conv, self.conv_bias, None, self.reverses, True, False)[0]

    def read(self, c: Tensor, weights: Packed) -> tuple[Tensor, Tensor, scan.Streams]:
        """x_proj of c (directions, B, L, E), which is (directions, B, L, width), delta, and what the scan reads."""
        rows = c.new_empty(len(c), c.shape[1] * c.shape[2], self.width)
        rows = _products(c.flatten(1, 2), weights.proj.mT, rows).unflatten(1, c.shape[1:3])
        delta = self.delta(rows, weights.dt)
        return rows, delta, self.streams(c, rows, delta, weights)

    def delta(self, rows: Tensor, dt_proj: Tensor) -> Tensor:
        """(directions, B, L, E), behind softplus."""
        return steps(rows.flatten(1, 2), dt_proj, self.dt_bias).view(len(self.reverses), *self.x.shape)

    def streams(self, c: Tensor, rows: Tensor, delta: Tensor, weights: Packed) -> scan.Streams:
        """What the scan reads."""
        _, B, C = self.split(rows)
        A, D = (tuple(map(aligned, pair)) for pair in (weights.A, weights.D))
        z, nothing = None if self.z is None else dense(self.z), (None,) * len(delta)
        return scan.Streams(self.reverses, c.unbind(), delta.unbind(), A, B, C, D, nothing, z, 2, self.logarithm)

    def gradients(
        self, s: scan.Streams, c: Tensor, rows: Tensor, weights: Packed, dy: Tensor, marks: Tensor,
        ungated: Tensor | None, dx: Tensor | None, dz: Tensor | None, dfinal: Tensor | None = None,
        taps: Optionals = None, dtaps: Optionals = None,
    ) -> tuple[Tensor, scan.Gradients, Any, list[tuple[Any, ...]]]:  # fmt: skip
        """From dy (B, L, E) and, of states, `dfinal` and `dtaps`: dx, written into the one given, those of the scan with dz,
        those of `taps`, and of the parameters in the order of NAMES."""
        drows, du, ddelta = torch.empty_like(rows), torch.empty_like(c), torch.empty_like(c)
        dt, *_ = self.split(rows)
        ddt_rows, dB, dC = self.split(drows)
        g = scan.backward(s, dy, dfinal, marks, ungated, self.plan, dB, dC, du.unbind(), ddelta.unbind(), dz)
        du, ddelta, drows = (x.flatten(1, 2) for x in (du, ddelta, drows))
        _products(ddelta, weights.dt.mT, ddt_rows)
        ddt = [(x.t() @ y)[:, : self.R] for x, y in zip(ddelta, dt, strict=True)]
        dproj = [x.t() @ y for x, y in zip(drows, c.flatten(1, 2), strict=True)]  # one by one: cuBLAS splits their long sums
        if self.step > self.R:
            dproj = [torch.cat((x[: self.R], x[self.step :])) for x in dproj]
        du.baddbmm_(drows, weights.proj)
        dx, dconv, dconv_bias, dtaps = conv.backward(
            du.view(c.shape), dtaps, self.x, self.conv, self.conv_bias, taps, self.reverses, True, dx
        )
        pairs: tuple[Any, ...] = (dconv, dconv_bias, dproj, ddt, g.bias, g.A, g.D)
        return dx, g, dtaps, [self._own(pair, getattr(self, name)) for pair, name in zip(pairs, NAMES, strict=True)]

    def _own(self, grads: Any, asked: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """In their parameters' dtypes, empty for what is None; results of an operator share no memory."""
        pairs = zip(grads, asked, strict=True)
        return tuple(self.x.new_empty(0) if x is None else d.to(x.dtype, copy=d._is_view()) for d, x in pairs)


def stepped(R: int | torch.SymInt) -> Any:
    """Of a row of x_proj what dt and its zeros take."""
    return -(-R // STEP) * STEP


def packed(*weights: Sequence[Tensor]) -> Packed:
    """Those named in PACKED, each of one direction or of both."""
    proj, dt, A, D = ([w.contiguous() for w in pair] for pair in weights)
    return pack(proj, dt, A, D, stepped(dt[0].shape[1]))


def _products(x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """x @ y of every direction, into `out`. In float32 one by one, as PyTorch's mixer has them: cuBLAS splits their long sums
    over channels, but not those of a batch, whose error is 2-3 times as large (5e-7 and 1.6e-7 on an H200)."""
    if x.dtype != torch.float32:
        return torch.bmm(x, y, out=out)
    for a, b, to in zip(x, y, out, strict=True):
        torch.mm(a, b, out=to)
    return out


def _parts(tensors: Sequence[Any], even: bool) -> Parts:
    xz, *flat = tensors[:-2]
    count = 1 if flat[1] is None else 2
    named = [tuple(flat[i : i + count]) for i in range(0, len(flat), 2)]
    x, z = xz.chunk(2, dim=-1)
    return Parts(x, z, named, (False, True)[:count], even, logarithm=True)


def _mixer(*args):
    *tensors, even, keep = args
    p, (out, out_bias) = _parts(tensors, even), tensors[-2:]
    rows, _, s = p.read(p.convolved(), p.weights())
    r = scan.forward(s, None, p.plan, keep=keep)
    kept = (None, r.y, r.ungated, r.marks) if keep else (r.starts, None, None, None)
    return F.linear(r.y, out, out_bias), rows, *(p.x.new_empty(0) if x is None else x for x in kept)


def _shapes(*args):
    *tensors, even, keep = args
    p = _parts(tensors, even)
    B, L, E = p.x.shape
    cut, count = p.plan.fwd_schedule, len(p.reverses)
    kept, states = [p.x.new_empty(0) for _ in range(4)], partial(p.x.new_empty, dtype=torch.float32)
    if keep:
        kept[1:] = p.x.new_empty((B, L, E)), p.x.new_empty((B, L, E)), states((count, B, -(-L // TILE), E, p.N))
    elif cut.num_unsplit < cut.num_sequences:
        kept[0] = states((count, B, cut.num_splits, E, p.N))
    return p.x.new_empty((B, L, tensors[-2].shape[0])), p.x.new_empty((count, B, L, p.width)), *kept


def _mixer_backward(dout, rows, starts, y, ungated, marks, *args):
    *tensors, even = args
    p, (xz, out, out_bias) = _parts(tensors, even), (tensors[0], *tensors[-2:])
    c, weights = p.convolved(), p.weights()
    s = p.streams(c, rows, p.delta(rows, weights.dt), weights)
    flat = dout.flatten(0, 1)
    dy = (flat @ out).view(p.x.shape)
    if not marks.numel():
        again = scan.forward(s, None, p.plan, keep=True, starts=starts if starts.numel() else None)
        y, ungated, marks = again.y, again.ungated, again.marks
    dxz = torch.empty_like(xz, memory_format=torch.contiguous_format)
    dx, dz = dxz.chunk(2, dim=-1)
    *_, made = p.gradients(s, c, rows, weights, dy, marks, ungated, dx, dz)
    parameters = [x for pair in made for x in (*pair, *(dout.new_empty(0) for _ in range(2 - len(pair))))]
    dout_bias = dout.new_empty(0) if out_bias is None else flat.sum(0)
    return dxz, *parameters, flat.t() @ y.flatten(0, 1), dout_bias


def _shapes_backward(dout, *args):
    tensors = args[_KEPT : _KEPT + _COUNT]
    return tuple(dout.new_empty(0) if x is None else x.new_empty(x.shape) for x in tensors)


class _Mixer(torch.autograd.Function):
    """Saves its tensors, the rows of x_proj and the states that enter the pieces of time, or what the scan kept."""

    @staticmethod
    def forward(ctx, *inputs):
        *tensors, ctx.even, _ = inputs
        out, *kept = below_autograd("mixer", *inputs)
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept, *tensors)
        return out, *kept

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, *_):
        if dout is None:
            return (None,) * (_COUNT + 2)
        saved = ctx.saved_tensors  # once: under activation checkpointing they are made again for that
        grads = torch.ops.videomamba.mixer_backward.default(dout.contiguous(), *saved, ctx.even)
        return *(None if x is None else g for g, x in zip(grads, saved[_KEPT:], strict=True)), None, None


register(f"mixer({_TENSORS}, bool invariant, bool keep) -> (" + ", ".join(["Tensor"] * (1 + _KEPT)) + ")", _mixer, _shapes)
register(
    "mixer_backward(Tensor dy, Tensor rows, Tensor starts, Tensor y, Tensor ungated, Tensor marks,"
    f" {_TENSORS}, bool invariant) -> (" + ", ".join(["Tensor"] * _COUNT) + ")",
    _mixer_backward,
    _shapes_backward,
)  # fmt: skip
_differentiable = differentiable("mixer", _Mixer)
