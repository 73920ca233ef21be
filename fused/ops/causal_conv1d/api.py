"""The short causal convolution before the scan: every channel by itself, K taps, the last tap on the current token.

    y_t = act(bias + sum_w weight[:, w] * x_{t - (K-1-w)})        reverse: x_{t + (K-1-w)}

The state is the K-1 raw inputs beyond the edge of the sequence, in time order: those before token 0, or, with
`reverse`, those after token L-1; zeros where nothing was. What leaves is what the next call needs.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused import backends
from fused.backends import NATIVE, TORCH, Abilities
from fused.ops import mamba_ssm as upstream
from fused.ops.selective_scan import export as traceable
from fused.runtime.checks import check_choice, check_native_dtypes, check_tensor, no_autocast
from fused.runtime.dtypes import KERNEL_DTYPES, accumulation_dtype
from fused.runtime.elementwise import clipwise
from fused.runtime.library import below_autograd, differentiable, register

ACTIVATIONS = ("silu", "swish", None)


BACKENDS = {
    "native": NATIVE,
    "mamba_ssm": Abilities(False, True, True, False, KERNEL_DTYPES, ("cuda",)),
    "torch": TORCH,
}
"""Abilities of the backends that have this operator."""


def causal_conv1d(
    x: Float[Tensor, "B L E"],
    weight: Float[Tensor, "E K"],
    bias: Float[Tensor, " E"] | None = None,
    *,
    activation: str | None = "silu",
    initial_state: Float[Tensor, "B E S"] | None = None,
    reverse: bool = False,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B L E"], Float[Tensor, "B E S"]]:
    """Convolve x along its tokens and return (y, final_state), both in x's dtype; the states are (B, E, K-1).

    `activation` is "silu" (also called "swish") or None. Computes in at least float32 and rounds once; gradients reach
    x, weight, bias and initial_state and flow from both results.

    Raises TypeError or ValueError for an argument that does not fit, ValueError for what the backend cannot do,
    BackendError for a backend that cannot run here.

        >>> x, weight = torch.randn(2, 63, 8), torch.randn(8, 4)
        >>> y, state = causal_conv1d(x, weight)
    """
    _check(x, weight, bias, activation, initial_state)
    asked = {"initial_state": initial_state is not None, "reverse": reverse}
    backends.check_abilities("causal_conv1d", BACKENDS, backend, x.dtype, asked)
    chosen = backends.operators_of(backends.choose(backend, x.device))
    if chosen == "mamba_ssm":
        return upstream.causal_conv1d(x, weight, bias, activation=activation, reverse=reverse)
    run = conv_native if chosen == "native" else conv_torch
    return run(x, weight, bias, activation=activation, initial_state=initial_state, reverse=reverse)


def conv_torch(
    x: Float[Tensor, "B L E"],
    weight: Float[Tensor, "E K"],
    bias: Float[Tensor, " E"] | None = None,
    *,
    activation: str | None = "silu",
    initial_state: Float[Tensor, "B E S"] | None = None,
    reverse: bool = False,
) -> tuple[Float[Tensor, "B L E"], Float[Tensor, "B E S"]]:
    """The convolution in PyTorch operations: one multiply-add of the whole sequence for each tap."""
    if torch.compiler.is_exporting():
        return traceable.causal_conv1d(x, weight, bias, initial_state, activation is not None, reverse)
    return _Conv.apply(x, weight, bias, initial_state, activation is not None, reverse)


class _Conv(torch.autograd.Function):
    """Saves its inputs; the backward computes the sum before the activation again."""

    @staticmethod
    def forward(ctx, x, weight, bias, initial_state, activated, reverse):
        ctx.set_materialize_grads(False)
        ctx.activated, ctx.reverse = activated, reverse
        ctx.save_for_backward(x, weight, bias, initial_state)
        with no_autocast(x.device):
            line = _line(x, initial_state, weight.shape[1], reverse)
            state = line[:, _leaving(x, weight, reverse)].transpose(1, 2)
            y = _sum(line, x, weight, bias, reverse)
            y = clipwise(F.silu, y) if activated else y
            return y.to(x.dtype), state.to(x.dtype, copy=True, memory_format=torch.contiguous_format)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dstate):
        x, weight, bias, initial_state = ctx.saved_tensors
        length = x.shape[1]
        with no_autocast(x.device):
            line = _line(x, initial_state, weight.shape[1], ctx.reverse)
            taps = weight.to(line.dtype)
            dline, dtaps, dbias = torch.zeros_like(line), torch.zeros_like(taps), None
            if dy is not None:
                dy = dy.to(line.dtype)
                if ctx.activated:
                    before = _sum(line, x, weight, bias, ctx.reverse)
                    gate = clipwise(torch.sigmoid, before)
                    dy = dy * gate * (1 + before * (1 - gate))
                for tap, start in _starts(weight, ctx.reverse):
                    dline[:, start : start + length].addcmul_(taps[:, tap], dy)
                    dtaps[:, tap] = (dy * line[:, start : start + length]).sum((0, 1))
                dbias = dy.sum((0, 1))
            if dstate is not None:
                dline[:, _leaving(x, weight, ctx.reverse)] += dstate.transpose(1, 2)
            inside, edge = _split(dline, length, ctx.reverse)
            return (
                inside.to(x.dtype),
                dtaps.to(weight.dtype),
                None if bias is None or dbias is None else dbias.to(bias.dtype),
                None if initial_state is None else edge.transpose(1, 2).to(initial_state.dtype),
                None,
                None,
            )


def conv_native(
    x: Float[Tensor, "B L E"],
    weight: Float[Tensor, "E K"],
    bias: Float[Tensor, " E"] | None = None,
    *,
    activation: str | None = "silu",
    initial_state: Float[Tensor, "B E S"] | None = None,
    reverse: bool = False,
) -> tuple[Float[Tensor, "B L E"], Float[Tensor, "B E S"]]:
    """The convolution by kernels of its own, by `torch.ops.videomamba.causal_conv1d`.

    Raises ValueError for more than 8 taps, and for a tensor in float64.
    """
    from fused.ops.causal_conv1d.launch import MAX_WIDTH

    if weight.shape[1] > MAX_WIDTH:
        raise ValueError(
            f"causal_conv1d: backend 'native' has K of 1 to {MAX_WIDTH}, got weight of shape {tuple(weight.shape)}; "
            "use backend='torch'"
        )
    check_native_dtypes("causal_conv1d", x=x, weight=weight, bias=bias, initial_state=initial_state)
    return _differentiable(x, weight, bias, initial_state, activation is not None, reverse)


def _native(x, weight, bias, initial_state, activated, reverse):
    from fused.ops.causal_conv1d import launch as conv

    y, finals = conv.forward(x, (weight,), (bias,), (initial_state,), (reverse,), activated)
    (final,) = finals or ()
    return y[0], final


def _native_backward(dy, dstate, x, weight, bias, initial_state, activated, reverse):
    from fused.ops.causal_conv1d import launch as conv

    dy = torch.zeros_like(x) if dy is None else dy
    dx, dweights, dbiases, dstates = conv.backward(
        (dy,), (dstate,), x, (weight,), (bias,), (initial_state,), (reverse,), activated
    )  # fmt: skip
    dbias = x.new_empty(0) if dbiases[0] is None else dbiases[0].to(bias.dtype)
    return dx, dweights[0].to(weight.dtype), dbias, x.new_empty(0) if dstates[0] is None else dstates[0]


def _shapes(x, weight, bias, initial_state, activated, reverse):
    return x.new_empty(x.shape), x.new_empty((x.shape[0], x.shape[2], weight.shape[1] - 1))


def _shapes_backward(dy, dstate, x, weight, bias, initial_state, activated, reverse):
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (x, weight, bias, initial_state))


class _Native(torch.autograd.Function):
    """Saves its inputs, as `_Conv` does."""

    @staticmethod
    def forward(ctx, x, weight, bias, initial_state, activated, reverse):
        ctx.set_materialize_grads(False)
        ctx.options = activated, reverse
        ctx.save_for_backward(x, weight, bias, initial_state)
        return below_autograd("causal_conv1d", x, weight, bias, initial_state, activated, reverse)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dstate):
        tensors = ctx.saved_tensors  # once: a checkpoint gives them out once
        grads = torch.ops.videomamba.causal_conv1d_backward.default(dy, dstate, *tensors, *ctx.options)
        return *(None if t is None else g for t, g in zip(tensors, grads, strict=True)), None, None


_ARGUMENTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, bool activated, bool reverse"
register(f"causal_conv1d({_ARGUMENTS}) -> (Tensor y, Tensor final_state)", _native, _shapes)
register(
    f"causal_conv1d_backward(Tensor? dy, Tensor? dstate, {_ARGUMENTS}) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_state)",  # empty for what is None
    _native_backward,
    _shapes_backward,
)
_differentiable = differentiable("causal_conv1d", _Native)


def _line(x: Tensor, state: Tensor | None, width: int, reverse: bool) -> Tensor:
    """The sequence with the K-1 inputs beyond its edge, (B, L+K-1, E), in at least float32."""
    precise = accumulation_dtype(x.dtype)
    line = torch.empty((x.shape[0], x.shape[1] + width - 1, x.shape[2]), dtype=precise, device=x.device)
    inside, edge = _split(line, x.shape[1], reverse)
    inside.copy_(x)
    if state is None:
        edge.zero_()
    else:
        edge.copy_(state.transpose(1, 2).to(x.dtype))
    return line


def _split(line: Tensor, length: int, reverse: bool) -> tuple[Tensor, Tensor]:
    """The sequence's own tokens and those beyond its edge, as views."""
    beyond = line.shape[1] - length
    return (line[:, :length], line[:, length:]) if reverse else (line[:, beyond:], line[:, :beyond])


def _leaving(x: Tensor, weight: Tensor, reverse: bool) -> slice:
    """Where in the line the state lies that leaves."""
    return slice(0, weight.shape[1] - 1) if reverse else slice(x.shape[1], None)


def _starts(weight: Tensor, reverse: bool) -> list[tuple[int, int]]:
    """Each tap, and the token of the line that it meets at t = 0."""
    width = weight.shape[1]
    return [(tap, width - 1 - tap if reverse else tap) for tap in range(width)]


def _sum(line: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    """bias + sum over taps, (B, L, E) in the line's dtype."""
    taps = weight.to(line.dtype)
    y = torch.zeros_like(x, dtype=line.dtype, memory_format=torch.contiguous_format)
    if bias is not None:
        y += bias
    for tap, start in _starts(weight, reverse):
        y.addcmul_(line[:, start : start + x.shape[1]], taps[:, tap])
    return y


def _check(x, weight, bias, activation, initial_state) -> None:
    op = "causal_conv1d"
    check_tensor(op, "x", x, "B L E", {}, None)
    sizes = dict(zip("BLE", x.shape, strict=True))
    check_tensor(op, "weight", weight, "E K", sizes, x.device)
    if weight.shape[1] < 1:
        raise ValueError(f"{op}: weight must have at least one tap, got shape {tuple(weight.shape)}")
    sizes["K-1"] = weight.shape[1] - 1
    if bias is not None:
        check_tensor(op, "bias", bias, "E", sizes, x.device)
    if initial_state is not None:
        check_tensor(op, "initial_state", initial_state, "B E K-1", sizes, x.device)
    check_choice(op, "activation", activation, ACTIVATIONS)
