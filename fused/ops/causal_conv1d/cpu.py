"""The causal convolution by the kernels for CPUs, over one or two directions: `videomamba::causal_conv1d_cpu`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused.ops.causal_conv1d.eager import causal_conv1d_eager
from fused.ops.shapes import dense
from fused.runtime import cpu_library
from fused.runtime.autocast import no_autocast
from fused.runtime.dtypes import accumulation_dtype
from fused.runtime.exporting import is_exporting
from fused.runtime.library import register

Pair = Sequence[Tensor]
OptionalPair = Sequence[Tensor | None]


def causal_conv1d_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = "silu",
    initial_state: Tensor | None = None, reverse: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Convolve as `fused.causal_conv1d` says, on a CPU."""
    if is_exporting():
        options: dict[str, Any] = {"activation": activation, "initial_state": initial_state, "reverse": reverse}
        return causal_conv1d_eager(x, weight, bias, **options)
    precise, beyond = accumulation_dtype(x.dtype), weight.shape[1] - 1
    with no_autocast(x.device):
        before = None if initial_state is None else initial_state.to(x.dtype)
        tokens, w, b, state = (None if t is None else t.to(precise) for t in (x, weight, bias, before))
        assert tokens is not None
        y = _causal_conv1d(tokens, [w], [b], state, activation is not None, [reverse])[0].to(x.dtype)
        last = (x[:, :beyond] if reverse else x[:, max(0, x.shape[1] - beyond) :]).transpose(1, 2)
        if x.shape[1] < beyond:  # the state before is a part of the state after
            missing = beyond - x.shape[1]
            edge = x.new_zeros(*last.shape[:2], beyond) if before is None else before
            last = torch.cat((last, edge[..., :missing]) if reverse else (edge[..., -missing:], last), dim=2)
        return y, last.clone(memory_format=torch.contiguous_format)


def conv_struct(
    x: Tensor, weight: Pair, bias: OptionalPair, initial_state: Tensor | None, silu: bool, reverses: Sequence[bool],
    y: Tensor | None, project: OptionalPair = (None, None), rows: OptionalPair = (None, None),
) -> tuple[Any, ...]:  # fmt: skip
    """Return the members of the kernel's `Conv`; channels of x are contiguous, and so are all others.

    The products of y and `project` (rows, E), transposed, are written into `rows` (B, L, rows).
    """
    (clips, L, E), K, W = x.shape, len(reverses), weight[0].shape[-1]
    num_rows = 0 if rows[0] is None else rows[0].shape[2]
    members = [K, clips, L, E, W, num_rows, silu, torch.get_num_threads(), x, *x.stride()[:2], initial_state, y]
    for k in range(K):
        members += weight[k], bias[k], project[k], rows[k], reverses[k]
    return (*members, *(0,) * (5 * (2 - K)))


def _contiguous(pair: OptionalPair) -> list[Any]:
    return [None if x is None else x.contiguous() for x in pair]


def _forward(
    x: Tensor, weight: Pair, bias: OptionalPair, initial_state: Tensor | None, silu: bool, reverses: Sequence[bool]
) -> Tensor:
    """Return y (K, B, L, E) of K directions, each in the order of the tokens."""
    y = _forward_shapes(x, weight, bias, initial_state, silu, reverses)
    (state,) = _contiguous((initial_state,))
    cpu_library.call(
        "conv_forward", x.dtype, conv_struct(dense(x), _contiguous(weight), _contiguous(bias), state, silu, reverses, y)
    )
    return y


def _forward_shapes(
    x: Tensor, weight: Pair, bias: OptionalPair, initial_state: Tensor | None, silu: bool, reverses: Sequence[bool]
) -> Tensor:
    return x.new_empty((len(reverses), *x.shape))


def _backward(
    x: Tensor, weight: Pair, bias: OptionalPair, initial_state: Tensor | None, silu: bool, reverses: Sequence[bool], dy: Tensor
) -> tuple[Any, ...]:
    """Return the gradients of x, weight, bias and initial_state, None for None."""
    (state,) = _contiguous((initial_state,))
    struct = conv_struct(dense(x), _contiguous(weight), _contiguous(bias), state, silu, reverses, None)
    dx, dweight = x.new_empty(x.shape), [w.new_empty(w.shape) for w in weight]
    dbias = [None if b is None else b.new_empty(b.shape) for b in bias]
    dinitial = None if state is None else state.new_empty(state.shape)
    cpu_library.call(
        "conv_backward", x.dtype, struct, gradients_struct(dy.contiguous().unbind(), dx, dweight, dbias, dinitial)
    )  # fmt: skip
    return dx, dweight, dbias, dinitial


def gradients_struct(
    dy: Pair, dx: Tensor, dweight: Pair, dbias: OptionalPair, dinitial: Tensor | None = None,
    drows: OptionalPair = (None, None), dproject: OptionalPair = (None, None),
) -> tuple[Any, ...]:  # fmt: skip
    """Return the members of the kernel's `Gradients`; channels of dx are contiguous, and so are all others.

    `drows` and `dproject` are the gradients of the rows and the matrix of `conv_struct`.
    """
    K, (clips, _, E), W = len(dy), dy[0].shape, dweight[0].shape[-1]
    by_clip = dx.new_empty(clips * K * E * (W + 1))
    rows_by_clip = None if dproject[0] is None or clips == 1 else dx.new_empty((clips, K, *dproject[0].shape))
    pairs = [(*pair, None)[:2] for pair in (dweight, dbias, dproject)]
    members = (x for pair in pairs for x in pair)
    return *(*dy, None)[:2], *(*drows, None)[:2], dx, *dx.stride()[:2], *members, dinitial, by_clip, rows_by_clip


def _backward_shapes(
    x: Tensor, weight: Pair, bias: OptionalPair, initial_state: Tensor | None, silu: bool, reverses: Sequence[bool], dy: Tensor
) -> tuple[Any, ...]:
    def like(t: Tensor | None) -> Tensor:
        return x.new_empty(0 if t is None else t.shape)

    return like(x), [like(w) for w in weight], [like(b) for b in bias], like(initial_state)


_INPUTS = "Tensor x, Tensor[] weight, Tensor?[] bias, Tensor? initial_state, bool silu, bool[] reverses"
_causal_conv1d_backward = register(
    f"causal_conv1d_cpu_backward({_INPUTS}, Tensor dy) -> "
    "(Tensor dx, Tensor[] dweight, Tensor[] dbias, Tensor dinitial_state)",  # empty for what is None
    _backward,
    _backward_shapes,
)
_causal_conv1d = register(f"causal_conv1d_cpu({_INPUTS}) -> Tensor", _forward, _forward_shapes, _causal_conv1d_backward)
